"""What the tables tell: counts, lists, one job's whole story, the export."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from shared.db.models import STATES, Attempt, Job, Submission
from shared.errors import OutputRefused
from shared.jobs import Selection

RATE_SECONDS = 60.0
MANY_ERRORS = 10
_IDS_PER_STATEMENT = 10_000
SAMPLED = 1000
SCORE_BINS = 20


@dataclass(frozen=True, kw_only=True)
class BlockedJobs:
    """Jobs that an error keeps waiting. seconds: until the first of them is tried again."""

    code: str
    message: str
    count: int
    is_paused: bool
    seconds: float

    @property
    def summary(self) -> str:
        """``3 paused``, or ``3 wait to be tried again, 12 s``."""
        if self.is_paused:
            return f"{self.count:,} paused until it is mended"
        return f"{self.count:,} wait to be tried again, {max(self.seconds, 0):.0f} s"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One submission's, or everything's. ``rate``: finished per second over the last minute.

    review: succeeded, but a gate wants a person to look.
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
        return sum(self.counts[state] for state in ("pending", "queued", "running"))

    @property
    def seconds_left(self) -> float | None:
        return self.left / self.rate if self.left and self.rate else None


def measure_progress(
    db: Database, submission: int | None, *, extra_jobs: Sequence[int] = ()
) -> Progress:
    """also: ids of jobs of other submissions that count as well."""
    chosen = Selection(submission=submission).conditions()
    with db.read() as connection:
        rows = connection.execute(
            select(Job.state, func.count()).where(*chosen).group_by(Job.state)
        ).all()
        recent = connection.execute(
            select(func.count(), func.min(Job.finished_at), clock()).where(
                *chosen, Job.finished_at > clock(-RATE_SECONDS)
            )
        ).one()
        review = connection.execute(
            select(func.count()).where(*chosen, Job.review.is_not(None))
        ).scalar_one()
        troubled = connection.execute(_blocked_query(chosen)).all()
        others = [row for ids in _slices(extra_jobs) for row in _states(connection, ids)]
    counts = dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}
    for state, number in others:
        counts[state] += number
    blocked = tuple(trouble for row in troubled if (trouble := _blocked_jobs(row)))
    return Progress(counts=counts, rate=_rate(*recent), review=review, blocked=blocked)


def _slices(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """As many at a time as one statement may name."""
    for start in range(0, len(ids), _IDS_PER_STATEMENT):
        yield ids[start : start + _IDS_PER_STATEMENT]


def _states(connection: Connection, ids: Sequence[int]) -> list[tuple[str, int]]:
    counted = select(Job.state, func.count()).where(Job.id.in_(ids)).group_by(Job.state)
    return [(row[0], row[1]) for row in connection.execute(counted)]


def _blocked_query(chosen: tuple[ColumnElement[bool], ...]) -> Select[*tuple[Any, ...]]:
    columns = (
        *(Job.error_code, Job.state, func.min(Job.error_message).label("message")),
        *(func.count().label("jobs"), func.min(Job.run_after).label("next")),
        clock().label("now"),
    )
    waiting = Job.state.in_(("pending", "running"))
    return (
        select(*columns)
        .where(*chosen, Job.error_code.is_not(None), Job.finished_at.is_(None), waiting)
        .group_by(Job.error_code, Job.state)
        .order_by(Job.error_code, Job.state)
    )


def _blocked_jobs(row: Any) -> BlockedJobs | None:
    """None of a job that runs again after an error; one that is paused runs, too."""
    is_paused = row.state == "running"
    if is_paused and row.error_code != OutputRefused.code:
        return None
    return BlockedJobs(
        code=row.error_code,
        message=row.message,
        count=row.jobs,
        is_paused=is_paused,
        seconds=(row.next - row.now).total_seconds(),
    )


def _rate(finished: int, first: datetime | None, now: datetime) -> float:
    if not finished or first is None:
        return 0.0
    return finished / max((now - first).total_seconds(), 1.0)


@dataclass(frozen=True, kw_only=True)
class SubmissionProgress:
    """A submission and how far it is."""

    id: int
    manifest: str
    created_at: datetime
    rows: int
    counts: dict[str, int]


def list_submissions(db: Database, *, limit: int = 20) -> list[SubmissionProgress]:
    """The newest submissions first."""
    newest = select(Submission).order_by(desc(Submission.id)).limit(limit)
    with db.read() as connection:
        found = connection.execute(newest).all()
        counted = connection.execute(
            select(Job.submission_id, Job.state, func.count())
            .where(Job.submission_id.in_([row.id for row in found]))
            .group_by(Job.submission_id, Job.state)
        ).all()
    counts: dict[int, dict[str, int]] = {row.id: {} for row in found}
    for submission, state, count in counted:
        counts[submission][state] = count
    return [
        SubmissionProgress(
            id=row.id,
            manifest=row.manifest,
            created_at=row.created_at,
            rows=row.rows,
            counts=counts[row.id],
        )
        for row in found
    ]


def submission_exists(db: Database, submission: int) -> bool:
    with db.read() as connection:
        found = connection.execute(select(Submission.id).where(Submission.id == submission))
        return found.first() is not None


def list_jobs(db: Database, selection: Selection, *, limit: int | None) -> list[RowMapping]:
    query = select(Job.__table__).where(*selection.conditions()).order_by(Job.id).limit(limit)
    with db.read() as connection:
        return list(connection.execute(query).mappings())


def count_errors(
    db: Database, submission: int | None, *, extra_jobs: Sequence[int] = ()
) -> list[tuple[str, int, str]]:
    """(code, count, message) of the failed jobs, the most frequent ``MANY_ERRORS`` first."""
    selections = [Selection(submission=submission, states=("failed",))]
    selections += [Selection(jobs=tuple(ids), states=("failed",)) for ids in _slices(extra_jobs)]
    counted = select(Job.error_code, Job.error_message, func.count().label("jobs"))
    counts: Counter[tuple[str, str]] = Counter()
    with db.read() as connection:
        for selection in selections:
            query = (
                counted.where(*selection.conditions())
                .group_by(Job.error_code, Job.error_message)
                .order_by(desc("jobs"), Job.error_message)
                .limit(MANY_ERRORS)
            )
            for code, message, count in connection.execute(query):
                counts[str(code), str(message)] += count
    return [(code, n, message) for (code, message), n in counts.most_common(MANY_ERRORS)]


@dataclass(frozen=True, kw_only=True)
class JobHistory:
    """One job and all its attempts, oldest first, as columns to values."""

    job: RowMapping
    attempts: list[RowMapping]


def job_history(db: Database, job: int) -> JobHistory | None:
    with db.read() as connection:
        found = connection.execute(select(Job.__table__).where(Job.id == job)).mappings().first()
        if found is None:
            return None
        attempts = connection.execute(
            select(Attempt.__table__).where(Attempt.job_id == job).order_by(Attempt.attempt)
        ).mappings()
        return JobHistory(job=found, attempts=list(attempts))


@dataclass(frozen=True, kw_only=True)
class RankedJobs:
    """Jobs with something to look at, the worst first, and what a page about them tells.

    jobs: their rows, with the last attempt's seed and ``scores``. left_out: how many found no
    room. scores: how many results lie in each twentieth from 0 to 1. sample: params of some of
    the submission's jobs, as JSON.
    """

    submission: RowMapping
    jobs: list[RowMapping]
    left_out: int
    scores: list[int]
    sample: list[str]


def rank_jobs(db: Database, submission: int, *, limit: int) -> RankedJobs | None:
    """Results by score, before them those for review; and before these the failed jobs.

    Failed jobs take at most a quarter of the room where results could fill it, so that one
    mistake in a manifest does not hide every picture; those that failed at a gate come first.
    None where there is no such submission.
    """
    of_it = Job.submission_id == submission
    shown = _with_attempt().where(of_it)
    at_a_gate = Job.error_code.startswith("gate_", autoescape=True)
    failed = shown.where(Job.state == "failed").order_by(at_a_gate.desc(), Job.id)
    results = shown.where(Job.state == "succeeded").order_by(
        Job.review.is_(None), Job.score.is_(None), Job.score, Job.id
    )
    ended = select(func.count()).where(of_it, Job.state.in_(("failed", "succeeded")))
    some = select(Job.params).where(of_it).order_by(Job.id).limit(SAMPLED)
    with db.read() as connection:
        query = select(Submission.__table__).where(Submission.id == submission)
        found = connection.execute(query).mappings().first()
        if found is None:
            return None
        good = connection.execute(results.limit(limit)).mappings().all()
        room = max(limit - len(good), limit // 4, 1)
        bad = connection.execute(failed.limit(room)).mappings().all()
        worst = [*bad, *good][:limit]
        return RankedJobs(
            submission=found,
            jobs=worst,
            left_out=connection.execute(ended).scalar_one() - len(worst),
            scores=_score_counts(connection, submission),
            sample=list(connection.execute(some).scalars()),
        )


def _with_attempt() -> Select[*tuple[Any, ...]]:
    """Jobs' rows, with what their last attempt used and found."""
    own = [column for column in Job.__table__.columns if column.name != "seed"]
    seed = func.coalesce(Attempt.seed, Job.seed).label("seed")
    return select(*own, seed, Attempt.scores).select_from(_and_last_attempt())


