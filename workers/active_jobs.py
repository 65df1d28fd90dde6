"""The jobs that a worker process runs; shared by its job threads, maintenance and shutdown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import Released
from workers.job_context import JobContext


class ActiveJobs:
    """Registry of the messages that this process handles and of the leases that it holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leased: dict[tuple[int, int], JobContext] = {}
        # A list: a repeated message may have two threads handle the same job for a moment.
        self._claimed: list[int] = []
        self._stopping = False
        # True after a connection to the database failed: it may have committed a lease that this
        # process does not know of.
        self.may_have_orphans = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @contextmanager
    def claim(self, job: int) -> Iterator[None]:
        """Mark a job as handled here, from its message on; its lease may not be known yet."""
        with self._lock:
            self._claimed.append(job)
        try:
            yield
        finally:
            with self._lock:
                self._claimed.remove(job)

    @contextmanager
    def register(self, job: JobContext) -> Iterator[None]:
        """List a leased job, so that heartbeats and shutdown reach it."""
        key = (job.id, job.leased.attempt)
        with self._lock:
            self._leased[key] = job
            # Checked under the lock: a shutdown that began before would miss this job.
            if self._stopping:
                job.interruption.set(_shutting_down())
        try:
            yield
        finally:
            with self._lock:
                del self._leased[key]

    def claimed_ids(self) -> set[int]:
        with self._lock:
            return set(self._claimed)

    def leased(self) -> list[JobContext]:
        with self._lock:
            return list(self._leased.values())

    def request_stop(self) -> None:
        """Stop every job at its next step, and every later one before its first.

        Takes no lock: a signal handler may interrupt the thread that holds it.
        """
        self._stopping = True
        for job in list(self._leased.values()):
            job.interruption.set(_shutting_down())


def _shutting_down() -> Released:
    return Released("the worker is shutting down")
