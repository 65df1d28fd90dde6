"""Leases: queued -> running, renewal, and running -> pending or failed if a worker is lost.

A worker runs a job only under a lease and renews it by heartbeat. Each lease has a fencing
token, (job, attempt): ``acquire`` increments ``attempt``, and every later write of that
attempt names the token in its WHERE clause. A worker that was suspended until after its lease
expired therefore cannot overwrite what a newer attempt has written.
Source: Martin Kleppmann, "How to do distributed locking", 2016.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    case,
    insert,
    null,
    or_,
    select,
    tuple_,
    update,
)

from shared.db import Database, clock
from shared.db.models import Attempt, Job
from shared.errors import Cancelled, InpaintError, LeaseLost, OutputReplaced, WorkerLost
from shared.params import Params

# One lost worker may be chance (preemption, a node failure); two with the same job are a
# suspicion that the job itself crashes the process.
LOSSES_BEFORE_QUARANTINE = 2
NO_LEASE: Mapping[str, Any] = {"worker": null(), "lease_expires_at": null()}


@dataclass(frozen=True, kw_only=True)
class FencingToken:
    """Names one lease of one job; every write of an attempt is conditional on it."""

    job: int
    attempt: int

    def parameters(self) -> dict[str, int]:
        """Values for the bound parameters of ``HOLDS_LEASE``."""
        return {"of_job": self.job, "of_attempt": self.attempt}


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """A job that this worker has leased, as it was at ``acquire``.

    failures: attempts that ended in an error so far; lost and released ones do not count.
    """

    id: int
    attempt: int
    engine: str
    image: str
    mask: str
    output: str
    params: Params
    priority: int
    failures: int

    @property
    def token(self) -> FencingToken:
        return FencingToken(job=self.id, attempt=self.attempt)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease. ``worker`` is unique to one run of one process."""

    worker: str
    device: str
    engine_revision: str


# The same message may be delivered twice. The first acquire increments ``attempt``, so that
# the second matches no row.
_acquire = (
    update(Job)
    .where(Job.id == bindparam("job"), Job.state == "queued", Job.attempt == bindparam("seen"))
    .values(
        state="running",
        attempt=Job.attempt + 1,
        worker=bindparam("holder"),
        lease_expires_at=clock(bindparam("lease")),
    )
    .returning(
        Job.id,
        Job.attempt,
        Job.engine,
        Job.image,
        Job.mask,
        Job.output,
        Job.params,
        Job.seed,
        Job.priority,
        Job.failures,
    )
)


def acquire(
    db: Database, *, job: int, seen_attempt: int, holder: Holder, lease_seconds: float
) -> LeasedJob | None:
    """queued -> running: leases the job and opens its attempt.

    seen_attempt: ``attempt`` of the message. Returns None if the message is stale or a
    duplicate: the job is not queued, or ``attempt`` has grown since.
    """
    with db.write() as connection:
        row = connection.execute(
            _acquire,
            {"job": job, "seen": seen_attempt, "holder": holder.worker, "lease": lease_seconds},
        ).first()
        if row is None:
            return None
        _open_attempt(connection, row, holder)
    return LeasedJob(
        id=row.id,
        attempt=row.attempt,
        engine=row.engine,
        image=row.image,
        mask=row.mask,
        output=row.output,
        params=Params.from_json(row.params, seed=row.seed),
        priority=row.priority,
        failures=row.failures,
    )


def _open_attempt(connection: Connection, job: Row[*tuple[Any, ...]], holder: Holder) -> None:
    connection.execute(
        insert(Attempt).values(started_at=clock()),
        {
            "job_id": job.id,
            "attempt": job.attempt,
            "worker": holder.worker,
            "device": holder.device,
            "engine": job.engine,
            "engine_revision": holder.engine_revision,
            "params": job.params,
            "seed": job.seed,
        },
    )