def _and_last_attempt() -> Join:
    last = and_(Attempt.job_id == Job.id, Attempt.attempt == Job.attempt)
    return outerjoin(Job.__table__, Attempt.__table__, last)


def _score_counts(connection: Connection, submission: int) -> list[int]:
    twentieth = cast(func.floor(Job.score * SCORE_BINS), Integer)
    query = (
        select(twentieth, func.count())
        .where(Job.submission_id == submission, Job.score.is_not(None))
        .group_by(twentieth)
    )
    counts = [0] * SCORE_BINS
    for place, count in connection.execute(query):
        counts[min(place, SCORE_BINS - 1)] += count
    return counts


JSON_COLUMNS = ("params", "timings", "inputs", "scores")
EXPORTED = (
    *("submission", "job", "line", "id", "state", "attempts", "image", "mask", "output"),
    *("engine", "engine_revision", "seed", "params", "priority", "error_code", "error_message"),
    *("image_sha256", "mask_sha256", "inputs", "result_sha256", "width", "height", "regions"),
    *("windows", "score", "review", "scores", "reseeds", "worker", "device", "memory_mode"),
    *("timings", "created_at", "started_at", "finished_at"),
)


def export_jobs(db: Database, selection: Selection) -> Iterator[dict[str, Any]]:
    """The audit: a record per job with its last attempt; streamed in pages of constant size."""
    last = 0
    while True:
        with db.read() as connection:
            rows = connection.execute(_page(selection, after=last)).mappings().all()
        if not rows:
            return
        for row in rows:
            yield _record(row)
        last = rows[-1]["job"]


