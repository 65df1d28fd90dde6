"""Read-only queries: progress, lists, one job's history, the contact sheet's ranking, the export.

Rows of jobs and attempts carry the users' names: ``job`` and ``submission`` are our numbers
(the columns ``id`` and ``submission_id``), ``key`` is the user's own id.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Join,
    RowMapping,
    Select,
    and_,
    cast,
    desc,
    func,
    outerjoin,
    select,
)

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, STATES, Attempt, Job, Submission
from shared.errors import OutputRefused
from shared.jobs import Selection

UNFINISHED_STATES = tuple(state for state in STATES if state not in FINAL_STATES)
RATE_SECONDS = 60.0
MAX_ERRORS = 10
PARAMS_SAMPLE = 1000
SCORE_BINS = 20
# SQLite and PostgreSQL both limit the number of bound values in one statement (32,766, 65,535).
_IDS_PER_STATEMENT = 10_000
_EXPORT_PAGE = 1000

_NAMES = {"id": "job", "submission_id": "submission", "job_id": "job"}
_JOB_COLUMNS = [column.label(_NAMES.get(column.name, column.name)) for column in Job.__table__.c]
_ATTEMPT_COLUMNS = [
    column.label(_NAMES.get(column.name, column.name)) for column in Attempt.__table__.c
]


# --- progress --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BlockedJobs:
    """Unfinished jobs with the same last error.

    is_write_blocked: they are running and retry the write of their results; otherwise they
    wait for their next attempt. seconds: until the first of them is tried again.
    """

    code: str
    message: str
    count: int
    is_write_blocked: bool
    seconds: float

    @property
    def summary(self) -> str:
        """``3 blocked, retrying``, or ``3 failed, next attempt in 12 s``."""
        if self.is_write_blocked:
            return f"{self.count:,} blocked, retrying"
        return f"{self.count:,} failed, next attempt in {max(self.seconds, 0):.0f} s"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Jobs per state, of one submission or of all.

    rate: jobs finished per second over the last minute. review: succeeded jobs whose result a
    quality gate marked for a person to look at.
    """

    counts: dict[str, int]
    rate: float
    review: int = 0
    blocked: tuple[BlockedJobs, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def left(self) -> int:
        return sum(self.counts[state] for state in UNFINISHED_STATES)

    @property
    def seconds_left(self) -> float | None:
        return self.left / self.rate if self.left and self.rate else None


def measure_progress(
    db: Database, submission: int | None, *, extra_jobs: Sequence[int] = ()
) -> Progress:
    """Count the submission's jobs; None counts all jobs.

    extra_jobs: jobs of other submissions that are counted too.
    """
    where = Selection(submission=submission).conditions()
    with db.read() as connection:
        counts = dict.fromkeys(STATES, 0) | _counts(connection, where)
        for ids in _chunks(extra_jobs):
            for state, count in _counts(connection, (Job.id.in_(ids),)).items():
                counts[state] += count
        review = connection.execute(
            select(func.count()).where(*where, Job.review.is_not(None))
        ).scalar_one()
        return Progress(
            counts=counts,
            rate=_rate(connection, where),
            review=review,
            blocked=_blocked_jobs(connection, where),
        )


def _counts(connection: Connection, where: tuple[ColumnElement[bool], ...]) -> dict[str, int]:
    query = select(Job.state, func.count()).where(*where).group_by(Job.state)
    return {row[0]: row[1] for row in connection.execute(query)}


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _IDS_PER_STATEMENT):
        yield ids[start : start + _IDS_PER_STATEMENT]


def _rate(connection: Connection, where: tuple[ColumnElement[bool], ...]) -> float:
    finished, first, now = connection.execute(
        select(func.count(), func.min(Job.finished_at), clock()).where(
            *where, Job.finished_at > clock(-RATE_SECONDS)
        )
    ).one()
    if not finished or first is None:
        return 0.0
    # At least a second: three jobs that finish together are not thousands per second.
    return float(finished / max((now - first).total_seconds(), 1.0))


