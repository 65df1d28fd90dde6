"""The job table on both kinds of database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import make_url

from shared import schema
from shared.db import Database
from tests.job_table import JobTable


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """Our empty tables; the test runs once on SQLite and once on PostgreSQL."""
    database = Database(make_url(database_url))
    schema.upgrade(database)
    yield database
    database.close()


@pytest.fixture
def table(db: Database) -> JobTable:
    return JobTable(db)
