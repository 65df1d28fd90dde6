"""A disk that is full: the worker pauses, says so, and goes on."""

from __future__ import annotations

from pathlib import Path

from shared.db.models import Job
from tests.faults.site import Site, pause
from tests.workers.fleet import wait_for
from workers.pending_writes import MAX_RESULTS


def test_a_full_disk_pauses_the_worker_until_there_is_room(site: Site) -> None:
    switch = site.fleet.folder / "the disk is full"
    site.fleet.environment["FAULTS_FULL_DISK"] = str(switch)
    site.add(80)
    site.fleet.start("--concurrency", "2")
    site.await_some(5)
    switch.touch()
    wait_for(lambda: "No space left on device" in site.fleet.log())
    wait_for(lambda: _paused(site) == MAX_RESULTS + 2)
    done = site.count("succeeded")
    pause(1)
    assert (site.count("succeeded"), _paused(site)) == (done, MAX_RESULTS + 2)
    switch.unlink()
    site.finish()
    assert "written after retrying" in site.fleet.log()
    assert [len(site.fleet.harness.attempts(job)) for job in site.expected] == [1] * 80
    site.check()


def _paused(site: Site) -> int:
    with site.db.read() as connection:
        rows = connection.execute(
            Job.__table__.select().where(Job.state == "running", Job.error_code == "output_refused")
        )
        return len(rows.all())


def test_a_disk_that_stays_full_fails_the_job_with_its_code(site: Site) -> None:
    switch = Path(site.fleet.folder / "the disk is full")
    switch.touch()
    site.fleet.environment |= {
        "FAULTS_FULL_DISK": str(switch),
        "INPAINT_WRITE_RETRY_SECONDS": "0",
        "INPAINT_MAX_FAILURES": "2",
    }
    ids = site.add(4)
    site.fleet.start("--concurrency", "2")
    site.finish()
    site.check(failed=dict.fromkeys(ids, "output_refused"))