def _blocked_jobs(
    connection: Connection, where: tuple[ColumnElement[bool], ...]
) -> tuple[BlockedJobs, ...]:
    columns = (
        Job.error_code,
        Job.state,
        func.min(Job.error_message).label("message"),
        func.count().label("jobs"),
        func.min(Job.run_after).label("next"),
        clock().label("now"),
    )
    is_blocked = (
        Job.error_code.is_not(None),
        Job.finished_at.is_(None),
        Job.state.in_(("pending", "running")),
    )
    by_error = (Job.error_code, Job.state)
    query = select(*columns).where(*where, *is_blocked).group_by(*by_error).order_by(*by_error)
    return tuple(
        BlockedJobs(
            code=row.error_code,
            message=row.message,
            count=row.jobs,
            is_write_blocked=row.state == "running",
            seconds=(row.next - row.now).total_seconds(),
        )
        for row in connection.execute(query)
        # A job that runs again after any other error still shows it until it finishes.
        if row.state == "pending" or row.error_code == OutputRefused.code
    )


# --- lists -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SubmissionProgress:
    """A submission and its jobs per state; states without jobs are left out of ``counts``."""

    submission: int
    manifest: str
    created_at: datetime
    rows: int
    counts: dict[str, int]

    @property
    def left(self) -> int:
        return sum(self.counts.get(state, 0) for state in UNFINISHED_STATES)


def list_submissions(db: Database, *, limit: int = 20) -> list[SubmissionProgress]:
    """Return the newest submissions, the newest first."""
    newest = select(Submission).order_by(desc(Submission.id)).limit(limit)
    with db.read() as connection:
        rows = connection.execute(newest).all()
        counted = connection.execute(
            select(Job.submission_id, Job.state, func.count())
            .where(Job.submission_id.in_([row.id for row in rows]))
            .group_by(Job.submission_id, Job.state)
        ).all()
    counts: dict[int, dict[str, int]] = {row.id: {} for row in rows}
    for submission, state, count in counted:
        counts[submission][state] = count
    return [
        SubmissionProgress(
            submission=row.id,
            manifest=row.manifest,
            created_at=row.created_at,
            rows=row.rows,
            counts=counts[row.id],
        )
        for row in rows
    ]


def submission_exists(db: Database, submission: int) -> bool:
    with db.read() as connection:
        query = select(Submission.id).where(Submission.id == submission)
        return connection.execute(query).first() is not None


def list_jobs(db: Database, selection: Selection, *, limit: int | None) -> list[RowMapping]:
    """Return all columns of the selected jobs, in the order of their numbers."""
    query = select(*_JOB_COLUMNS).where(*selection.conditions()).order_by(Job.id).limit(limit)
    with db.read() as connection:
        return list(connection.execute(query).mappings())


@dataclass(frozen=True, kw_only=True)
class ErrorCount:
    """How many jobs failed with the same code and message."""

    code: str
    message: str
    count: int


def count_errors(
    db: Database, submission: int | None, *, extra_jobs: Sequence[int] = ()
) -> list[ErrorCount]:
    """Return the ``MAX_ERRORS`` most frequent errors of failed jobs, the most frequent first."""
    selections = [Selection(submission=submission, states=("failed",))]
    selections += [Selection(jobs=tuple(ids), states=("failed",)) for ids in _chunks(extra_jobs)]
    counted = select(Job.error_code, Job.error_message, func.count().label("jobs"))
    counts: Counter[tuple[str, str]] = Counter()
    with db.read() as connection:
        for selection in selections:
            query = (
                counted.where(*selection.conditions())
                .group_by(Job.error_code, Job.error_message)
                .order_by(desc("jobs"), Job.error_message)
                .limit(MAX_ERRORS)
            )
            for code, message, count in connection.execute(query):
                counts[str(code), str(message)] += count
    return [
        ErrorCount(code=code, message=message, count=count)
        for (code, message), count in counts.most_common(MAX_ERRORS)
    ]


