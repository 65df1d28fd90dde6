"""Indexes for jobs by output, and for unfinished jobs that have an error."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TROUBLED = sa.text("error_code IS NOT NULL AND finished_at IS NULL")


def upgrade() -> None:
    # Hash: a path may be longer than a B-tree entry, and only equality is asked for.
    op.create_index("ix_jobs_output", "jobs", ["output"], postgresql_using="hash")
    op.create_index(
        "ix_jobs_troubled",
        "jobs",
        ["submission_id"],
        postgresql_where=TROUBLED,
        sqlite_where=TROUBLED,
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_troubled", "jobs")
    op.drop_index("ix_jobs_output", "jobs")
