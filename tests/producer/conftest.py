"""A desk to work at: an empty folder, our variables clean, a Redis of the test's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.settings import PREFIX
from tests.job_table import JobTable
from tests.producer.desk import Desk


@pytest.fixture
def desk(
    tmp_path: Path, redis_url: str, migrated_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Desk:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    folder = tmp_path.resolve() / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("INPAINT_BROKER_URL", redis_url)
    monkeypatch.setenv("INPAINT_ENGINE", "opencv")
    monkeypatch.setenv("COLUMNS", "200")
    (folder / ".inpaint").mkdir()
    shutil.copy(migrated_file, folder / ".inpaint")
    return Desk(folder)


@pytest.fixture
def table(desk: Desk) -> Iterator[JobTable]:
    """The desk's own tables."""
    table = desk.table()
    yield table
    table.db.close()