def _page(selection: Selection, *, after: int, size: int = 1000) -> Select[*tuple[Any, ...]]:
    columns = (
        *(Job.submission_id.label("submission"), Job.id.label("job"), Job.line),
        *(Job.key.label("id"), Job.state, Job.attempt.label("attempts")),
        *(Job.image, Job.mask, Job.output, Job.engine, Attempt.engine_revision),
        *(
            func.coalesce(Attempt.seed, Job.seed).label("seed"),
            Job.params,
            Job.priority,
            Job.error_code,
            Job.error_message,
        ),
        *(Attempt.image_sha256, Attempt.mask_sha256, Attempt.inputs, Job.result_sha256),
        *(Attempt.width, Attempt.height, Attempt.regions, Attempt.windows),
        *(Job.score, Job.review, Attempt.scores, Attempt.reseeds),
        *(Attempt.worker, Attempt.device, Attempt.memory_mode, Attempt.timings),
        *(Job.created_at, Attempt.started_at, Job.finished_at),
    )
    chosen = (*selection.conditions(), Job.id > after)
    return (
        select(*columns)
        .select_from(_and_last_attempt())
        .where(*chosen)
        .order_by(Job.id)
        .limit(size)
    )


def _record(row: RowMapping) -> dict[str, Any]:
    record = {name: row[name] for name in EXPORTED}
    for name in JSON_COLUMNS:
        record[name] = json.loads(record[name]) if record[name] else None
    for name in ("created_at", "started_at", "finished_at"):
        record[name] = record[name].isoformat() if record[name] else None
    return record
