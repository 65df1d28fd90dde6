"""Which of PostgreSQL's errors mean that the database is unavailable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg.errors
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from shared.db import Database, sqlstates
from shared.errors import DatabaseUnavailable

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Database]:
    database = Database(make_url(postgres_url))
    yield database
    database.close()


def _raise_error(db: Database, sqlstate: str) -> None:
    with db.write() as connection:
        connection.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$")


def test_every_class_that_the_driver_knows_is_mapped() -> None:
    states = [getattr(error, "sqlstate", None) for error in vars(psycopg.errors).values()]
    known = {state for state in states if isinstance(state, str)}
    assert len(known) > 200
    mapped = {*sqlstates.UNAVAILABLE_CLASSES, *sqlstates.STATEMENT_CLASSES}
    assert {sqlstate[:2] for sqlstate in known} <= mapped
    assert not sqlstates.STATEMENT_CLASSES & sqlstates.UNAVAILABLE_CLASSES.keys()


def test_the_documents_list_every_code_that_means_unavailable_with_its_cause() -> None:
    rows = re.findall(r"^\| (?:class )?`(\w+)` \| (.*?) \| `data", OPERATIONS.read_text(), re.M)
    assert dict(rows) == sqlstates.UNAVAILABLE_CLASSES | sqlstates.UNAVAILABLE_CODES


def test_a_real_error_of_each_class_is_unavailable_or_the_statement_s(postgres: Database) -> None:
    classes = sqlstates.UNAVAILABLE_CLASSES
    for sqlstate in [*sqlstates.UNAVAILABLE_CODES, *(f"{name}000" for name in classes)]:
        with pytest.raises(DatabaseUnavailable):
            _raise_error(postgres, sqlstate)
    for name in sqlstates.STATEMENT_CLASSES - {"00", "01", "02"}:  # these three are no errors
        with pytest.raises(DBAPIError):
            _raise_error(postgres, f"{name}000")


def test_a_read_only_server_loses_every_connection_of_the_pool(postgres: Database) -> None:
    before = _two_backends(postgres)
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        _write_read_only(postgres)
    after = _two_backends(postgres)
    assert len(before) == len(after) == 2
    assert not before & after


def _two_backends(db: Database) -> set[int]:
    """The server processes of two connections of the pool."""
    backend = "SELECT pg_backend_pid()"
    with db.read() as first, db.read() as second:
        return {connection.exec_driver_sql(backend).scalar_one() for connection in (first, second)}


def _write_read_only(db: Database) -> None:
    with db.write() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql("CREATE TABLE refused ()")
