"""One job, top to bottom: acquire, render, put, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import sha256
from typing import TypeVar

from shared import jobs
from shared.errors import (
    Cancelled,
    DatabaseUnavailable,
    HostOutOfMemory,
    InpaintError,
    Interrupted,
    LeaseLost,
    ObjectMissing,
    ObjectTooLarge,
    OutputConflict,
    OutputRefused,
)
from shared.jobs import LeasedJob
from workers.job_context import JobContext
from workers.pending_writes import FailedWrite
from workers.pipeline.render import Rendered, render
from workers.worker_context import WorkerContext

log = logging.getLogger(__name__)

PUT_TRIES = 3
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 5.0

Result = TypeVar("Result")
# How an attempt ends: with the version of its published output, or with an error.
Outcome = str | InpaintError


def run_job(
    worker: WorkerContext, *, job: int, seen_attempt: int, exclusive: bool = False
) -> InpaintError | None:
    """Run the job that a message names, record how its attempt ends, and return its error.

    None if the job succeeded, if the message is stale, or if a failed write is being retried
    in the background. exclusive: no other job runs in this process meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(worker.active_jobs.claim(job))
        try:
            leased = _acquire(worker, job, seen_attempt)
        except DatabaseUnavailable as error:
            log.warning("job %s: not acquired: %s", job, error)
            return error
        if leased is None:
            log.debug("job %s: the message for attempt %s is stale", job, seen_attempt)
            return None
        context = JobContext(leased=leased)
        stack.enter_context(worker.active_jobs.register(context))
        return _run_attempt(worker, context, stack, exclusive=exclusive)


def _acquire(worker: WorkerContext, job: int, seen_attempt: int) -> LeasedJob | None:
    """Lease the job, retrying while the database is unavailable: other messages would fail too."""
    pause = MIN_PAUSE_SECONDS
    while True:
        try:
            return jobs.acquire(
                worker.db,
                job=job,
                seen_attempt=seen_attempt,
                holder=worker.holder,
                lease_seconds=worker.settings.lease_seconds,
            )
        except DatabaseUnavailable:
            # The connection may have failed after the commit.
            worker.active_jobs.may_have_orphans = True
            if worker.active_jobs.stopping:
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _run_attempt(
    worker: WorkerContext, job: JobContext, stack: ExitStack, *, exclusive: bool
) -> InpaintError | None:
    """Render, put, finish. stack: what to release afterwards; a pending write takes it over."""
    rendered = _catch(job, lambda: render(worker, job))
    if isinstance(rendered, InpaintError):
        return _finish(worker, job, rendered)
    outcome = _catch(job, lambda: _put(worker, job, rendered))
    if isinstance(outcome, OutputRefused):
        write = _failed_write(worker, job, rendered, outcome)
        finish = partial(_publish_and_finish, worker, job, stack.pop_all())
        # An exclusive job keeps its thread, and with it the lock: if other jobs ran while its
        # write is retried, nobody could tell which job caused a crash.
        return worker.pending_writes.retry(write, finish, block=exclusive)
    if not isinstance(outcome, InpaintError):
        worker.pending_writes.note_success()
    return _finish(worker, job, outcome)


def _catch(job: JobContext, work: Callable[[], Result]) -> Result | InpaintError:
    """Return what the work returns, or its error as an InpaintError.

    The one broad except around a job: whatever goes wrong is recorded with its attempt.
    """
    try:
        return work()
    except InpaintError as error:
        return error
    # A decoder that fails to allocate does not end the process: other jobs may need less.
    except MemoryError:
        return HostOutOfMemory("this machine is out of memory")
    except Exception as error:
        log.exception("job %s: unexpected error", job.id)
        return InpaintError(f"{type(error).__name__}: {error}")


def _failed_write(
    worker: WorkerContext, job: JobContext, rendered: Rendered, error: OutputRefused
) -> FailedWrite:
    return FailedWrite(
        job=job.id,
        size=len(rendered.data),
        put=partial(_put, worker, job, rendered),
        error=error,
        report_blocked=partial(_record_blocked_reason, worker, job),
        interruption=job.interruption,
    )


def _record_blocked_reason(worker: WorkerContext, job: JobContext, error: OutputRefused) -> None:
    # Only for display: it may be lost. Heartbeats report an unavailable database anyway.
    with suppress(DatabaseUnavailable):
        jobs.record_blocked_reason(worker.db, job.leased, error)


def _publish_and_finish(
    worker: WorkerContext, job: JobContext, stack: ExitStack, publish: Callable[[], str]
) -> InpaintError | None:
    with stack:
        return _finish(worker, job, _catch(job, publish))


