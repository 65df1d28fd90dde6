"""PostgreSQL that restarts, stays down, or loses connections at any statement."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from shared.db.models import FINAL_STATES
from shared.errors import DatabaseUnavailable
from tests import servers
from tests.faults.postgres_proxy import PostgresProxy
from tests.faults.scenario import Catalog, Scenario, pause
from tests.workers.fleet import Fleet, wait_for
from tests.workers.worker_harness import WorkerHarness
from workers import maintenance
from workers.job_runner import run_job


@pytest.fixture(scope="module")
def cluster() -> Iterator[servers.Postgres]:
    """A PostgreSQL that the tests may stop and start."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        Path(name).chmod(0o755)
        with servers.postgres_server(Path(name).resolve()) as cluster:
            yield cluster


@pytest.fixture
def pg_scenario(
    cluster: servers.Postgres, catalog: Catalog, redis_url: str, tmp_path: Path
) -> Iterator[Scenario]:
    url = servers.create_database(cluster.url)
    fleet = Fleet(url, redis_url, tmp_path.resolve())
    scenario = Scenario(fleet=fleet, catalog=catalog)
    fleet.start("--concurrency", "4")
    yield scenario
    fleet.close()
    servers.drop_database(url)


def test_jobs_survive_restarts_outages_and_lost_connections_of_postgresql(
    pg_scenario: Scenario, cluster: servers.Postgres
) -> None:
    scenario = pg_scenario
    for seconds in (0, 4):  # a restart, and an outage longer than every lease
        scenario.add(60, prompt="steps 4")
        scenario.wait_for_successes(len(scenario.expected) - 50)
        cluster.stop()
        pause(seconds)
        cluster.start()
        scenario.finish(retry=["worker_lost"])
    scenario.add(60, prompt="steps 4")
    _cut_connections(scenario)
    scenario.finish(retry=["worker_lost", "database_unavailable"])
    scenario.assert_invariants()


def _cut_connections(scenario: Scenario) -> None:
    """Terminates a third of the connections, repeatedly, until the last job is final."""
    url = sqlalchemy.make_url(str(scenario.fleet.environment["INPAINT_DATABASE_URL"]))
    plain = url.set(drivername="postgresql", database="postgres")
    with psycopg.connect(plain.render_as_string(), autocommit=True) as admin:
        while not _is_done(scenario):
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = %s AND application_name = 'inpaint' AND random() < 0.3",
                (url.database,),
            )
            pause(0.1)


def _is_done(scenario: Scenario) -> bool:
    with suppress(DatabaseUnavailable):
        return scenario.count(*FINAL_STATES) == len(scenario.expected)
    return False


# --- a lost connection at each statement of a job -----------------------------------------------

STATEMENTS = 40


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_lost_at_any_statement_of_a_job_ends_in_one_result(
    cluster: servers.Postgres, catalog: Catalog, tmp_path: Path, when: str
) -> None:
    """The worker's steps run in this process, so that the test can count the statements."""
    url = servers.create_database(cluster.url)
    harness = WorkerHarness(url, tmp_path.resolve())
    image, mask = (
        harness.write_image("in.png", (40, 40)),
        harness.write_mask("mask.png", (40, 40), (5, 5, 9, 9)),
    )
    with (
        tempfile.TemporaryDirectory(prefix="t-") as name,
        PostgresProxy(cluster.folder, Path(name)).serving() as proxy,
    ):
        through = sqlalchemy.make_url(url).update_query_dict({"host": name})
        proxied = WorkerHarness(through.render_as_string(), tmp_path.resolve())
        fault_count = 0
        for number in range(1, STATEMENTS):
            job = harness.add(image=image, mask=mask, output=harness.path(f"out/{number}.png"))
            fault_count += _run_with_a_cut(proxied, harness, proxy, job, number, when)
            assert _outcomes(harness, job)[-1] == "succeeded", f"cut {when} statement {number}"
            assert (harness.job(job).losses, harness.job(job).failures) == (0, 0)
        proxied.close()
    harness.close()
    servers.drop_database(url)
    assert 10 < fault_count < STATEMENTS - 1, "a job has more statements than this test cuts"


def _run_with_a_cut(
    proxied: WorkerHarness,
    harness: WorkerHarness,
    proxy: PostgresProxy,
    job: int,
    number: int,
    when: str,
) -> bool:
    """Delivers messages until the job is final, as a fleet would; True if a connection was cut."""
    seen = {message.job: message.attempt for message in harness.dispatch()}[job]
    proxy.cut_at(number, when)  # type: ignore[arg-type]
    for _ in range(10):
        run_job(proxied.worker, job=job, seen_attempt=seen)
        maintenance.renew_leases(proxied.worker)
        if harness.job(job).state in FINAL_STATES:
            break
        wait_for(lambda: bool(messages := harness.dispatch()) or bool(messages))
        seen = harness.job(job).attempt
    cut = bool(proxy.cuts)
    proxy.cut_at(10**9, "before")
    return cut


def _outcomes(harness: WorkerHarness, job: int) -> list[str]:
    return [attempt.outcome for attempt in harness.attempts(job)]
