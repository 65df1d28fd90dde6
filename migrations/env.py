"""Alembic's entry point: runs in the caller's transaction, one process at a time."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from shared.db.models import Base

_LOCK = 4_770_112_358  # an arbitrary constant: the key of the advisory lock


def _run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # DDL waits for running transactions and blocks new ones behind it: not for long.
        connection.execute(text("SET LOCAL lock_timeout = '30s'"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_server_default=False,
        include_object=_is_comparable,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    context.run_migrations()


def _is_comparable(_item: object, name: str | None, kind: str, *_: object) -> bool:
    # SQLite does not report the direction of an index's columns, so ``priority DESC`` always
    # looks changed there. PostgreSQL has an exclusion constraint, which Alembic does not compare,
    # in place of the index of that name.
    is_sqlite = context.get_context().dialect.name == "sqlite"
    incomparable = "ix_jobs_due" if is_sqlite else "uq_jobs_owned_output"
    return not (kind == "index" and name == incomparable)


_run(context.config.attributes["connection"])
