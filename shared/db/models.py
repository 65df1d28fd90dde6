"""The tables: submissions, jobs, attempts.

A job's state is one of

    pending    waiting for dispatch, not before ``run_after``
    queued     dispatched: a message for it was published, or is about to be
    running    leased to ``worker`` until ``lease_expires_at``
    succeeded  its result is published
    failed     not retried unless a user asks for it
    cancelled  by a user, or because another submission took its output over

``shared.jobs`` lists the transitions and is the only code that makes them. The CHECK
constraints below hold the same invariants against everything else that writes here.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    desc,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

STATES = ("pending", "queued", "running", "succeeded", "failed", "cancelled")
FINAL_STATES = ("succeeded", "failed", "cancelled")
_OWNS_OUTPUT = (
    "state NOT IN ('failed', 'cancelled') "
    "AND (error_code IS NULL OR error_code <> 'output_replaced')"
)
OUTCOMES = ("succeeded", "failed", "retried", "released", "lost", "cancelled")


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware datetime in UTC.

    SQLite stores it as text without a zone, so the zone is added on the way out.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


# SQLite generates ids only for a column of type INTEGER PRIMARY KEY, which is 64-bit there.
BigId = BigInteger().with_variant(Integer(), "sqlite")


class Base(DeclarativeBase):
    # Alembic can only drop constraints by name, so each gets a predictable one.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, str: Text, int: Integer}


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Submission(Base):
    """One run of a manifest.

    digest: SHA-256 of the manifest's location and the rows as resolved; the same manifest
    submitted again is the same submission. recorded_at: when the last row got its job; None
    until then.
    """

    __tablename__ = "submissions"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    manifest: Mapped[str]
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    options: Mapped[str]
    rows: Mapped[int]
    invalid: Mapped[int]
    created_at: Mapped[datetime]
    recorded_at: Mapped[datetime | None]


class Job(Base):
    """One row of a manifest: one image.

    key: the user's own id of the row. content_key: equal for rows that ask for the same work.
    params: canonical JSON of all parameters but the seed. attempt: how many leases there were;
    part of the fencing token. failures: attempts that ended in an error. losses: attempts
    whose worker was lost. *_version: the storage's version of the object, when last read or
    written. score: of the last result, 0 to 1. review: code of the quality gate that asks a
    person to look at it.
    """

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    submission_id: Mapped[int] = mapped_column(ForeignKey("submissions.id"))
    line: Mapped[int]
    key: Mapped[str | None]
    content_key: Mapped[bytes] = mapped_column(LargeBinary(16), unique=True)
    engine: Mapped[str]
    image: Mapped[str]
    mask: Mapped[str]
    output: Mapped[str]
    params: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(default=0)

    state: Mapped[str] = mapped_column(String(9))
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    losses: Mapped[int] = mapped_column(default=0)
    run_after: Mapped[datetime]
    cancel_requested: Mapped[bool] = mapped_column(server_default=false())
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_message: Mapped[str | None]
    image_version: Mapped[str | None]
    mask_version: Mapped[str | None]
    output_version: Mapped[str | None]
    result_sha256: Mapped[str | None] = mapped_column(String(64))
    score: Mapped[float | None]
    review: Mapped[str | None] = mapped_column(String(40))
    created_at: Mapped[datetime]
    queued_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("submission_id", "line"),
        CheckConstraint(_one_of("state", STATES), name="state"),
        # No lease without a running job, and no running job that cannot expire.
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="lease"),
        CheckConstraint(
            f"({_one_of('state', FINAL_STATES)}) = (finished_at IS NOT NULL)", name="finished"
        ),
        CheckConstraint("attempt >= 0 AND failures >= 0 AND losses >= 0", name="counts"),
        Index("ix_jobs_submission_id_state", "submission_id", "state"),
        # One owner per output: a job that may still write it, or has written it. PostgreSQL's
        # unique indexes are B-trees, and a path may be longer than a B-tree entry; an exclusion
        # constraint can use a hash index.
        ExcludeConstraint(
            ("output", "="), name="uq_jobs_owned_output", using="hash", where=text(_OWNS_OUTPUT)
        ).ddl_if(dialect="postgresql"),
        Index(
            "uq_jobs_owned_output", "output", unique=True, sqlite_where=text(_OWNS_OUTPUT)
        ).ddl_if(dialect="sqlite"),
        # Partial indexes, here and below: they list few rows compared with the finished ones.
        Index(
            "ix_jobs_troubled",
            "submission_id",
            postgresql_where=text("error_code IS NOT NULL AND finished_at IS NULL"),
            sqlite_where=text("error_code IS NOT NULL AND finished_at IS NULL"),
        ),
        # In the order of dispatch, so that it reads only as many rows as it queues.
        Index(
            "ix_jobs_due",
            "engine",
            desc("priority"),
            "id",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        Index(
            "ix_jobs_queued",
            "engine",
            "priority",
            postgresql_where=text("state = 'queued'"),
            sqlite_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_leases",
            "lease_expires_at",
            postgresql_where=text("state = 'running'"),
            sqlite_where=text("state = 'running'"),
        ),
        Index(
            "ix_jobs_review",
            "submission_id",
            postgresql_where=text("review IS NOT NULL"),
            sqlite_where=text("review IS NOT NULL"),
        ),
    )


class Attempt(Base):
    """One lease of a job by a worker, and its outcome (None while it runs).

    inputs: JSON, location to SHA-256 of the files read besides image and mask. scores: JSON,
    the quality gates' metrics. reseeds: how often a gate asked for another seed; ``seed`` is
    the last one. memory_mode: how the engine adapted to too little memory, if it did. The
    other columns are as in ``shared.jobs.AttemptRecord``.
    """

    __tablename__ = "attempts"

    job_id: Mapped[int] = mapped_column(BigId, ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]
    device: Mapped[str]
    engine: Mapped[str]
    engine_revision: Mapped[str]
    params: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(9))
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_message: Mapped[str | None]
    image_sha256: Mapped[str | None] = mapped_column(String(64))
    mask_sha256: Mapped[str | None] = mapped_column(String(64))
    result_sha256: Mapped[str | None] = mapped_column(String(64))
    image_version: Mapped[str | None]
    mask_version: Mapped[str | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    regions: Mapped[int | None]
    windows: Mapped[int | None]
    timings: Mapped[str | None]
    inputs: Mapped[str | None]
    scores: Mapped[str | None]
    reseeds: Mapped[int | None]
    memory_mode: Mapped[str | None]

    __table_args__ = (
        CheckConstraint(f"outcome IS NULL OR {_one_of('outcome', OUTCOMES)}", name="outcome"),
        CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name="finished"),
    )
