"""How much of its time a device thread has calls running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Utilization:
    """Between the first call's start and the last one's end. For one thread.

    On CUDA a call returns while the device still runs; but ``CopyStreams.pace`` waits inside one
    for the forward before, so the share is close to the device's own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first: float | None = None
        self._last = self._busy = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        start = self._clock()
        self._first = start if self._first is None else self._first
        try:
            yield
        finally:
            self._last = self._clock()
            self._busy += self._last - start

    @property
    def seconds(self) -> float:
        return 0.0 if self._first is None else self._last - self._first

    @property
    def idle_share(self) -> float:
        """0 to 1"""
        return 1 - self._busy / self.seconds if self.seconds else 0.0
