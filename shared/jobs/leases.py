"""queued -> running, and back where a worker was lost.

``attempt`` is the fencing token: a worker's write counts only while its lease is the newest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
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
from shared.errors import InpaintError, LeaseLost, OutputReplaced
from shared.params import Params

LOSSES_BEFORE_QUARANTINE = 2
NO_LEASE: Mapping[str, Any] = {"worker": null(), "lease_expires_at": null()}


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """A job in this worker's hands. ``attempt`` is the fencing token."""

    id: int
    attempt: int
    engine: str
    image: str
    mask: str
    output: str
    params: Params
    priority: int
    failures: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease. ``worker`` is unique to one life of one process."""

    worker: str
    device: str
    engine_revision: str


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
    """Leases the job and opens its attempt; None where the message is stale or doubled."""
    with db.write() as connection:
        row = connection.execute(
            _acquire,
            {"job": job, "seen": seen_attempt, "holder": holder.worker, "lease": lease_seconds},
        ).first()
        if row is None:
            return None
        connection.execute(
            insert(Attempt).values(started_at=clock()),
            {
                "job_id": row.id,
                "attempt": row.attempt,
                "worker": holder.worker,
                "device": holder.device,
                "engine": row.engine,
                "engine_revision": holder.engine_revision,
                "params": row.params,
                "seed": row.seed,
            },
        )
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


@dataclass(frozen=True, kw_only=True)
class RenewedLease:
    """What a heartbeat found: a lease renewed, and whether its job is to be cancelled."""

    job: int
    attempt: int
    cancel_requested: bool

    @property
    def token(self) -> dict[str, int]:
        return {"of_job": self.job, "of_attempt": self.attempt}


def heartbeat(db: Database, *, worker: str, lease_seconds: float) -> list[RenewedLease]:
    """Renews all leases of one worker; a job that is not in the answer was lost."""
    held = (Job.state == "running", Job.worker == worker)
    with db.write() as connection:
        rows = connection.execute(
            update(Job)
            .where(Job.id.in_(lock_in_id_order(*held)), *held)
            .values(lease_expires_at=clock(lease_seconds))
            .returning(Job.id, Job.attempt, Job.cancel_requested)
        ).all()
    return [
        RenewedLease(job=row.id, attempt=row.attempt, cancel_requested=row.cancel_requested)
        for row in rows
    ]


def lock_in_id_order(*where: ColumnElement[bool]) -> Select[int]:
    """The ids of the jobs chosen, their rows locked in the order of the ids.

    PostgreSQL locks rows as an UPDATE comes upon them; two that meet the same rows in another
    order would each wait for the other. The UPDATE has to repeat the conditions.
    """
    return select(Job.id).where(*where).order_by(Job.id).with_for_update()


HOLDS_LEASE = (
    Job.id == bindparam("of_job"),
    Job.state == "running",
    Job.attempt == bindparam("of_attempt"),
)
_confirm = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(lease_expires_at=clock(bindparam("lease")))
    .returning(Job.id)
)


def renew_lease(db: Database, job: LeasedJob, *, lease_seconds: float) -> None:
    """Renews one lease; raises LeaseLost where it is not ours any more."""
    with db.write() as connection:
        held = connection.execute(_confirm, {**token(job), "lease": lease_seconds}).first()
    if held is None:
        raise lease_lost(job)


_note = (
    update(Job)
    .where(*HOLDS_LEASE, Job.error_code.is_distinct_from(OutputReplaced.code))
    .values(error_code=bindparam("code"), error_message=bindparam("message"))
)


def record_blocked_reason(db: Database, job: LeasedJob, error: InpaintError) -> None:
    """Writes down what a running job waits for, so that whoever looks at it can see."""
    with db.write() as connection:
        connection.execute(_note, {**token(job), "code": error.code, "message": str(error)})


def token(job: LeasedJob) -> dict[str, int]:
    return {"of_job": job.id, "of_attempt": job.attempt}


def lease_lost(job: LeasedJob) -> LeaseLost:
    return LeaseLost(f"job {job.id}: attempt {job.attempt} lost its lease; its work is dropped")


@dataclass(frozen=True, kw_only=True)
class ReapedLease:
    job: int
    attempt: int
    state: str


def reap(db: Database) -> list[ReapedLease]:
    """Takes back leases that ran out. The second lost worker quarantines the job.

    The condition is inside the UPDATE, so a heartbeat that comes in time wins.
    """
    expired = Job.lease_expires_at < clock()
    return _take_back(db, expired, reason="the worker stopped sending heartbeats")


def reap_worker(db: Database, *, worker: str, reason: str) -> list[ReapedLease]:
    """Takes back every lease of a worker whose process is known to have ended."""
    return _take_back(db, Job.worker == worker, reason=reason)


def _take_back(db: Database, chosen: ColumnElement[bool], *, reason: str) -> list[ReapedLease]:
    quarantined = Job.losses + 1 >= LOSSES_BEFORE_QUARANTINE
    state = case((Job.cancel_requested, "cancelled"), (quarantined, "failed"), else_="pending")
    message = "two workers were lost while they ran this job; retry it once the cause is known"
    with db.write() as connection:
        rows = connection.execute(
            update(Job)
            .where(
                Job.id.in_(lock_in_id_order(Job.state == "running", chosen)),
                Job.state == "running",
                chosen,
            )
            .values(
                **NO_LEASE,
                state=state,
                losses=Job.losses + 1,
                run_after=clock(),
                finished_at=case((or_(Job.cancel_requested, quarantined), clock()), else_=null()),
                error_code=case((quarantined, "worker_lost"), else_=Job.error_code),
                error_message=case((quarantined, message), else_=Job.error_message),
            )
            .returning(Job.id, Job.attempt, Job.state)
        ).all()
        if rows:
            connection.execute(
                update(Attempt)
                .where(
                    tuple_(Attempt.job_id, Attempt.attempt).in_([(r.id, r.attempt) for r in rows]),
                    Attempt.outcome.is_(None),
                )
                .values(
                    outcome="lost",
                    finished_at=clock(),
                    error_code="worker_lost",
                    error_message=reason,
                )
            )
    return [ReapedLease(job=row.id, attempt=row.attempt, state=row.state) for row in rows]
