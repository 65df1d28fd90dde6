"""The share of time in which a device thread has a call running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Utilization:
    """Busy time between the first call's start and the last call's end. For one thread.

    On CUDA a call returns while the device still runs. ``CopyStreams.limit_run_ahead`` waits
    inside a call for the previous forward pass, so the share is close to the device's own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first_start: float | None = None
        self._last_end = self._busy_seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count the time inside the block as busy."""
        start = self._clock()
        # The time before the first call is warm-up, not idleness.
        self._first_start = start if self._first_start is None else self._first_start
        try:
            yield
        finally:
            self._last_end = self._clock()
            self._busy_seconds += self._last_end - start

    @property
    def seconds(self) -> float:
        """From the first call's start to the last call's end; 0 before the first call."""
        return 0.0 if self._first_start is None else self._last_end - self._first_start

    @property
    def idle_share(self) -> float:
        """The share of ``seconds`` outside any call, 0 to 1."""
        return 1 - self._busy_seconds / self.seconds if self.seconds else 0.0
