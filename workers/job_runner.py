"""One job, top to bottom: acquire, render, put, end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

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
from shared.jobs.retry import RetryPolicy
from shared.settings import Settings
from shared.storage import Storage
from workers.active_jobs import ActiveJob, ActiveJobs, StageTimer
from workers.engines.protocol import Engine
from workers.pending_writes import PendingWrites
from workers.pipeline.render import Kit, Rendered, render
from workers.pixel_budget import PixelBudget

log = logging.getLogger(__name__)

PUT_TRIES = 3
MAX_PAUSE_SECONDS = 5.0
REFUSED_PAUSE_SECONDS, MAX_REFUSED_PAUSE_SECONDS = 1.0, 15.0

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a worker process works with."""

    settings: Settings
    db: Database
    storage: Storage
    engine: Engine
    holder: Holder
    running: ActiveJobs
    retry: RetryPolicy
    room: PixelBudget = field(default_factory=PixelBudget)
    waiting: PendingWrites = field(default_factory=PendingWrites)


def run_job(
    bench: Bench, *, job: int, seen_attempt: int, alone: bool = False
) -> InpaintError | None:
    """Runs the job a message names, records what came of it, and returns what went wrong.

    Nothing did where the message is stale, nor where the result is there and waits for its
    output. alone: nothing else is to be in hand while it runs.
    """
    with ExitStack() as hands:
        hands.enter_context(bench.running.taking(job))
        try:
            leased = _acquire(bench, job, seen_attempt)
        except DatabaseUnavailable as error:
            log.warning("job %s: not taken: %s", job, error)
            return error
        if leased is None:
            log.debug("job %s: the message for attempt %s is stale", job, seen_attempt)
            return None
        held = hands.enter_context(bench.running.holding(leased, AttemptRecord()))
        return _run_held(bench, held, hands, alone=alone)


def _run_held(
    bench: Bench, held: ActiveJob, hands: ExitStack, *, alone: bool
) -> InpaintError | None:
    version: str | None = None
    rendered, ended = _attempted(held, lambda: _rendered(bench, held))
    if rendered is not None:
        version, ended = _attempted(held, lambda: _published(bench, held, rendered))
        if isinstance(ended, OutputRefused):
            return _keep(bench, held, hands, rendered, ended, alone=alone)
    if ended is None:
        bench.waiting.note_written()
    return _conclude(bench, held, ended, version)


def _attempted(
    held: ActiveJob, work: Callable[[], Made]
) -> tuple[Made | None, InpaintError | None]:
    """What the work made, or what went wrong."""
    try:
        return work(), None
    except InpaintError as error:
        return None, error
    except MemoryError:
        ended = InpaintError("this machine is out of memory", code="host_out_of_memory")
        ended.retryable = True
        return None, ended
    except Exception as error:
        log.exception("job %s: unexpected error", held.job.id)
        return None, InpaintError(f"{type(error).__name__}: {error}")


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


def _rendered(bench: Bench, held: ActiveJob) -> Rendered:
    kit = Kit(settings=bench.settings, storage=bench.storage, engine=bench.engine, room=bench.room)
    return render(kit, held.job, held.record, held.interruption)


def _published(bench: Bench, held: ActiveJob, rendered: Rendered) -> str:
    """The output's new version."""
    with StageTimer(held.record, held.interruption)("put"):
        return _put(bench, held.job, rendered.data, seen=rendered.replaces)


def _keep(
    bench: Bench,
    held: ActiveJob,
    hands: ExitStack,
    rendered: Rendered,
    refused: OutputRefused,
    *,
    alone: bool,
) -> InpaintError | None:
    """Waits with a result that its output refuses, and leaves this thread to other jobs.

    Where many wait already, all outputs may refuse, and what more is painted could not be
    kept: then this thread waits too, and with it the jobs that it would take. So it does with a
    job that runs alone, lest that pays for another's crash.
    """
    wait = partial(_wait, bench, held, hands.pop_all(), rendered, refused)
    if not alone and bench.waiting.begin(partial(wait, aside=True), size=len(rendered.data)):
        return None
    return wait(aside=False)


def _wait(
    bench: Bench,
    held: ActiveJob,
    hands: ExitStack,
    rendered: Rendered,
    refused: OutputRefused,
    *,
    aside: bool,
) -> InpaintError | None:
    """Ends the job when its output takes the result, or has refused it for too long.

    aside: waiting keeps nobody from anything.
    """
    with hands:
        version, ended = _attempted(
            held, lambda: _published_in_time(bench, held, rendered, refused, aside=aside)
        )
        return _conclude(bench, held, ended, version)


def _published_in_time(
    bench: Bench, held: ActiveJob, rendered: Rendered, refused: OutputRefused, *, aside: bool
) -> str:
    """The output's new version. Raises OutputRefused after ``write_retry_seconds``.

    Where it keeps others waiting, which other outputs would serve, it raises that at once.
    """
    deadline = time.monotonic() + bench.settings.write_retry_seconds
    pause, said = REFUSED_PAUSE_SECONDS, False
    while time.monotonic() + pause <= deadline and (
        aside or not bench.waiting.others_are_written()
    ):
        if not said:
            _say_that_it_waits(bench, held.job, refused)
        said = True
        held.interruption.wait(pause)
        try:
            version = _published(bench, held, rendered)
        except OutputRefused as error:
            refused = error
        else:
            log.info("job %s: written after all", held.job.id)
            return version
        pause = min(2 * pause, MAX_REFUSED_PAUSE_SECONDS)
    raise refused


def _say_that_it_waits(bench: Bench, job: LeasedJob, refused: OutputRefused) -> None:
    log.warning("job %s: pausing until it can be written: %s", job.id, refused)
    # Only for whoever looks on; heartbeats say it where the database is away as well.
    with suppress(DatabaseUnavailable):
        jobs.record_blocked_reason(bench.db, job, refused)


def _put(bench: Bench, job: LeasedJob, data: bytes, *, seen: str | None) -> str:
    """Writes over the version seen, and over a newer one only while the lease is ours.

    A newer version comes from an attempt that lost its lease to us and wrote all the same.
    """
    bench.storage.remove_temporary_files(
        job.output, [f"{job.id}-{n}" for n in range(1, job.attempt)]
    )
    for _ in range(PUT_TRIES - 1):
        try:
            return _put_once(bench, job, data, seen)
        except OutputConflict:
            found = bench.storage.stat(job.output)
            seen = found.version if found else None
    return _put_once(bench, job, data, seen)


def _put_once(bench: Bench, job: LeasedJob, data: bytes, seen: str | None) -> str:
    lease = bench.settings.lease_seconds
    _persist(bench, lambda: jobs.renew_lease(bench.db, job, lease_seconds=lease))
    token = f"{job.id}-{job.attempt}"
    return bench.storage.put(job.output, data, if_version=seen, token=token)


def _conclude(
    bench: Bench, held: ActiveJob, ended: InpaintError | None, output_version: str | None
) -> InpaintError | None:
    """Records how the attempt ended; what went wrong, the recording included."""
    if isinstance(ended, LeaseLost):
        log.warning("%s", ended)
        return ended
    try:
        _persist(bench, lambda: _write_end(bench, held.job, held.record, ended, output_version))
    except LeaseLost as error:
        log.warning("%s", error)
    except DatabaseUnavailable as error:
        log.warning("job %s: %s; it runs out of its lease or is given back", held.job.id, error)
        return error
    return ended


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
