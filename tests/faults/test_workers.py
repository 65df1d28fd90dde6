"""Worker processes that are killed, frozen, hang or are told to stop while they run jobs."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
from sqlalchemy import update

from shared import jobs
from shared.db.models import Job
from shared.params import Params
from shared.processes import EX_DEVICE_LOST
from tests.faults.scenario import REPRODUCIBLE_PARAMS, Scenario, pause
from tests.workers.fleet import wait_for

KILLS = int(os.environ.get("FAULTS_KILLS", "14"))


def outcomes(scenario: Scenario) -> list[str]:
    found = [
        attempt.outcome
        for job in scenario.expected
        for attempt in scenario.fleet.harness.attempts(job)
    ]
    assert None not in found
    return found


def test_killed_processes_lose_and_duplicate_no_job(scenario: Scenario) -> None:
    rng = random.Random(KILLS)
    scenario.add(60 + 5 * KILLS, prompt="steps 10")
    for _ in range(2):
        scenario.fleet.start("--concurrency", "2")
    kills = 0
    while kills < KILLS:
        if kills % 2 == 0:  # half of the kills hit a running job, half an idle or starting process
            wait_for(lambda: scenario.count("running") > 0)
        pause(rng.uniform(0, 0.2))
        kills += scenario.kill_a_worker_process(rng)
    # A job that was running at two kills is quarantined: only a user's retry runs it again.
    scenario.finish(retry=["worker_lost"])
    assert outcomes(scenario).count("lost") >= KILLS // 3
    scenario.assert_invariants()


def test_sigterm_releases_jobs_within_two_seconds_and_a_step(scenario: Scenario) -> None:
    scenario.add(30, prompt="steps 20")
    stopping = scenario.fleet.start("--concurrency", "2")
    scenario.wait_for_successes(2)
    signalled = time.monotonic()
    stopping.terminate()
    assert stopping.wait(20) == 0
    # A supervisor that has to kill its process waits ten seconds first.
    assert time.monotonic() - signalled < 8
    assert scenario.count("running") == 0
    scenario.fleet.start("--concurrency", "4")
    scenario.finish()
    assert set(outcomes(scenario)) == {"succeeded", "released"}
    assert {scenario.fleet.harness.job(job).failures for job in scenario.expected} == {0}
    scenario.assert_invariants()


def test_a_process_that_was_frozen_past_its_lease_publishes_no_result(
    scenario: Scenario,
) -> None:
    frozen_jobs = scenario.add(2, prompt="steps 100")
    scenario.add(20)
    supervisor = scenario.fleet.start("--concurrency", "2")
    wait_for(lambda: scenario.count("running") == 2)
    # Both, as on a machine that sleeps: the supervisor must not blame its worker for the time.
    frozen = [supervisor.pid, *scenario.fleet.children()]
    for process in frozen:
        os.kill(process, signal.SIGSTOP)
    scenario.fleet.start("--concurrency", "2")
    scenario.finish()
    for process in frozen:
        os.kill(process, signal.SIGCONT)
    wait_for(lambda: scenario.fleet.log().count("lost its lease") >= 1)
    for job in frozen_jobs:
        lost, won = scenario.fleet.harness.attempts(job)
        assert (lost.outcome, won.outcome) == ("lost", "succeeded")
        assert lost.worker != won.worker
    scenario.assert_invariants()


def test_a_job_that_crashes_its_process_is_quarantined_and_the_others_succeed(
    scenario: Scenario,
) -> None:
    scenario.add(30)
    (poison,) = scenario.add(1, prompt="crash")
    scenario.add(30)
    scenario.fleet.start("--concurrency", "4")
    scenario.finish()
    assert (
        scenario.fleet.log().count("signal 6; starting it again") == jobs.LOSSES_BEFORE_QUARANTINE
    )
    scenario.assert_invariants(failed={poison: "worker_lost"})


def test_a_process_whose_engine_hangs_exits_and_is_restarted(scenario: Scenario) -> None:
    scenario.fleet.environment["INPAINT_STALL_SECONDS"] = "1"
    scenario.add(20)
    (hanging,) = scenario.add(1, prompt="hang")
    scenario.add(20)
    scenario.fleet.start("--concurrency", "2")
    scenario.finish()
    assert f"job {hanging}: no step for 1 s" in scenario.fleet.log()
    assert "in _misbehave" in scenario.fleet.log()
    scenario.assert_invariants(failed={hanging: "worker_lost"})


def test_a_process_frozen_in_native_code_is_killed_and_the_others_go_on(
    scenario: Scenario,
) -> None:
    """Only the supervisor can end it: no lease of this test expires in time."""
    scenario.fleet.environment |= {"INPAINT_LEASE_SECONDS": "600", "INPAINT_FREEZE_SECONDS": "1"}
    scenario.add(8)
    (freezing,) = scenario.add(1, prompt="freeze")
    scenario.add(8)
    scenario.fleet.start("--concurrency", "4")
    scenario.finish()
    losses = scenario.fleet.harness.attempts(freezing)
    assert {attempt.error_message for attempt in losses} == {
        "the worker process did not run for 1 s and was killed"
    }
    assert [attempt.outcome for attempt in losses] == ["lost"] * jobs.LOSSES_BEFORE_QUARANTINE
    assert "in _misbehave" in scenario.fleet.log()  # where it was frozen
    scenario.assert_invariants(failed={freezing: "worker_lost"})


def test_a_stopped_process_is_killed_and_its_jobs_run_again(scenario: Scenario) -> None:
    scenario.fleet.environment |= {"INPAINT_LEASE_SECONDS": "600", "INPAINT_FREEZE_SECONDS": "1"}
    scenario.add(6, prompt="steps 20")
    scenario.fleet.start("--concurrency", "2")
    wait_for(lambda: scenario.count("running") == 2)
    (stopped,) = scenario.fleet.children()
    os.kill(stopped, signal.SIGSTOP)
    scenario.finish()
    assert not psutil.pid_exists(stopped)
    assert outcomes(scenario).count("lost") == 2
    scenario.assert_invariants()


def test_a_device_that_fails_five_jobs_in_a_row_takes_no_more_jobs(scenario: Scenario) -> None:
    scenario.add(30, prompt="broken")
    broken = scenario.fleet.start("--concurrency", "1")
    assert broken.wait(60) == 69
    (reason,) = [line for line in scenario.fleet.log().splitlines() if "in a row" in line]
    assert "5 jobs in a row failed on cpu" in reason
    assert "the device does not answer" in reason
    assert outcomes(scenario) == ["retried"] * 5
    assert scenario.count("running") == 0


def test_a_lost_device_ends_the_process_and_fails_only_one_attempt(
    scenario: Scenario,
) -> None:
    """For what the supervisor does after five of them see tests/workers/test_supervisor.py."""
    lost = scenario.add(1, prompt="lost")
    scenario.add(30)
    scenario.fleet.start("--concurrency", "2")
    wait_for(lambda: scenario.fleet.harness.job(lost[0]).failures > 0)
    with scenario.db.write() as connection:
        connection.execute(
            update(Job)
            .where(Job.id == lost[0])
            .values(params=Params(**REPRODUCIBLE_PARAMS).to_json())
        )
    scenario.finish()
    assert f"ended with status {EX_DEVICE_LOST}" in scenario.fleet.log()
    assert "lost" not in outcomes(scenario)
    scenario.assert_invariants()


def test_a_killed_supervisor_takes_its_worker_process_with_it(scenario: Scenario) -> None:
    scenario.add(40, prompt="steps 10")
    supervisor = scenario.fleet.start("--concurrency", "2")
    scenario.wait_for_successes(2)
    (child,) = scenario.fleet.children()
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not psutil.pid_exists(child))
    assert scenario.count("running") == 0
    scenario.fleet.start("--concurrency", "4")
    scenario.finish()
    scenario.assert_invariants()
