"""running -> succeeded, failed, pending, cancelled: how a worker ends its attempt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Update, bindparam, case, null, update

from shared.db import Database, clock
from shared.db.models import Attempt, Job
from shared.errors import InpaintError, OutputReplaced
from shared.jobs.leases import HOLDS_LEASE, NO_LEASE, LeasedJob, RenewedLease, lease_lost, token
from shared.jobs.retry import RetryPolicy


@dataclass(kw_only=True)
class AttemptRecord:
    """What an attempt has found out so far; filled in as ``run_job`` goes along.

    timings: stage name to seconds. inputs: location to SHA-256 of what else was read.
    seed: the last one used. scores: the gates' figures by name; score: all in one, 0 to 1;
    review: the code of the gate that wants a person to look. Versions as in the job's row.
    """

    image_sha256: str | None = None
    mask_sha256: str | None = None
    result_sha256: str | None = None
    image_version: str | None = None
    mask_version: str | None = None
    width: int | None = None
    height: int | None = None
    regions: int | None = None
    windows: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    reseeds: int = 0
    scores: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    review: str | None = None
    memory_mode: str | None = None

    def to_row(self) -> dict[str, Any]:
        """The attempt's columns."""
        row = asdict(self)
        for name in ("score", "review") if self.seed is not None else ("score", "review", "seed"):
            del row[name]
        row["timings"] = json.dumps({k: round(v, 6) for k, v in self.timings.items()})
        row["scores"] = json.dumps(self.scores) if self.scores else None
        row["inputs"] = json.dumps(self.inputs) if self.inputs else None
        return row


NO_ERROR: Mapping[str, Any] = {"error_code": null(), "error_message": null()}

# A job that its user cancelled meanwhile neither waits again nor counts as failed.
_waits = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state=case((Job.cancel_requested, "cancelled"), else_="pending"),
        finished_at=case((Job.cancel_requested, clock()), else_=null()),
        run_after=clock(bindparam("wait")),
    )
    .returning(Job.state)
)
_fails = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state=case((Job.cancel_requested, "cancelled"), else_="failed"),
        finished_at=clock(),
    )
    .returning(Job.state)
)
_cancels = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(**NO_LEASE, state="cancelled", finished_at=clock())
    .returning(Job.state)
)
# A job that was superseded while it ran leaves the output to the job that took it over.
_superseded = Job.error_code == OutputReplaced.code
_succeeds = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state="succeeded",
        finished_at=clock(),
        error_code=case((_superseded, Job.error_code), else_=null()),
        error_message=case((_superseded, Job.error_message), else_=null()),
    )
    .returning(Job.state)
)
_end_attempt = (
    update(Attempt)
    .where(Attempt.job_id == bindparam("of_job"), Attempt.attempt == bindparam("of_attempt"))
    .values(finished_at=clock())
)


def succeed(
    db: Database, job: LeasedJob, record: AttemptRecord, *, output_version: str | None = None
) -> None:
    """Raises LeaseLost, as do all that end an attempt; the attempt is then the reaper's.

    output_version: of the object that now lies at the output.
    """
    found = {
        "image_version": record.image_version,
        "mask_version": record.mask_version,
        "output_version": output_version,
        "result_sha256": record.result_sha256,
        "score": record.score,
        "review": record.review,
    }
    _finish(db, job, record, _succeeds, found, outcome="succeeded")


def fail(
    db: Database, job: LeasedJob, record: AttemptRecord, error: InpaintError, policy: RetryPolicy
) -> float | None:
    """Fails the job, or sends it back to wait; returns the wait in seconds, None if final."""
    failures = job.failures + 1
    wait = policy.delay_seconds(failures) if error.retryable else None
    found: dict[str, Any] = {
        "image_version": record.image_version,
        "mask_version": record.mask_version,
        "score": record.score,
        "error_code": error.code,
        "error_message": str(error),
        "failures": failures,
    }
    if wait is None:
        _finish(db, job, record, _fails, found, outcome="failed", error=error)
        return None
    found["wait"] = wait
    state = _finish(db, job, record, _waits, found, outcome="retried", error=error)
    return wait if state == "pending" else None


def release(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    """Gives the job back on shutdown; it is due at once and no failure is counted."""
    _finish(db, job, record, _waits, {"wait": 0.0}, outcome="released")


def release_orphan(db: Database, beat: RenewedLease) -> None:
    """Gives back a lease that its own worker knows nothing of, as ``release`` does.

    The connection broke while the job was acquired, or before its end could be written.
    """
    with db.write() as connection:
        state = connection.execute(_waits, {**beat.token, "wait": 0.0}).scalar()
        if state is None:
            return
        outcome = "cancelled" if state == "cancelled" else "released"
        connection.execute(_end_attempt.values(outcome=outcome), beat.token)


def finish_cancelled(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    _finish(db, job, record, _cancels, {}, outcome="cancelled")


def _finish(
    db: Database,
    job: LeasedJob,
    record: AttemptRecord,
    ends: Update,
    found: Mapping[str, Any],
    *,
    outcome: str,
    error: InpaintError | None = None,
) -> str:
    """Ends the attempt in the job's own transaction, and gives the job's new state."""
    ended = {
        **token(job),
        **record.to_row(),
        "outcome": outcome,
        "error_code": error.code if error else None,
        "error_message": str(error) if error else None,
    }
    with db.write() as connection:
        state = connection.execute(ends, {**token(job), **found}).scalar()
        if state is None:
            raise lease_lost(job)
        if outcome == "retried" and state == "cancelled":
            ended["outcome"] = "failed"
        connection.execute(_end_attempt, ended)
    return str(state)
