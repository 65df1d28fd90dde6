"""The first tables: submissions, jobs and attempts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
INSTANT = sa.DateTime(timezone=True)
FINAL = "state IN ('succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    _submissions()
    _jobs()
    _job_indexes()
    _attempts()


def downgrade() -> None:
    op.drop_table("attempts")
    op.drop_table("jobs")
    op.drop_table("submissions")


def _submissions() -> None:
    op.create_table(
        "submissions",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("invalid", sa.Integer(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("recorded_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_submissions"),
        sa.UniqueConstraint("digest", name="uq_submissions_digest"),
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("submission_id", BIG_ID, nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text()),
        sa.Column("content_key", sa.LargeBinary(16), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("mask", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("params", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(9), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("losses", sa.Integer(), nullable=False),
        sa.Column("run_after", INSTANT, nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("lease_expires_at", INSTANT),
        sa.Column("error_code", sa.String(40)),
        sa.Column("error_message", sa.Text()),
        sa.Column("image_version", sa.Text()),
        sa.Column("mask_version", sa.Text()),
        sa.Column("output_version", sa.Text()),
        sa.Column("result_sha256", sa.String(64)),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("queued_at", INSTANT),
        sa.Column("finished_at", INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.ForeignKeyConstraint(
            ["submission_id"], ["submissions.id"], name="fk_jobs_submission_id"
        ),
        sa.UniqueConstraint("submission_id", "line", name="uq_jobs_submission_id_line"),
        sa.UniqueConstraint("content_key", name="uq_jobs_content_key"),
        sa.CheckConstraint(
            "state IN ('pending', 'queued', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state"),
        ),
        sa.CheckConstraint(
            "(state = 'running') = (lease_expires_at IS NOT NULL)", name=op.f("ck_jobs_lease")
        ),
        sa.CheckConstraint(f"({FINAL}) = (finished_at IS NOT NULL)", name=op.f("ck_jobs_finished")),
        sa.CheckConstraint(
            "attempt >= 0 AND failures >= 0 AND losses >= 0", name=op.f("ck_jobs_counts")
        ),
    )


def _job_indexes() -> None:
    op.create_index("ix_jobs_submission_id_state", "jobs", ["submission_id", "state"])
    _partial("ix_jobs_due", ["engine", sa.text("priority DESC"), "id"], state="pending")
    _partial("ix_jobs_queued", ["engine", "priority"], state="queued")
    _partial("ix_jobs_leases", ["lease_expires_at"], state="running")


def _partial(name: str, columns: list[str | sa.TextClause], *, state: str) -> None:
    where = sa.text(f"state = '{state}'")
    op.create_index(name, "jobs", columns, postgresql_where=where, sqlite_where=where)


def _attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("job_id", BIG_ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("engine_revision", sa.Text(), nullable=False),
        sa.Column("params", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("finished_at", INSTANT),
        sa.Column("outcome", sa.String(9)),
        sa.Column("error_code", sa.String(40)),
        sa.Column("error_message", sa.Text()),
        sa.Column("image_sha256", sa.String(64)),
        sa.Column("mask_sha256", sa.String(64)),
        sa.Column("result_sha256", sa.String(64)),
        sa.Column("image_version", sa.Text()),
        sa.Column("mask_version", sa.Text()),
        sa.Column("width", sa.Integer()),
        sa.Column("height", sa.Integer()),
        sa.Column("regions", sa.Integer()),
        sa.Column("windows", sa.Integer()),
        sa.Column("timings", sa.Text()),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_attempts"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_attempts_job_id"),
        sa.CheckConstraint(
            "outcome IS NULL OR outcome IN "
            "('succeeded', 'failed', 'retried', 'released', 'lost', 'cancelled')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.CheckConstraint(
            "(outcome IS NULL) = (finished_at IS NULL)", name=op.f("ck_attempts_finished")
        ),
    )