@dataclass(frozen=True, kw_only=True)
class RenewedLease:
    """A lease that a heartbeat renewed, and whether the job's user wants it cancelled."""

    job: int
    attempt: int
    cancel_requested: bool

    @property
    def token(self) -> FencingToken:
        return FencingToken(job=self.job, attempt=self.attempt)


def heartbeat(db: Database, *, worker: str, lease_seconds: float) -> list[RenewedLease]:
    """running -> running: renews all leases of one worker, in one UPDATE.

    A job that is missing from the result is no longer leased to this worker.
    """
    # A lease that has expired but was not reaped yet is renewed too. A reaped one is not:
    # the job is no longer running, or runs under another worker's name.
    leased = (Job.state == "running", Job.worker == worker)
    with db.write() as connection:
        rows = connection.execute(
            update(Job)
            .where(Job.id.in_(lock_in_id_order(*leased)), *leased)
            .values(lease_expires_at=clock(lease_seconds))
            .returning(Job.id, Job.attempt, Job.cancel_requested)
        ).all()
    return [
        RenewedLease(job=row.id, attempt=row.attempt, cancel_requested=row.cancel_requested)
        for row in rows
    ]


def lock_in_id_order(*where: ColumnElement[bool]) -> Select[int]:
    """SELECT ... FOR UPDATE of the matching jobs' ids, locked in ascending order.

    PostgreSQL locks the rows of an UPDATE in the order of its scan. Two statements that reach
    the same rows in different orders would deadlock. The UPDATE must repeat the conditions,
    since a row may change between the selection and its lock.
    """
    return select(Job.id).where(*where).order_by(Job.id).with_for_update()


# The fencing condition: true as long as this attempt holds the job's lease.
HOLDS_LEASE = (
    Job.id == bindparam("of_job"),
    Job.state == "running",
    Job.attempt == bindparam("of_attempt"),
)
_renew = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(lease_expires_at=clock(bindparam("lease")))
    .returning(Job.id, Job.error_code)
)
_announce_result = (
    update(Attempt)
    .where(Attempt.job_id == bindparam("of_job"), Attempt.attempt == bindparam("of_attempt"))
    .values(result_sha256=bindparam("sha256"))
)


def renew_lease(
    db: Database, job: LeasedJob, *, lease_seconds: float, result_sha256: str | None = None
) -> None:
    """Renews one lease, just before the result is put. Raises LeaseLost.

    Raises Cancelled if another job owns the output by now.
    result_sha256: of the result, so that ``wrote_result`` recognises it if this attempt is lost
    between the put and its record.
    """
    token = job.token.parameters()
    with db.write() as connection:
        renewed = connection.execute(_renew, {**token, "lease": lease_seconds}).first()
        if renewed is None:
            raise lease_lost(job)
        if renewed.error_code == OutputReplaced.code:
            raise Cancelled(f"job {job.id}: another submission now writes {job.output!r}")
        if result_sha256 is not None:
            connection.execute(_announce_result, {**token, "sha256": result_sha256})


def wrote_result(db: Database, job: LeasedJob, sha256: str) -> bool:
    """True if an attempt of this job has put a result with this hash, or was about to."""
    attempts = select(Attempt.attempt).where(
        Attempt.job_id == job.id, Attempt.result_sha256 == sha256
    )
    with db.read() as connection:
        return connection.execute(attempts.limit(1)).first() is not None


# A job whose output was taken over keeps that error: it decides who owns the output.
_set_blocked_reason = (
    update(Job)
    .where(*HOLDS_LEASE, Job.error_code.is_distinct_from(OutputReplaced.code))
    .values(error_code=bindparam("code"), error_message=bindparam("message"))
)


def record_blocked_reason(db: Database, job: LeasedJob, error: InpaintError) -> None:
    """Stores the reason a running job is blocked, for `inpaint-jobs show`.

    Does nothing if the lease is lost: the next renewal or write reports that.
    """
    reason = {"code": error.code, "message": str(error)}
    with db.write() as connection:
        connection.execute(_set_blocked_reason, {**job.token.parameters(), **reason})


