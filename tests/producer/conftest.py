"""An empty folder to work in, no INPAINT_ variables, and a Redis that only this test uses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.settings import PREFIX
from tests.job_table import JobTable
from tests.producer.workspace import Workspace


@pytest.fixture
def workspace(
    tmp_path: Path, redis_url: str, migrated_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    folder = tmp_path.resolve() / "workspace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("INPAINT_BROKER_URL", redis_url)
    monkeypatch.setenv("INPAINT_ENGINE", "opencv")
    monkeypatch.setenv("COLUMNS", "200")
    (folder / ".inpaint").mkdir()
    shutil.copy(migrated_file, folder / ".inpaint")
    return Workspace(folder)


@pytest.fixture
def table(workspace: Workspace) -> Iterator[JobTable]:
    """The workspace's own tables."""
    table = workspace.table()
    yield table
    table.db.close()
