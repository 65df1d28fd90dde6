"""Results that their outputs refuse, kept aside so that the jobs of other outputs go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MOST = 32
MOST_BYTES = 256 << 20


class PendingWrites:
    """A few results wait in threads of their own; where there are more, something is to pause."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._changed = threading.Condition()
        self._since: dict[object, float] = {}  # the longest waiting first
        self._bytes = 0
        self._written_at = 0.0

    def begin(self, wait: Callable[[], object], *, size: int) -> bool:
        """Calls it on a thread of its own; False where there is no room for a result of that size.

        size: in bytes; one result always fits.
        """
        with self._changed:
            if len(self._since) >= self._most or (
                self._since and self._bytes + size > self._most_bytes
            ):
                return False
            ticket = object()
            thread = threading.Thread(
                target=self._run, args=(wait, ticket, size), name="waiting", daemon=True
            )
            self._since[ticket] = time.monotonic()
            self._bytes += size
        thread.start()
        return True

    def _run(self, wait: Callable[[], object], ticket: object, size: int) -> None:
        try:
            wait()
        finally:
            with self._changed:
                del self._since[ticket]
                self._bytes -= size
                self._changed.notify_all()

    def note_written(self) -> None:
        """A result was taken at once."""
        self._written_at = time.monotonic()

    def others_are_written(self) -> bool:
        """Whether results were taken at once since half of those that wait began to.

        Then some outputs refuse and others do not; otherwise it may be all of them.
        """
        with self._changed:
            since = list(self._since.values())
        return bool(since) and self._written_at > since[len(since) // 2]

    def join(self, seconds: float) -> bool:
        """Until nothing waits any more; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._since, seconds)
