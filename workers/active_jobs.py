"""The jobs in a worker process's hands; shared by job threads, upkeep and shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.errors import Released
from shared.jobs import AttemptRecord, LeasedJob
from workers.engines.protocol import Interruption


@dataclass(frozen=True, kw_only=True)
class ActiveJob:
    """A job in this process's hands."""

    job: LeasedJob
    record: AttemptRecord
    interruption: Interruption


class ActiveJobs:
    """Every job that this process holds a lease of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], ActiveJob] = {}
        self._taken: list[int] = []
        self._stopping = False
        # Set where the database did not answer: a lease may be ours without our knowing it.
        self.may_have_orphans = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @contextmanager
    def holding(self, job: LeasedJob, record: AttemptRecord) -> Iterator[ActiveJob]:
        held = ActiveJob(job=job, record=record, interruption=Interruption())
        with self._lock:
            self._held[job.id, job.attempt] = held
            if self._stopping:
                held.interruption.set(_released())
        try:
            yield held
        finally:
            with self._lock:
                del self._held[job.id, job.attempt]

    @contextmanager
    def taking(self, job: int) -> Iterator[None]:
        """While a message is worked on; the job may be leased without our knowing it yet."""
        with self._lock:
            self._taken.append(job)
        try:
            yield
        finally:
            with self._lock:
                self._taken.remove(job)

    def taken(self) -> set[int]:
        with self._lock:
            return set(self._taken)

    def held(self) -> list[ActiveJob]:
        with self._lock:
            return list(self._held.values())

    def release_all(self) -> None:
        """Every job stops at its next step, and no new one starts. Safe in a signal handler."""
        self._stopping = True
        for held in list(self._held.values()):
            held.interruption.set(_released())


def _released() -> Released:
    return Released("the worker is shutting down")


class StageTimer:
    """Times each stage into the record; an interruption is noticed between stages."""

    def __init__(self, record: AttemptRecord, interruption: Interruption) -> None:
        self._record = record
        self._interruption = interruption

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A stage that comes several times is timed as one."""
        self._interruption.check()
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = self._record.timings.get(name, 0.0)
            self._record.timings[name] = spent + time.perf_counter() - start
