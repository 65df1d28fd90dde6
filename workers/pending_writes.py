"""Results whose write failed (disk full, permission denied), retried in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from shared.errors import OutputRefused
from workers.engines.protocol import Interruption

log = logging.getLogger(__name__)

MAX_RESULTS = 32
MAX_BYTES = 256 << 20
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 15.0

Finished = TypeVar("Finished")


@dataclass(frozen=True, kw_only=True)
class FailedWrite:
    """A result whose first write failed.

    size: of the result, in bytes. put: writes it and returns the output's version; raises
    OutputRefused while the destination still fails. error: why the first write failed.
    report_blocked: called once with the error, before the first retry.
    """

    job: int
    size: int
    put: Callable[[], str]
    error: OutputRefused
    report_blocked: Callable[[OutputRefused], None]
    interruption: Interruption


class PendingWrites:
    """Bounded buffer of results whose write failed, each retried on its own thread.

    retry_seconds: after this the write's error is final.
    """

    def __init__(
        self,
        *,
        retry_seconds: float = 600,
        max_results: int = MAX_RESULTS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._retry_seconds = retry_seconds
        self._max_results, self._max_bytes = max_results, max_bytes
        self._changed = threading.Condition()
        # Monotonic seconds when each pending write began; in that order, as dicts keep it.
        self._began: dict[object, float] = {}
        self._bytes = 0
        self._succeeded_at = 0.0

    def retry(
        self,
        write: FailedWrite,
        finish: Callable[[Callable[[], str]], Finished],
        *,
        block: bool,
    ) -> Finished | None:
        """Retry a write in the background, so that this thread can take other jobs.

        If the buffer is full, retry on this thread (back-pressure); block: do so in any case.
        finish: called on the thread that retries, with a function that returns the output's
        version, or raises OutputRefused after ``retry_seconds``. Returns its result if it ran
        on this thread, None otherwise.
        """
        in_background = partial(self._put_until_written, write, background=True)
        if not block and self.start(partial(finish, in_background), size=write.size):
            return None
        return finish(partial(self._put_until_written, write, background=False))

    def start(self, work: Callable[[], object], *, size: int) -> bool:
        """Run the work on its own thread; False if the buffer has no room for ``size`` bytes.

        One result always fits.
        """
        with self._changed:
            if not self._has_room(size):
                return False
            entry = object()
            # A daemon: the process may end first, and the job is then released or reaped.
            thread = threading.Thread(
                target=self._run, args=(work, entry, size), name="pending write", daemon=True
            )
            self._began[entry] = time.monotonic()
            self._bytes += size
        thread.start()
        return True

    def _has_room(self, size: int) -> bool:
        if not self._began:
            return True
        return len(self._began) < self._max_results and self._bytes + size <= self._max_bytes

    def _run(self, work: Callable[[], object], entry: object, size: int) -> None:
        try:
            work()
        finally:
            with self._changed:
                del self._began[entry]
                self._bytes -= size
                self._changed.notify_all()

    def _put_until_written(self, write: FailedWrite, *, background: bool) -> str:
        """Retry with doubling pauses; return the output's version.

        Raises OutputRefused after ``retry_seconds``, or once ``_may_wait`` is False.
        """
        deadline = time.monotonic() + self._retry_seconds
        pause, error, is_reported = MIN_PAUSE_SECONDS, write.error, False
        while time.monotonic() + pause <= deadline and self._may_wait(background=background):
            if not is_reported:
                log.warning("job %s: write failed, retrying: %s", write.job, error)
                write.report_blocked(error)
                is_reported = True
            # Raises if the job was cancelled, lost its lease or is released at shutdown.
            write.interruption.wait(pause)
            try:
                version = write.put()
            except OutputRefused as refused:
                error = refused
            else:
                log.info("job %s: written after retrying", write.job)
                return version
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
        raise error

    def _may_wait(self, *, background: bool) -> bool:
        """A job thread waits only while no destination works: other jobs need it otherwise."""
        return background or not self.other_writes_succeed()

    def note_success(self) -> None:
        """Record that a first write succeeded just now."""
        self._succeeded_at = time.monotonic()

    def other_writes_succeed(self) -> bool:
        """True if a write succeeded after the median pending write began.

        Then only some destinations fail. Not the newest: it began too recently for any success.
        Not the oldest: after a long time one success proves little.
        """
        with self._changed:
            began = list(self._began.values())
        return bool(began) and self._succeeded_at > began[len(began) // 2]

    def join(self, seconds: float) -> bool:
        """Wait until nothing is pending; False if that takes longer than ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._began, seconds)
