"""Readers-writer lock of a worker process: ordinary jobs share it, a suspect job excludes all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.5


class ExclusiveLock:
    """Readers-writer lock: a job whose last worker crashed runs exclusively, all others share.

    A crash kills every job in the process; running each alone afterwards identifies the culprit.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._is_exclusive = False
        self._waiting_exclusive = 0

    @contextmanager
    def shared(self, *, stop: Callable[[], bool]) -> Iterator[bool]:
        """Hold the lock together with other ordinary jobs; False if ``stop`` became true first.

        Exclusive jobs that wait already go first: a stream of ordinary jobs would starve them.
        """
        with self._changed:
            acquired = self._wait(
                lambda: not self._is_exclusive and not self._waiting_exclusive, stop
            )
            self._sharing += acquired
        try:
            yield acquired
        finally:
            if acquired:
                with self._changed:
                    self._sharing -= 1
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self, *, stop: Callable[[], bool]) -> Iterator[bool]:
        """Hold the lock alone; False if ``stop`` became true first."""
        with self._changed:
            self._waiting_exclusive += 1
            acquired = self._wait(lambda: not self._is_exclusive and not self._sharing, stop)
            self._waiting_exclusive -= 1
            if acquired:
                self._is_exclusive = True
            # If this job gave up, jobs that waited for it may share the lock now.
            self._changed.notify_all()
        try:
            yield acquired
        finally:
            if acquired:
                with self._changed:
                    self._is_exclusive = False
                    self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], stop: Callable[[], bool]) -> bool:
        # Polls ``stop``: a signal handler must not take a lock, so it cannot notify this thread.
        while not self._changed.wait_for(lambda: ready() or stop(), POLL_SECONDS):
            continue
        return not stop()
