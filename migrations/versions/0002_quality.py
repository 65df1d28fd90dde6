"""Columns for quality scores, reviews, further inputs, reseeds and memory mode."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

JOBS: tuple[tuple[str, Any], ...] = (("score", sa.Double()), ("review", sa.String(40)))
ATTEMPTS: tuple[tuple[str, Any], ...] = (
    ("inputs", sa.Text()),
    ("scores", sa.Text()),
    ("reseeds", sa.Integer()),
    ("memory_mode", sa.Text()),
)


def upgrade() -> None:
    for table, columns in (("jobs", JOBS), ("attempts", ATTEMPTS)):
        for name, kind in columns:
            op.add_column(table, sa.Column(name, kind))
    where = sa.text("review IS NOT NULL")
    op.create_index(
        "ix_jobs_review", "jobs", ["submission_id"], postgresql_where=where, sqlite_where=where
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_review", "jobs")
    for table, columns in (("jobs", JOBS), ("attempts", ATTEMPTS)):
        for name, _ in columns:
            op.drop_column(table, name)