def lease_lost(job: LeasedJob) -> LeaseLost:
    return LeaseLost(f"job {job.id}: attempt {job.attempt} lost its lease; its work is dropped")


@dataclass(frozen=True, kw_only=True)
class ReapedLease:
    """A lease whose worker was lost, and the job's new state."""

    job: int
    attempt: int
    state: str


@dataclass(frozen=True, kw_only=True)
class RunningLease:
    """A lease as another process sees it; every renewal changes ``expires_at``."""

    token: FencingToken
    expires_at: datetime


def running_leases(db: Database, *, except_of: str) -> list[RunningLease]:
    """All leases but those of one worker. Raises DatabaseUnavailable if leases cannot be renewed.

    On a read-only server every lease looks abandoned; the row lock, of no row, fails there.
    """
    writable = select(Job.id).where(Job.id < 0).with_for_update()
    leased = select(Job.id, Job.attempt, Job.lease_expires_at).where(
        Job.state == "running", Job.worker != except_of
    )
    with db.write() as connection:
        connection.execute(writable)
        rows = connection.execute(leased).all()
    return [
        RunningLease(
            token=FencingToken(job=row.id, attempt=row.attempt), expires_at=row.lease_expires_at
        )
        for row in rows
    ]


def reap(db: Database, tokens: Collection[FencingToken] | None = None) -> list[ReapedLease]:
    """running -> pending, failed or cancelled: ends the attempts whose lease has expired.

    tokens: only these leases, which a ``LeaseWatch`` has watched; None for all.
    """
    if tokens is not None and not tokens:
        return []
    lost = Job.lease_expires_at < clock()
    if tokens is not None:
        watched = [(token.job, token.attempt) for token in tokens]
        lost = and_(lost, tuple_(Job.id, Job.attempt).in_(watched))
    return _reap(db, lost, reason="the worker stopped sending heartbeats")


def reap_worker(db: Database, *, worker: str, reason: str) -> list[ReapedLease]:
    """Ends every attempt of a worker whose process is known to have exited."""
    return _reap(db, Job.worker == worker, reason=reason)


def _reap(db: Database, lost: ColumnElement[bool], *, reason: str) -> list[ReapedLease]:
    """The job runs again, or is quarantined (failed) after ``LOSSES_BEFORE_QUARANTINE``."""
    quarantined = Job.losses + 1 >= LOSSES_BEFORE_QUARANTINE
    state = case((Job.cancel_requested, "cancelled"), (quarantined, "failed"), else_="pending")
    message = "two workers were lost while they ran this job; retry it once the cause is known"
    # ``lost`` is checked again on the locked row: a heartbeat that commits first keeps its
    # lease, and of several reapers only one matches.
    where = (Job.state == "running", lost)
    reaped = (
        update(Job)
        .where(Job.id.in_(lock_in_id_order(*where)), *where)
        .values(
            **NO_LEASE,
            state=state,
            losses=Job.losses + 1,
            run_after=clock(),
            finished_at=case((or_(Job.cancel_requested, quarantined), clock()), else_=null()),
            error_code=case((quarantined, WorkerLost.code), else_=Job.error_code),
            error_message=case((quarantined, message), else_=Job.error_message),
        )
        .returning(Job.id, Job.attempt, Job.state)
    )
    with db.write() as connection:
        leases = [
            ReapedLease(job=row.id, attempt=row.attempt, state=row.state)
            for row in connection.execute(reaped)
        ]
        _end_attempts(connection, leases, reason)
    return leases


def _end_attempts(connection: Connection, leases: list[ReapedLease], reason: str) -> None:
    if not leases:
        return
    tokens = [(lease.job, lease.attempt) for lease in leases]
    connection.execute(
        update(Attempt)
        .where(tuple_(Attempt.job_id, Attempt.attempt).in_(tokens), Attempt.outcome.is_(None))
        .values(
            outcome="lost", finished_at=clock(), error_code=WorkerLost.code, error_message=reason
        )
    )
