"""Limit on the decoded pixels of a process, independent of its number of job threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.engines.protocol import Interruption

POLL_SECONDS = 0.5
# Peak memory of a photograph and its mask from decoding to the encoded result, measured: 20 for
# JPEG, 17 for PNG of 8 bits, 23 for PNG of 16 bits.
BYTES_PER_PIXEL = 24
MEMORY_SHARE = 0.5  # of the machine's memory, for all worker processes together
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class PixelBudget:
    """Weighted semaphore, first come, first served. A job larger than the budget runs alone."""

    def __init__(self, megapixels: float = float("inf")) -> None:
        self._limit = megapixels * 1e6
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._used = 0

    @contextmanager
    def reserve(self, pixels: int, interruption: Interruption) -> Iterator[None]:
        """Wait until the pixels fit, then hold them. Raises the interruption's reason."""
        self._acquire(pixels, interruption)
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()

    def _acquire(self, pixels: int, interruption: Interruption) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                # Only the first in the queue may proceed: small images would starve a large one.
                while not self._changed.wait_for(
                    lambda: self._queue[0] is ticket and self._fits(pixels), POLL_SECONDS
                ):
                    interruption.check()
                self._used += pixels
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self._limit


def default_megapixels(processes: int, *, memory_bytes: int | None = None) -> int:
    """Return the budget of each of ``processes`` worker processes on this machine, at least 1.

    memory_bytes: None for the machine's memory, or the container's limit if that is lower.
    """
    memory = memory_bytes or _memory_bytes()
    return max(1, int(MEMORY_SHARE * memory / BYTES_PER_PIXEL / 1e6) // processes)


def _memory_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        memory = min(memory, int(CGROUP_LIMIT.read_text()))
    return memory
