"""PostgreSQL that restarts, stays away, or cuts the connection at any statement."""

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
from tests.faults.site import Catalog, Site, pause
from tests.workers.fleet import Fleet, wait_for
from tests.workers.worker_harness import WorkerHarness
from workers import maintenance
from workers.job_runner import run_job


@pytest.fixture(scope="module")
def cluster() -> Iterator[servers.Postgres]:
    """One to stop and start."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        Path(name).chmod(0o755)
        with servers.postgres_server(Path(name).resolve()) as cluster:
            yield cluster


@pytest.fixture
def pg_site(
    cluster: servers.Postgres, catalog: Catalog, redis_url: str, tmp_path: Path
) -> Iterator[Site]:
    url = servers.create_database(cluster.url)
    fleet = Fleet(url, redis_url, tmp_path.resolve())
    site = Site(fleet=fleet, catalog=catalog)
    fleet.start("--concurrency", "4")
    yield site
    fleet.close()
    servers.drop_database(url)


def test_postgresql_may_restart_stay_away_and_cut_connections(
    pg_site: Site, cluster: servers.Postgres
) -> None:
    site = pg_site
    for seconds in (0, 4):  # at once, and past every lease
        site.add(60, prompt="steps 4")
        site.await_some(len(site.expected) - 50)
        cluster.stop()
        pause(seconds)
        cluster.start()
        site.finish(retry=["worker_lost"])
    site.add(60, prompt="steps 4")
    _cut_connections(site)
    site.finish(retry=["worker_lost", "database_unavailable"])
    site.check()


def _cut_connections(site: Site) -> None:
    """A third of them, many times, until the last job is done."""
    url = sqlalchemy.make_url(str(site.fleet.environment["INPAINT_DATABASE_URL"]))
    plain = url.set(drivername="postgresql", database="postgres")
    with psycopg.connect(plain.render_as_string(), autocommit=True) as admin:
        while not _is_done(site):
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = %s AND application_name = 'inpaint' AND random() < 0.3",
                (url.database,),
            )
            pause(0.1)


def _is_done(site: Site) -> bool:
    with suppress(DatabaseUnavailable):
        return site.count(*FINAL_STATES) == len(site.expected)
    return False


# --- every statement of a job in turn -------------------------------------------------------

STATEMENTS = 40


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_at_any_statement_of_a_job_ends_in_one_result(
    cluster: servers.Postgres, catalog: Catalog, tmp_path: Path, when: str
) -> None:
    """A worker's own steps, in this process, so that each statement can be met."""
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
        met = 0
        for number in range(1, STATEMENTS):
            job = harness.add(image=image, mask=mask, output=harness.path(f"out/{number}.png"))
            met += _run_with_a_cut(proxied, harness, proxy, job, number, when)
            assert _story(harness, job)[-1] == "succeeded", f"cut {when} statement {number}"
            assert (harness.job(job).losses, harness.job(job).failures) == (0, 0)
        proxied.close()
    harness.close()
    servers.drop_database(url)
    assert 10 < met < STATEMENTS - 1, "a job has more statements than this test meets"


def _run_with_a_cut(
    proxied: WorkerHarness,
    harness: WorkerHarness,
    proxy: PostgresProxy,
    job: int,
    number: int,
    when: str,
) -> bool:
    """Message after message until the job is done, as a fleet would; was a connection cut?"""
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


def _story(harness: WorkerHarness, job: int) -> list[str]:
    return [attempt.outcome for attempt in harness.attempts(job)]