@dataclass(frozen=True, kw_only=True)
class JobHistory:
    """All columns of a job and of its attempts, the oldest attempt first."""

    job: RowMapping
    attempts: list[RowMapping]


def job_history(db: Database, job: int) -> JobHistory | None:
    """Return the job and its attempts, or None if there is no such job."""
    with db.read() as connection:
        row = connection.execute(select(*_JOB_COLUMNS).where(Job.id == job)).mappings().first()
        if row is None:
            return None
        attempts = connection.execute(
            select(*_ATTEMPT_COLUMNS).where(Attempt.job_id == job).order_by(Attempt.attempt)
        ).mappings()
        return JobHistory(job=row, attempts=list(attempts))


# --- the contact sheet -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RankedJob:
    """A finished job as the contact sheet shows it.

    seed: the one that its last attempt used. params and scores: JSON; scores is None where no
    gate measured anything. score: 0 (worst) to 1, None for a failed job.
    """

    job: int
    key: str | None
    line: int
    state: str
    attempt: int
    image: str
    mask: str
    output: str
    image_version: str | None
    output_version: str | None
    params: str
    seed: int
    score: float | None
    scores: str | None
    review: str | None
    error_code: str | None
    error_message: str | None

    @property
    def name(self) -> str:
        """The user's key, or ``job 7``."""
        return self.key or f"job {self.job}"


@dataclass(frozen=True, kw_only=True)
class RankedJobs:
    """A submission's finished jobs, the worst first, for its contact sheet.

    left_out: how many finished jobs are beyond the limit. scores: number of results per
    twentieth of the score's range. params_sample: params of some of its jobs, as JSON.
    """

    submission: int
    manifest: str
    options: Mapping[str, Any]
    jobs: list[RankedJob]
    left_out: int
    scores: list[int]
    params_sample: list[str]


def rank_jobs(db: Database, submission: int, *, limit: int) -> RankedJobs | None:
    """Rank failed jobs first, then results for review, then all others from the lowest score.

    Of the failed jobs those stopped by a quality gate come first. As long as results can fill
    the rest, failed jobs take at most a quarter of ``limit``, so that one mistake in a manifest
    does not hide all results. None if there is no such submission.
    """
    in_submission = Job.submission_id == submission
    params_sample = select(Job.params).where(in_submission).order_by(Job.id).limit(PARAMS_SAMPLE)
    finished = select(func.count()).where(in_submission, Job.state.in_(("failed", "succeeded")))
    with db.read() as connection:
        row = connection.execute(select(Submission).where(Submission.id == submission)).first()
        if row is None:
            return None
        worst = _worst_jobs(connection, submission, limit)
        return RankedJobs(
            submission=row.id,
            manifest=row.manifest,
            options=json.loads(row.options),
            jobs=worst,
            left_out=connection.execute(finished).scalar_one() - len(worst),
            scores=_count_scores(connection, submission),
            params_sample=list(connection.execute(params_sample).scalars()),
        )


