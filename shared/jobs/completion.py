"""running -> succeeded, failed, pending, cancelled: how a worker ends its own attempt.

The job's new state and the attempt's outcome are written in one transaction, on condition that
the attempt still holds its lease; otherwise ``LeaseLost`` is raised and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Update, bindparam, case, null, update

from shared.db import Database, clock
from shared.db.models import Attempt, Job
from shared.errors import InpaintError, OutputReplaced
from shared.jobs.leases import HOLDS_LEASE, NO_LEASE, LeasedJob, RenewedLease, lease_lost
from shared.jobs.retry import RetryPolicy


@dataclass(kw_only=True)
class AttemptRecord:
    """What is recorded of an attempt; ``run_job`` fills it in as it proceeds.

    timings: stage name to seconds. inputs: location to SHA-256 of the files read besides
    image and mask. seed: the last one used; None before inpainting. reseeds: how often a gate
    asked for another. scores: the quality gates' metrics by name. score: the result's overall
    quality, 0 to 1. review: code of the gate that asks a person to look at the result.
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
        del row["score"], row["review"]  # columns of the job
        if self.seed is None:
            del row["seed"]  # keeps the one that ``acquire`` wrote
        row["timings"] = json.dumps({k: round(v, 6) for k, v in self.timings.items()})
        row["scores"] = json.dumps(self.scores) if self.scores else None
        row["inputs"] = json.dumps(self.inputs) if self.inputs else None
        return row


NO_ERROR: Mapping[str, Any] = {"error_code": null(), "error_message": null()}

# Each UPDATE below repeats HOLDS_LEASE: if the lease was reaped, or another attempt has ended
# the job, it matches no row. A cancellation that arrives while the job runs sets only
# ``cancel_requested``; the CASE applies it, so that the job neither runs again nor counts as
# failed.
_to_pending = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state=case((Job.cancel_requested, "cancelled"), else_="pending"),
        finished_at=case((Job.cancel_requested, clock()), else_=null()),
        run_after=clock(bindparam("delay_seconds")),
    )
    .returning(Job.state)
)
_to_failed = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state=case((Job.cancel_requested, "cancelled"), else_="failed"),
        finished_at=clock(),
    )
    .returning(Job.state)
)
_to_cancelled = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(**NO_LEASE, state="cancelled", finished_at=clock())
    .returning(Job.state)
)
# A job that was superseded while it ran keeps that error: the output belongs to the job that
# took it over. All other errors are cleared. A cancellation comes too late for a success.
_is_superseded = Job.error_code == OutputReplaced.code
_to_succeeded = (
    update(Job)
    .where(*HOLDS_LEASE)
    .values(
        **NO_LEASE,
        state="succeeded",
        finished_at=clock(),
        error_code=case((_is_superseded, Job.error_code), else_=null()),
        error_message=case((_is_superseded, Job.error_message), else_=null()),
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
    """running -> succeeded. Raises LeaseLost, as does every function that ends an attempt.

    output_version: of the object that was written to the output.
    """
    columns = {
        "image_version": record.image_version,
        "mask_version": record.mask_version,
        "output_version": output_version,
        "result_sha256": record.result_sha256,
        "score": record.score,
        "review": record.review,
    }
    _end(db, job, record, _to_succeeded, columns, outcome="succeeded")


def fail(
    db: Database, job: LeasedJob, record: AttemptRecord, error: InpaintError, policy: RetryPolicy
) -> float | None:
    """running -> pending if a retry can help and the policy allows one, else failed.

    Returns the seconds until the retry; None if the job has failed or was cancelled.
    """
    failures = job.failures + 1
    delay = policy.delay_seconds(failures) if error.retryable else None
    columns: dict[str, Any] = {
        "image_version": record.image_version,
        "mask_version": record.mask_version,
        "score": record.score,
        "error_code": error.code,
        "error_message": str(error),
        "failures": failures,
    }
    if delay is None:
        _end(db, job, record, _to_failed, columns, outcome="failed", error=error)
        return None
    columns["delay_seconds"] = delay
    state = _end(db, job, record, _to_pending, columns, outcome="retried", error=error)
    return delay if state == "pending" else None


def release(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    """running -> pending at shutdown: due at once, and not counted as a failure."""
    _end(db, job, record, _to_pending, {"delay_seconds": 0.0}, outcome="released")


def release_orphan(db: Database, lease: RenewedLease) -> None:
    """running -> pending, for a lease in this worker's name that none of its threads runs.

    The connection broke after ``acquire`` committed, or before the attempt's end was written.
    Does nothing if the lease has ended since.
    """
    parameters = lease.token.parameters()
    with db.write() as connection:
        state = connection.execute(_to_pending, {**parameters, "delay_seconds": 0.0}).scalar()
        if state is None:
            return
        outcome = "cancelled" if state == "cancelled" else "released"
        connection.execute(_end_attempt.values(outcome=outcome), parameters)


def finish_cancelled(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    """running -> cancelled, once the worker has seen the cancellation and stopped."""
    _end(db, job, record, _to_cancelled, {}, outcome="cancelled")


def _end(
    db: Database,
    job: LeasedJob,
    record: AttemptRecord,
    transition: Update,
    columns: Mapping[str, Any],
    *,
    outcome: str,
    error: InpaintError | None = None,
) -> str:
    """Ends job and attempt in one transaction; returns the job's new state.

    columns: what ``transition`` sets besides its own values.
    """
    token = job.token.parameters()
    attempt = {
        **token,
        **record.to_row(),
        "outcome": outcome,
        "error_code": error.code if error else None,
        "error_message": str(error) if error else None,
    }
    with db.write() as connection:
        state = connection.execute(transition, {**token, **columns}).scalar()
        if state is None:
            raise lease_lost(job)
        if outcome == "retried" and state == "cancelled":
            attempt["outcome"] = "failed"
        connection.execute(_end_attempt, attempt)
    return str(state)
