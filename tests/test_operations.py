"""docs/operations.md: its commands and queries run, its units start our commands."""

from __future__ import annotations

import os
import re
import shlex
import sqlite3
import subprocess
import sys
from configparser import RawConfigParser
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

import shared.errors
from producer.cli.submit import submit
from shared.db import Database
from shared.db.models import STATES
from tests import servers
from tests.job_table import JobTable
from tests.producer.workspace import Workspace
from workers.supervisor import worker

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text()
LOGGED = tuple(
    f"workers/{name}.py" for name in ("job_runner", "maintenance", "pending_writes", "supervisor")
)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"<!-- run: {kind} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)


def commands(kind: str) -> list[list[str]]:
    lines = "\n".join(blocks(kind)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_and_query_is_run_by_a_test() -> None:
    marked = sum(len(blocks(kind)) for kind in ("operations", "restore", "sqlite", "queries"))
    assert marked == len(re.findall(r"^```(?:sh|sql)$", TEXT, re.MULTILINE))


@pytest.fixture
def workspace(
    tmp_path: Path, postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A folder of an operator, with the fleet's database and Redis in the environment."""
    plain = make_url(postgres_url).set(drivername="postgresql")
    tools = f"{servers.postgres_tools()}:{os.environ['PATH']}"
    for name, value in {
        "INPAINT_DATABASE_URL": postgres_url,
        "INPAINT_BROKER_URL": redis_url,
        "PG": plain.render_as_string(hide_password=False),
        "PATH": tools,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path)
    run(workspace, ["inpaint-jobs", "upgrade"])
    return workspace


def run(workspace: Workspace, command: list[str]) -> None:
    """Runs a command with its variables expanded, as a shell does."""
    program, *arguments = (os.path.expandvars(word) for word in command)
    if program == "inpaint-jobs":
        result = workspace.jobs(*arguments)
        assert result.status == 0, result.err
    else:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_commands_run_as_written_and_a_backup_is_restored(
    workspace: Workspace, tmp_path: Path, postgres_url: str
) -> None:
    with closing(Database(make_url(postgres_url))) as database:
        table = JobTable(database)
        ids = table.add(3)
        table.succeed(ids[0])
        table.cancel(ids[1])
        for command in commands("operations"):
            run(workspace, command)
        assert (tmp_path / "inpaint.dump").stat().st_size > 0
        table.set(ids[2], state="failed", finished_at=datetime.now(UTC), error_code="lost_since")
        for command in commands("restore"):
            run(workspace, command)
        assert table.states() == ["cancelled"] * 3
        assert len(table.attempts(ids[0])) == 1


def test_a_sqlite_file_is_copied_completely(tmp_path: Path, migrated_file: Path) -> None:
    (tmp_path / ".inpaint").mkdir()
    (tmp_path / ".inpaint" / "inpaint.db").write_bytes(migrated_file.read_bytes())
    ((_, *arguments),) = commands("sqlite")
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    copy = sqlite3.connect(tmp_path / "backup.db")
    assert copy.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    copy.close()


def test_the_queries_run_on_both_databases(db: Database) -> None:
    (block,) = blocks("queries")
    queries = [query for query in block.split(";") if query.strip()]
    assert len(queries) == 6
    table = JobTable(db)
    table.run(table.add_one(), lease=-3600)
    for query in queries:
        with db.read() as connection:
            rows = list(connection.exec_driver_sql(query))
        if "lease_expires_at" in query:
            assert len(rows) == 1


def test_every_state_is_explained_and_every_code_and_log_line_exists() -> None:
    states = TEXT.partition("## What each state means")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", states, re.MULTILINE)) == set(STATES)
    codes = {error.code for error in vars(shared.errors).values() if isinstance(error, type)}
    assert set(re.findall(r"--error ([a-z_]+)", TEXT)) <= codes
    source = "".join((ROOT / path).read_text() for path in LOGGED)
    log_lines = TEXT.partition("need attention")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| `([^`]+)` \|", log_lines, re.MULTILINE):
        for part in re.split(r" N |; now \w+$", line):
            assert part.strip() in source, part


@pytest.mark.parametrize(
    ("unit", "command"), [("inpaint-worker", worker), ("inpaint-submit", submit)]
)
def test_a_unit_starts_one_of_our_commands_with_options_that_exist(
    unit: str, command: object
) -> None:
    service = parse_unit(f"{unit}.service")["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert Path(program).name == unit
    assert command.make_context(unit, list(arguments))  # type: ignore[attr-defined]
    assert service["User"] == "inpaint"
    assert service["EnvironmentFile"].startswith("/etc/inpaint/")


def test_the_timer_starts_the_unit_of_its_name_every_night() -> None:
    timer = parse_unit("inpaint-submit.timer")
    assert timer["Timer"]["OnCalendar"] == "*-*-* 02:00:00"
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert (ROOT / "docker" / "inpaint-submit.service").is_file()


def parse_unit(name: str) -> RawConfigParser:
    parser = RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((ROOT / "docker" / name).read_text())
    return parser