def _put(worker: WorkerContext, job: JobContext, rendered: Rendered) -> str:
    """Replace the output as it was when the work began; return its new version.

    A newer version is replaced only if an earlier attempt of this job wrote it. Otherwise
    raises OutputConflict; the next attempt begins with that version.
    """
    with job.stage("put"):
        output, version = job.leased.output, rendered.replaced_version
        earlier = [f"{job.id}-{attempt}" for attempt in range(1, job.leased.attempt)]
        worker.storage.remove_temporary_files(output, earlier)
        for _ in range(PUT_TRIES - 1):
            try:
                return _put_once(worker, job, rendered.data, version)
            except OutputConflict as conflict:
                # _put_once renews the lease before it writes over the version read here.
                version = _earlier_version(worker, job.leased, conflict)
        return _put_once(worker, job, rendered.data, version)


def _put_once(worker: WorkerContext, job: JobContext, data: bytes, version: str | None) -> str:
    leased, seconds = job.leased, worker.settings.lease_seconds
    renew = partial(jobs.renew_lease, worker.db, leased, lease_seconds=seconds)
    result_sha256 = job.record.result_sha256
    _retry_within_lease(worker, lambda: renew(result_sha256=result_sha256))
    token = f"{leased.id}-{leased.attempt}"
    return worker.storage.put(leased.output, data, if_version=version, token=token)


def _earlier_version(worker: WorkerContext, job: LeasedJob, conflict: OutputConflict) -> str | None:
    """Return the version of the output that an attempt of this job wrote; None if it is gone.

    Raises the conflict if anything else wrote it: then it may be a newer owner's result.
    """
    try:
        written = worker.storage.get(job.output, max_bytes=worker.settings.max_object_bytes)
    except ObjectMissing:
        return None
    except ObjectTooLarge:
        raise conflict from None
    if not jobs.wrote_result(worker.db, job, sha256(written.data).hexdigest()):
        raise conflict
    return written.version


def _finish(worker: WorkerContext, job: JobContext, outcome: Outcome) -> InpaintError | None:
    """Record how the attempt ended; return its error, or that of the recording."""
    error = outcome if isinstance(outcome, InpaintError) else None
    if isinstance(error, LeaseLost):
        log.warning("%s", error)
        return error
    try:
        _retry_within_lease(worker, lambda: _record(worker, job, outcome))
    except LeaseLost as lost:
        log.warning("%s", lost)
    except DatabaseUnavailable as unavailable:
        log.warning(
            "job %s: not recorded: %s; it runs again once its lease ends", job.id, unavailable
        )
        return unavailable
    return error


def _record(worker: WorkerContext, job: JobContext, outcome: Outcome) -> None:
    leased, record = job.leased, job.record
    if isinstance(outcome, str):
        jobs.succeed(worker.db, leased, record, output_version=outcome)
        seconds = sum(record.timings.values())
        log.info("job %s: succeeded in %.2f s, %s windows", job.id, seconds, record.windows)
    elif isinstance(outcome, Cancelled):
        jobs.finish_cancelled(worker.db, leased, record)
        log.info("job %s: cancelled", job.id)
    elif isinstance(outcome, Interrupted):
        jobs.release(worker.db, leased, record)
        log.info("job %s: released: %s", job.id, outcome)
    else:
        delay = jobs.fail(worker.db, leased, record, outcome, worker.retry_policy)
        result = "failed" if delay is None else f"failed, retried in {delay:.0f} s"
        log.warning("job %s: %s: %s: %s", job.id, result, outcome.code, outcome)


def _retry_within_lease(worker: WorkerContext, write: Callable[[], None]) -> None:
    """Repeat a write to the database while it is unavailable and the lease may still be ours.

    Raises DatabaseUnavailable after that; the job is then reaped.
    """
    deadline = time.monotonic() + worker.settings.lease_seconds
    pause = MIN_PAUSE_SECONDS
    while True:
        try:
            write()
            return
        except DatabaseUnavailable:
            if time.monotonic() + pause > deadline:
                worker.active_jobs.may_have_orphans = True
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def release_all(worker: WorkerContext, *, keep: Collection[int] = ()) -> None:
    """Release the jobs that do not reach their next step, so that they run elsewhere.

    This ends their attempts: whatever the engine still returns can no longer be published.
    keep: ids of jobs that are not released; they are reaped later, which counts them as lost.
    """
    for job in worker.active_jobs.leased():
        if job.id in keep:
            continue
        try:
            # The job threads may hold every connection of their own.
            jobs.release(worker.maintenance_db, job.leased, job.record)
            log.info("job %s: released in the middle of a step", job.id)
        except (LeaseLost, DatabaseUnavailable) as error:
            log.warning("job %s: not released: %s", job.id, error)
