"""Short ways through a job's life, on both kinds of database."""

from __future__ import annotations

import pytest

from shared.db import Database
from tests.job_table import JobTable


@pytest.fixture
def table(db: Database) -> JobTable:
    return JobTable(db)
