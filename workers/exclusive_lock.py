"""Whose turn it is in a process: jobs run side by side, a suspect runs alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_UP_SECONDS = 0.5


class ExclusiveLock:
    """Keeps what a process does besides away from a job that a worker was lost with.

    Whoever crashed the process takes all the jobs beside it along. Each of them runs alone the
    next time, so that a second crash names the one that did it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False
        self._suspects = 0

    @contextmanager
    def turn(self, *, alone: bool, stop: Callable[[], bool]) -> Iterator[bool]:
        """Waits for its turn; False where ``stop`` said so first."""
        came = self._await_alone(stop) if alone else self._await_together(stop)
        try:
            yield came
        finally:
            if came:
                self._leave(alone)

    def _await_alone(self, stop: Callable[[], bool]) -> bool:
        with self._changed:
            self._suspects += 1
            came = self._await(lambda: not self._alone and not self._together, stop)
            self._suspects -= 1
            self._alone = self._alone or came
            self._changed.notify_all()
        return came

    def _await_together(self, stop: Callable[[], bool]) -> bool:
        with self._changed:
            came = self._await(lambda: not self._alone and not self._suspects, stop)
            self._together += came
        return came

    def _await(self, ready: Callable[[], bool], stop: Callable[[], bool]) -> bool:
        # A signal handler may not take a lock, so nobody wakes this thread at shutdown.
        while not self._changed.wait_for(lambda: ready() or stop(), LOOK_UP_SECONDS):
            continue
        return not stop()

    def _leave(self, alone: bool) -> None:
        with self._changed:
            if alone:
                self._alone = False
            else:
                self._together -= 1
            self._changed.notify_all()
