"""Forgetting finished submissions: the only code that deletes jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, select

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, Attempt, Job, Submission

_JOBS_PER_TRANSACTION = 2000


@dataclass(frozen=True, kw_only=True)
class PrunableSubmission:
    """A submission that may be forgotten, and how many jobs go with it."""

    submission: int
    manifest: str
    jobs: int


def find_prunable(
    db: Database, *, older_than_seconds: float, submission: int | None = None
) -> list[PrunableSubmission]:
    """Submissions that were made, and whose every job was finished, longer ago than that."""
    where = [Submission.created_at < clock(-older_than_seconds)]
    if submission is not None:
        where.append(Submission.id == submission)
    unfinished = exists().where(Job.submission_id == Submission.id, ~_is_old(older_than_seconds))
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
    """Deletes the submissions' jobs with their attempts, in batches; returns how many jobs.

    A job that was reopened meanwhile stays, and its submission with it.
    """
    total = 0
    for one in chosen:
        while deleted := _delete_batch(db, one.submission, older_than_seconds):
            total += deleted
            progress(deleted)
        _delete_empty(db, one.submission, older_than_seconds)
    return total


def _is_old(seconds: float) -> ColumnElement[bool]:
    return Job.state.in_(FINAL_STATES) & (Job.finished_at < clock(-seconds))


def _delete_batch(db: Database, submission: int, seconds: float) -> int:
    where = (Job.submission_id == submission, _is_old(seconds))
    with db.write() as connection:
        first = select(Job.id).where(*where, *_ids_not_given_again(db, Job.id))
        locked = first.order_by(Job.id).limit(_JOBS_PER_TRANSACTION).with_for_update()
        ids = list(connection.execute(locked).scalars())
        _delete_ids(connection, ids)
    return len(ids)


def _delete_ids(connection: Connection, ids: Sequence[int]) -> None:
    connection.execute(delete(Attempt).where(Attempt.job_id.in_(ids)))
    connection.execute(delete(Job).where(Job.id.in_(ids)))


def _delete_empty(db: Database, submission: int, seconds: float) -> None:
    with db.write() as connection:
        connection.execute(
            delete(Submission).where(
                Submission.id == submission,
                Submission.created_at < clock(-seconds),
                ~exists().where(Job.submission_id == submission),
                *_ids_not_given_again(db, Submission.id),
            )
        )


def _ids_not_given_again(db: Database, column: Any) -> list[ColumnElement[bool]]:
    # SQLite gives the highest id again once its row is gone, and a worker that still holds a
    # job of that id and attempt would pass for the new one's holder.
    if not db.is_sqlite:
        return []
    return [column < select(func.max(column)).scalar_subquery()]
