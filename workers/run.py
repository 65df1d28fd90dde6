"""One job, top to bottom: acquire, render, put, end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from shared import jobs
from shared.db import Database
from shared.errors import (
    Cancelled,
    DatabaseUnavailable,
    InpaintError,
    Interrupted,
    LeaseLost,
    OutputConflict,
    OutputRefused,
)
from shared.jobs import AttemptRecord, Holder, LeasedJob
from shared.retry import RetryPolicy
from shared.settings import Settings
from shared.storage import Storage
from workers.engines.protocol import Engine, Interruption
from workers.holding import Running, Stages
from workers.render import Kit, render
from workers.room import Room

log = logging.getLogger(__name__)

PUT_TRIES = 3
MAX_PAUSE_SECONDS = 5.0
REFUSED_PAUSE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a worker process works with."""

    settings: Settings
    db: Database
    storage: Storage
    engine: Engine
    holder: Holder
    running: Running
    retry: RetryPolicy
    room: Room = field(default_factory=Room)


def run_job(bench: Bench, *, job: int, seen_attempt: int) -> InpaintError | None:
    """Runs the job a message names, records what came of it, and returns what went wrong.

    Nothing did where the message is stale. Raises DatabaseUnavailable where nothing
    could be recorded: the lease is then given back, or runs out.
    """
    with bench.running.taking(job):
        return _run_leased(bench, job, seen_attempt)


def _run_leased(bench: Bench, job: int, seen_attempt: int) -> InpaintError | None:
    leased = _acquire(bench, job, seen_attempt)
    if leased is None:
        log.debug("job %s: the message for attempt %s is stale", job, seen_attempt)
        return None
    record = AttemptRecord()
    with bench.running.holding(leased, record) as interruption:
        output_version = ended = None
        try:
            output_version = _inpaint(bench, leased, record, interruption)
        except InpaintError as error:
            ended = error
        except MemoryError:
            ended = InpaintError("this machine is out of memory", code="host_out_of_memory")
            ended.retryable = True
        except Exception as error:
            log.exception("job %s: unexpected error", job)
            ended = InpaintError(f"{type(error).__name__}: {error}")
        _conclude(bench, leased, record, ended, output_version)
    return ended


def _acquire(bench: Bench, job: int, seen_attempt: int) -> LeasedJob | None:
    """Waits for a database that does not answer: other messages would fare no better."""
    pause = 0.1
    while True:
        try:
            return jobs.acquire(
                bench.db,
                job=job,
                seen_attempt=seen_attempt,
                holder=bench.holder,
                lease_seconds=bench.settings.lease_seconds,
            )
        except DatabaseUnavailable:
            bench.running.may_have_orphans = True
            if bench.running.stopping:
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _inpaint(
    bench: Bench, job: LeasedJob, record: AttemptRecord, interruption: Interruption
) -> str:
    """Everything between the lease and the result's publication; the output's new version."""
    kit = Kit(settings=bench.settings, storage=bench.storage, engine=bench.engine, room=bench.room)
    rendered = render(kit, job, record, interruption)
    with Stages(record, interruption)("put"):
        return _put_patiently(bench, job, rendered.data, rendered.replaces, interruption)


def _put_patiently(
    bench: Bench, job: LeasedJob, data: bytes, seen: str | None, interruption: Interruption
) -> str:
    """Keeps the result while the output refuses it, which holds up this worker's other jobs.

    They would be refused as well. Raises OutputRefused after ``refused_seconds``.
    """
    deadline = time.monotonic() + bench.settings.refused_seconds
    waited = False
    while True:
        try:
            version = _put(bench, job, data, seen=seen)
        except OutputRefused as error:
            if time.monotonic() + REFUSED_PAUSE_SECONDS > deadline:
                raise
            if not waited:
                log.warning("job %s: pausing until it can be written: %s", job.id, error)
                # Only for whoever looks on; heartbeats say it where the database is away as well.
                with suppress(DatabaseUnavailable):
                    jobs.note(bench.db, job, error)
            waited = True
        else:
            if waited:
                log.info("job %s: written after all", job.id)
            return version
        interruption.wait(REFUSED_PAUSE_SECONDS)


def _put(bench: Bench, job: LeasedJob, data: bytes, *, seen: str | None) -> str:
    """Writes over the version seen, and over a newer one only while the lease is ours.

    A newer version comes from an attempt that lost its lease to us and wrote all the same.
    """
    bench.storage.remove_leftovers(job.output, [f"{job.id}-{n}" for n in range(1, job.attempt)])
    for _ in range(PUT_TRIES - 1):
        try:
            return _put_once(bench, job, data, seen)
        except OutputConflict:
            found = bench.storage.stat(job.output)
            seen = found.version if found else None
    return _put_once(bench, job, data, seen)


def _put_once(bench: Bench, job: LeasedJob, data: bytes, seen: str | None) -> str:
    lease = bench.settings.lease_seconds
    _persist(bench, lambda: jobs.confirm(bench.db, job, lease_seconds=lease))
    token = f"{job.id}-{job.attempt}"
    return bench.storage.put(job.output, data, if_version=seen, token=token)


def _conclude(
    bench: Bench,
    job: LeasedJob,
    record: AttemptRecord,
    ended: InpaintError | None,
    output_version: str | None,
) -> None:
    if isinstance(ended, LeaseLost):
        log.warning("%s", ended)
        return
    try:
        _persist(bench, lambda: _write_end(bench, job, record, ended, output_version))
    except LeaseLost as error:
        log.warning("%s", error)


def _write_end(
    bench: Bench,
    job: LeasedJob,
    record: AttemptRecord,
    ended: InpaintError | None,
    output_version: str | None,
) -> None:
    if ended is None:
        jobs.succeed(bench.db, job, record, output_version=output_version)
        seconds = sum(record.timings.values())
        log.info("job %s: succeeded in %.2f s, %s windows", job.id, seconds, record.windows)
    elif isinstance(ended, Cancelled):
        jobs.finish_cancelled(bench.db, job, record)
        log.info("job %s: cancelled", job.id)
    elif isinstance(ended, Interrupted):
        jobs.release(bench.db, job, record)
        log.info("job %s: released: %s", job.id, ended)
    else:
        wait = jobs.fail(bench.db, job, record, ended, bench.retry)
        what = "failed" if wait is None else f"failed, again in {wait:.0f} s"
        log.warning("job %s: %s: %s: %s", job.id, what, ended.code, ended)


def give_back(bench: Bench, *, keep: Collection[int] = ()) -> None:
    """Releases the jobs whose engine does not come to its next step; they run elsewhere.

    The attempt is over with that: whatever the engine still returns can no longer be put.
    keep: ids of jobs whose leases stay, for the reaper to count.
    """
    for held in bench.running.held():
        if held.job.id in keep:
            continue
        try:
            jobs.release(bench.db, held.job, held.record)
            log.info("job %s: released in the middle of a step", held.job.id)
        except (LeaseLost, DatabaseUnavailable) as error:
            log.warning("job %s: not released: %s", held.job.id, error)


def _persist(bench: Bench, write: Callable[[], None]) -> None:
    """Tries for as long as the lease may still be ours, then lets the reaper have the job."""
    deadline = time.monotonic() + bench.settings.lease_seconds
    pause = 0.1
    while True:
        try:
            write()
            return
        except DatabaseUnavailable:
            if time.monotonic() + pause > deadline:
                bench.running.may_have_orphans = True
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)
