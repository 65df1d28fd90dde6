"""One owner per output, by a constraint."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

NAME = "uq_jobs_owned_output"
OWNS_OUTPUT = (
    "{0}state NOT IN ('failed', 'cancelled') "
    "AND ({0}error_code IS NULL OR {0}error_code <> 'output_replaced')"
)
# Of several owners the newest job stays, as if it had been submitted with --force.
SUPERSEDE = """
UPDATE jobs SET
    state = CASE WHEN state IN ('pending', 'queued') THEN 'cancelled' ELSE state END,
    finished_at = CASE WHEN state IN ('pending', 'queued') THEN {now} ELSE finished_at END,
    cancel_requested = (cancel_requested OR state = 'running'),
    error_code = 'output_replaced',
    error_message = 'a newer job writes this output (found when the tables were upgraded)'
WHERE {owns} AND EXISTS (
    SELECT 1 FROM jobs AS newer
    WHERE newer.output = jobs.output AND newer.id > jobs.id AND {newer_owns}
)
"""


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    owns, newer_owns = OWNS_OUTPUT.format(""), OWNS_OUTPUT.format("newer.")
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'" if is_sqlite else "statement_timestamp()"
    statement = SUPERSEDE.format(now=now, owns=owns, newer_owns=newer_owns)
    # The driver directly: a colon would be a parameter of sa.text.
    op.get_bind().exec_driver_sql(statement.replace("%", "%%") if not is_sqlite else statement)
    op.drop_index("ix_jobs_output", "jobs")
    if is_sqlite:
        op.create_index(NAME, "jobs", ["output"], unique=True, sqlite_where=sa.text(owns))
    else:
        # A path may be longer than an entry of a B-tree, and a unique index is always one.
        op.create_exclude_constraint(
            NAME, "jobs", ("output", "="), using="hash", where=sa.text(owns)
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.drop_index(NAME, "jobs")
    else:
        op.drop_constraint(NAME, "jobs")
    op.create_index("ix_jobs_output", "jobs", ["output"], postgresql_using="hash")
