"""Deletes old finished submissions: the only code that deletes jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, select

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, Attempt, Job, Submission

# Small enough that workers wait for the locks, on SQLite for the database, only briefly.
_JOBS_PER_TRANSACTION = 2000


@dataclass(frozen=True, kw_only=True)
class PrunableSubmission:
    """A submission that may be deleted. jobs: how many are deleted with it."""

    submission: int
    manifest: str
    jobs: int


def find_prunable(
    db: Database, *, older_than_seconds: float, submission: int | None = None
) -> list[PrunableSubmission]:
    """The submissions that were created, and whose jobs all finished, longer ago than that."""
    where = [Submission.created_at < clock(-older_than_seconds)]
    if submission is not None:
        where.append(Submission.id == submission)
    unfinished = exists().where(
        Job.submission_id == Submission.id, ~_finished_before(older_than_seconds)
    )
    counted = select(func.count()).where(Job.submission_id == Submission.id).scalar_subquery()
    chosen = select(Submission.id, Submission.manifest, counted.label("jobs"))
    with db.read() as connection:
        rows = connection.execute(chosen.where(*where, ~unfinished).order_by(Submission.id)).all()
    return [
        PrunableSubmission(submission=row.id, manifest=row.manifest, jobs=row.jobs) for row in rows
    ]


def prune(
    db: Database,
    chosen: Sequence[PrunableSubmission],
    *,
    older_than_seconds: float,
    progress: Callable[[int], None] = lambda _jobs: None,
) -> int:
    """Deletes the submissions' jobs and attempts, in batches; returns the number of jobs.

    A job that was reopened since ``find_prunable`` stays, and so does its submission.
    progress: called after each batch with the number of jobs deleted.
    """
    total = 0
    for prunable in chosen:
        while deleted := _delete_batch(db, prunable.submission, older_than_seconds):
            total += deleted
            progress(deleted)
        _delete_if_empty(db, prunable.submission, older_than_seconds)
    return total


def _finished_before(seconds: float) -> ColumnElement[bool]:
    return Job.state.in_(FINAL_STATES) & (Job.finished_at < clock(-seconds))


def _delete_batch(db: Database, submission: int, seconds: float) -> int:
    where = (Job.submission_id == submission, _finished_before(seconds))
    oldest = select(Job.id).where(*where, *_never_reused(db, Job.id)).order_by(Job.id)
    with db.write() as connection:
        # Locked, so that none of them is reopened between the SELECT and the DELETE.
        locked = oldest.limit(_JOBS_PER_TRANSACTION).with_for_update()
        ids = list(connection.execute(locked).scalars())
        _delete_jobs(connection, ids)
    return len(ids)


def _delete_jobs(connection: Connection, ids: Sequence[int]) -> None:
    connection.execute(delete(Attempt).where(Attempt.job_id.in_(ids)))
    connection.execute(delete(Job).where(Job.id.in_(ids)))


def _delete_if_empty(db: Database, submission: int, seconds: float) -> None:
    with db.write() as connection:
        connection.execute(
            delete(Submission).where(
                Submission.id == submission,
                Submission.created_at < clock(-seconds),
                ~exists().where(Job.submission_id == submission),
                *_never_reused(db, Submission.id),
            )
        )


def _never_reused(db: Database, id_column: Any) -> list[ColumnElement[bool]]:
    # SQLite reuses the highest id once its row is deleted. A worker that still runs the old
    # job under that id and attempt would hold a valid fencing token for the new one.
    if not db.is_sqlite:
        return []
    return [id_column < select(func.max(id_column)).scalar_subquery()]
