"""Heartbeats and reaping: whose leases they touch, and with which connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import text

from shared import jobs
from shared.errors import DatabaseUnavailable
from shared.jobs import Holder
from tests.workers.fleet import Fleet, wait_for
from tests.workers.worker_harness import WorkerHarness
from workers.lease_watch import LeaseWatch
from workers.maintenance import reap_abandoned_leases, renew_leases
from workers.worker_process import JOB_CONNECTIONS, MAINTENANCE_CONNECTIONS


@pytest.fixture
def harness(database_url: str, tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(database_url, tmp_path.resolve())
    yield harness
    harness.close()


def lease_a_job(harness: WorkerHarness, worker: str) -> int:
    """A job whose lease has expired, as after a jump of the clock."""
    image = harness.write_image("in.png", (8, 8))
    job = harness.add(image=image, mask=image, output=harness.path(f"{worker}.png"))
    holder = Holder(worker=worker, device="cpu", engine_revision="1")
    harness.dispatch()
    jobs.acquire(harness.db, job=job, seen_attempt=0, holder=holder, lease_seconds=-600)
    return job


def test_a_worker_reaps_others_that_do_not_renew_and_never_itself(harness: WorkerHarness) -> None:
    own = lease_a_job(harness, harness.worker.holder.worker)
    other = lease_a_job(harness, "other")
    watch = LeaseWatch(lease_seconds=0, max_gap_seconds=1)
    reap_abandoned_leases(harness.worker, watch)
    assert (harness.job(own).state, harness.job(other).state) == ("running", "pending")


def test_an_expired_lease_is_kept_until_it_was_watched_for_its_length(
    harness: WorkerHarness,
) -> None:
    other = lease_a_job(harness, "other")
    watch = LeaseWatch(lease_seconds=60, max_gap_seconds=1)
    for _ in range(3):
        reap_abandoned_leases(harness.worker, watch)
    assert (harness.job(other).state, harness.job(other).losses) == ("running", 0)


def test_leases_are_not_watched_on_a_read_only_server(postgres_url: str, tmp_path: Path) -> None:
    harness = WorkerHarness(postgres_url, tmp_path.resolve())
    lease_a_job(harness, "other")
    with harness.db.write() as connection:
        name = harness.db.url.database
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    harness.maintenance_db.close()
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        jobs.running_leases(harness.maintenance_db, except_of="me")
    harness.close()


def test_heartbeats_and_reaping_work_while_job_threads_hold_every_connection(
    harness: WorkerHarness,
) -> None:
    other = lease_a_job(harness, "other")
    own = lease_a_job(harness, harness.worker.holder.worker)
    harness.worker.active_jobs.may_have_orphans = True
    with ExitStack() as stack:
        for _ in range(harness.db.engine.pool.size()):  # type: ignore[attr-defined]
            stack.enter_context(harness.db.read())
        renew_leases(harness.worker)
        reap_abandoned_leases(harness.worker, LeaseWatch(lease_seconds=0, max_gap_seconds=1))
    assert harness.job(own).worker is None  # an orphan: released
    assert harness.job(other).losses == 1


def test_a_worker_process_opens_at_most_the_documented_connections(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    fleet = Fleet(postgres_url, redis_url, tmp_path.resolve())
    fleet.add(300, size=(16, 16))
    counts = []
    count = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'inpaint'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    # The supervisor closes its connection; the harness has closed its own.
    fleet.harness.close()
    fleet.start("--concurrency", "64")

    def is_done() -> bool:
        with fleet.harness.db.read() as connection:
            counts.append(connection.exec_driver_sql(count).scalar_one())
            left = "SELECT count(*) FROM jobs WHERE state <> 'succeeded'"
            return connection.exec_driver_sql(left).scalar_one() == 0

    wait_for(is_done, seconds=120)
    fleet.close()
    limit = JOB_CONNECTIONS + MAINTENANCE_CONNECTIONS
    assert MAINTENANCE_CONNECTIONS < max(counts) <= limit
    documented = Path("docs/operations.md").read_text()
    assert f"up to {limit} connections" in documented
