"""How many decoded pixels a process holds at a time, whatever the number of its job threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.engines.protocol import Interruption

LOOK_UP_SECONDS = 0.5
# The most that a photograph with its mask takes between decoding and its encoded result, measured
# for JPEG (20) and PNG of 8 (17) and 16 bits (23).
BYTES_PER_PIXEL = 24
SHARE = 0.5  # of the machine's memory, for all worker processes together
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class PixelBudget:
    """Lets jobs in while their pixels fit together, first come, first served; one always fits."""

    def __init__(self, megapixels: float = float("inf")) -> None:
        self._limit = megapixels * 1e6
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._used = 0

    @contextmanager
    def holding(self, pixels: int, interruption: Interruption) -> Iterator[None]:
        """Waits for room. Raises the interruption's reason if that comes first."""
        self._await(pixels, interruption)
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()

    def _await(self, pixels: int, interruption: Interruption) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while not self._changed.wait_for(
                    lambda: self._waiting[0] is ticket and self._fits(pixels), LOOK_UP_SECONDS
                ):
                    interruption.check()
                self._used += pixels
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self._used or self._used + pixels <= self._limit


def default_megapixels(processes: int, *, memory_bytes: int | None = None) -> int:
    """What one of so many worker processes on this machine may hold.

    memory_bytes: the machine's if None, or less where the container may use less.
    """
    memory = memory_bytes or _memory_bytes()
    return max(1, int(SHARE * memory / BYTES_PER_PIXEL / 1e6) // processes)


def _memory_bytes() -> int:
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        found = min(found, int(CGROUP_LIMIT.read_text()))
    return found
