"""A failover of PostgreSQL: the primary becomes read-only, its standby becomes the primary."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from tests import servers
from tests.faults.postgres_proxy import PostgresProxy
from tests.faults.scenario import Catalog, Scenario, pause
from tests.workers.fleet import Fleet, wait_for

SUBMIT = "from producer.cli.submit import submit; submit()"
JOBS = "from producer.cli.jobs import jobs_command; jobs_command()"
COMMANDS = (
    [SUBMIT, "manifest.csv"],
    [JOBS, "retry", "--error", "object_missing"],
    [JOBS, "cancel", "--submission", "1"],
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A primary, its standby, and the address that clients use: the proxy."""

    primary: servers.Postgres
    standby: servers.Postgres
    proxy: PostgresProxy

    def demote(self) -> None:
        """Make the primary read-only; its connections stay open."""
        _query(self.primary, "ALTER SYSTEM SET default_transaction_read_only = on")
        _query(self.primary, "SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make the standby the primary, once it has everything, and send new connections to it."""
        end = _query(self.primary, "SELECT pg_current_wal_lsn()::text")
        caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{end}'::pg_lsn"
        wait_for(lambda: bool(_query(self.standby, caught_up)))
        assert _query(self.standby, "SELECT pg_promote()")
        self.proxy.redirect(self.standby.folder)


def _query(server: servers.Postgres, statement: str) -> Any:
    url = sqlalchemy.make_url(server.url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(), autocommit=True) as admin:
        cursor = admin.execute(statement)
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        folders = []
        for _ in range(3):
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="t-"))
            Path(name).chmod(0o755)
            folders.append(Path(name).resolve())
        primary = stack.enter_context(servers.postgres_server(folders[0]))
        standby = stack.enter_context(servers.postgres_server(folders[1], primary=primary))
        proxy = stack.enter_context(PostgresProxy(primary.folder, folders[2]).serving())
        yield Pair(primary=primary, standby=standby, proxy=proxy)


@pytest.fixture
def scenario(pair: Pair, catalog: Catalog, redis_url: str, tmp_path: Path) -> Iterator[Scenario]:
    created = sqlalchemy.make_url(servers.create_database(pair.primary.url))
    url = created.update_query_dict({"host": str(pair.proxy.folder)}).render_as_string()
    fleet = Fleet(url, redis_url, tmp_path.resolve())
    yield Scenario(fleet=fleet, catalog=catalog)
    fleet.close()


def test_workers_and_commands_go_on_after_a_failover_of_postgresql(
    scenario: Scenario, pair: Pair
) -> None:
    scenario.add(60, prompt="steps 20")
    for _ in range(2):
        scenario.fleet.start("--concurrency", "2")
    scenario.wait_for_successes(10)
    pair.demote()
    wait_for(lambda: scenario.fleet.log().count("read-only transaction; trying again") >= 2)
    for command in COMMANDS:
        _assert_one_line(scenario, command)
    pause(3)  # longer than a lease
    done = scenario.count("succeeded")
    pair.promote()
    # The test's own pool only reads, which works on the demoted server too.
    scenario.db.engine.dispose()
    scenario.finish()
    assert done < len(scenario.expected) - 10
    assert _query(pair.primary, CONNECTIONS) == 0
    scenario.assert_invariants()


CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'inpaint'"


def _assert_one_line(scenario: Scenario, command: list[str]) -> None:
    """The command says in one line that the database is read-only."""
    folder, catalog = scenario.fleet.folder, scenario.catalog
    manifest = f"image,mask,output\n{catalog.image(0)},{catalog.mask(0)},{folder}/new.png\n"
    (folder / "manifest.csv").write_text(manifest)
    result = subprocess.run(
        [sys.executable, "-P", "-c", *command],
        env={**scenario.fleet.environment, "INPAINT_ENGINE": "opencv"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, (command, result.stderr)
    (line,) = result.stderr.splitlines()
    assert "read-only transaction" in line, command
