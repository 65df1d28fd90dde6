"""When a failed job runs again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter: uniform(0, min(cap, base * 2**(failures - 1))).

    Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    max_failures: int = 5
    base_seconds: float = 30.0
    cap_seconds: float = 900.0
    random: random.Random = field(default_factory=random.SystemRandom, compare=False)

    def delay_seconds(self, failures: int) -> float | None:
        """Seconds until the retry after so many failures (1 or more); None if there is none."""
        if failures >= self.max_failures:
            return None
        longest = min(self.cap_seconds, self.base_seconds * 2 ** (failures - 1))
        # Full jitter: jobs that fail together, say in an outage, do not come back together.
        return self.random.uniform(0, longest)