def _worst_jobs(connection: Connection, submission: int, limit: int) -> list[RankedJob]:
    jobs = _select_ranked().where(Job.submission_id == submission)
    stopped_by_gate = Job.error_code.startswith("gate_", autoescape=True)
    failed = jobs.where(Job.state == "failed").order_by(stopped_by_gate.desc(), Job.id)
    succeeded = jobs.where(Job.state == "succeeded").order_by(
        Job.review.is_(None), Job.score.is_(None), Job.score, Job.id
    )
    succeeded_rows = connection.execute(succeeded.limit(limit)).mappings().all()
    # Both queries read up to the limit; what exceeds it is cut after they are joined.
    failed_limit = max(limit - len(succeeded_rows), limit // 4, 1)
    failed_rows = connection.execute(failed.limit(failed_limit)).mappings().all()
    return [RankedJob(**row) for row in [*failed_rows, *succeeded_rows][:limit]]


def _select_ranked() -> Select[*tuple[Any, ...]]:
    of_job = [column for column in _JOB_COLUMNS if column.name in _RANKED_COLUMNS - {"seed"}]
    seed = func.coalesce(Attempt.seed, Job.seed).label("seed")
    return select(*of_job, seed, Attempt.scores).select_from(_jobs_with_last_attempt())


_RANKED_COLUMNS = {field.name for field in fields(RankedJob)}


def _jobs_with_last_attempt() -> Join:
    # Outer: a job that never ran has no attempt, and is exported too.
    last = and_(Attempt.job_id == Job.id, Attempt.attempt == Job.attempt)
    return outerjoin(Job.__table__, Attempt.__table__, last)


def _count_scores(connection: Connection, submission: int) -> list[int]:
    bin_number = cast(func.floor(Job.score * SCORE_BINS), Integer)
    query = (
        select(bin_number, func.count())
        .where(Job.submission_id == submission, Job.score.is_not(None))
        .group_by(bin_number)
    )
    counts = [0] * SCORE_BINS
    for number, count in connection.execute(query):
        # A score of exactly 1 belongs to the last bin.
        counts[min(number, SCORE_BINS - 1)] += count
    return counts


# --- the export ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """One job with its last attempt, as ``inpaint-jobs export`` writes it, in this order.

    Times are ISO 8601 in UTC. Fields of the attempt are None for a job that never ran.
    """

    submission: int
    job: int
    line: int
    key: str | None
    state: str
    attempts: int
    image: str
    mask: str
    output: str
    engine: str
    engine_revision: str | None
    seed: int
    params: dict[str, Any]
    priority: int
    error_code: str | None
    error_message: str | None
    image_sha256: str | None
    mask_sha256: str | None
    inputs: dict[str, str] | None
    result_sha256: str | None
    width: int | None
    height: int | None
    regions: int | None
    windows: int | None
    score: float | None
    review: str | None
    scores: dict[str, float] | None
    reseeds: int | None
    worker: str | None
    device: str | None
    memory_mode: str | None
    timings: dict[str, float] | None
    created_at: str
    started_at: str | None
    finished_at: str | None


JSON_COLUMNS = ("params", "timings", "inputs", "scores")
EXPORT_COLUMNS = tuple(field.name for field in fields(ExportRecord))
_TIME_COLUMNS = ("created_at", "started_at", "finished_at")


def export_jobs(db: Database, selection: Selection) -> Iterator[ExportRecord]:
    """Yield the selected jobs in the order of their numbers, in constant memory."""
    last = 0
    while True:
        # One short transaction per page: a slow reader must not hold one open for hours.
        with db.read() as connection:
            rows = connection.execute(_export_page(selection, after=last)).mappings().all()
        if not rows:
            return
        yield from map(_export_record, rows)
        last = rows[-1]["job"]


def _export_page(selection: Selection, *, after: int) -> Select[*tuple[Any, ...]]:
    exported = {
        **{name: column for name, column in Attempt.__table__.c.items() if name in EXPORT_COLUMNS},
        # Where both tables have a column, the job's is meant, except those listed below.
        **{name: column for name, column in Job.__table__.c.items() if name in EXPORT_COLUMNS},
        "submission": Job.submission_id,
        "job": Job.id,
        "attempts": Job.attempt,
        "seed": func.coalesce(Attempt.seed, Job.seed),
        "worker": Attempt.worker,
    }
    return (
        select(*(exported[name].label(name) for name in EXPORT_COLUMNS))
        .select_from(_jobs_with_last_attempt())
        .where(*selection.conditions(), Job.id > after)
        .order_by(Job.id)
        .limit(_EXPORT_PAGE)
    )


def _export_record(row: RowMapping) -> ExportRecord:
    values = dict(row)
    for name in JSON_COLUMNS:
        values[name] = json.loads(values[name]) if values[name] else None
    for name in _TIME_COLUMNS:
        values[name] = values[name].isoformat() if values[name] else None
    return ExportRecord(**values)
