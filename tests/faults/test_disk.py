"""A full disk: the worker blocks, logs it, and resumes when there is room."""

from __future__ import annotations

from pathlib import Path

from shared.db.models import Job
from tests.faults.scenario import Scenario, pause
from tests.workers.fleet import wait_for
from workers.pending_writes import MAX_RESULTS


def test_a_full_disk_blocks_the_worker_until_there_is_room(scenario: Scenario) -> None:
    switch = scenario.fleet.folder / "the disk is full"
    scenario.fleet.environment["FAULTS_FULL_DISK"] = str(switch)
    scenario.add(80)
    scenario.fleet.start("--concurrency", "2")
    scenario.wait_for_successes(5)
    switch.touch()
    wait_for(lambda: "No space left on device" in scenario.fleet.log())
    wait_for(lambda: _blocked_jobs(scenario) == MAX_RESULTS + 2)
    done = scenario.count("succeeded")
    pause(1)
    assert (scenario.count("succeeded"), _blocked_jobs(scenario)) == (done, MAX_RESULTS + 2)
    switch.unlink()
    scenario.finish()
    assert "written after retrying" in scenario.fleet.log()
    assert [len(scenario.fleet.harness.attempts(job)) for job in scenario.expected] == [1] * 80
    scenario.assert_invariants()


def _blocked_jobs(scenario: Scenario) -> int:
    with scenario.db.read() as connection:
        rows = connection.execute(
            Job.__table__.select().where(Job.state == "running", Job.error_code == "output_refused")
        )
        return len(rows.all())


def test_a_disk_that_stays_full_fails_the_job_with_its_code(scenario: Scenario) -> None:
    switch = Path(scenario.fleet.folder / "the disk is full")
    switch.touch()
    scenario.fleet.environment |= {
        "FAULTS_FULL_DISK": str(switch),
        "INPAINT_WRITE_RETRY_SECONDS": "0",
        "INPAINT_MAX_FAILURES": "2",
    }
    ids = scenario.add(4)
    scenario.fleet.start("--concurrency", "2")
    scenario.finish()
    scenario.assert_invariants(failed=dict.fromkeys(ids, "output_refused"))
