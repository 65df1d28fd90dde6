"""Worker processes that die, freeze, hang, or are asked to go, while they work."""

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
from tests.faults.site import PLAIN, Site, pause
from tests.workers.fleet import wait_for

KILLS = int(os.environ.get("FAULTS_KILLS", "14"))


def outcomes(site: Site) -> list[str]:
    found = [
        attempt.outcome for job in site.expected for attempt in site.fleet.harness.attempts(job)
    ]
    assert None not in found
    return found


def test_killed_processes_lose_and_double_nothing(site: Site) -> None:
    chance = random.Random(KILLS)
    site.add(60 + 5 * KILLS, prompt="steps 10")
    for _ in range(2):
        site.fleet.start("--concurrency", "2")
    kills = 0
    while kills < KILLS:
        if kills % 2 == 0:  # half of them hit work, the others a process that may just start
            wait_for(lambda: site.count("running") > 0)
        pause(chance.uniform(0, 0.2))
        kills += site.kill_a_process(chance)
    # A job that was running at two of the kills is quarantined, and only a person reopens it.
    site.finish(retry=["worker_lost"])
    assert outcomes(site).count("lost") >= KILLS // 3
    site.check()


def test_sigterm_gives_jobs_back_within_two_seconds_and_a_step(site: Site) -> None:
    site.add(30, prompt="steps 20")
    leaving = site.fleet.start("--concurrency", "2")
    site.await_some(2)
    asked = time.monotonic()
    leaving.terminate()
    assert leaving.wait(20) == 0
    # A launcher that had to kill its process would have waited ten seconds.
    assert time.monotonic() - asked < 8
    assert site.count("running") == 0
    site.fleet.start("--concurrency", "4")
    site.finish()
    assert set(outcomes(site)) == {"succeeded", "released"}
    assert {site.fleet.harness.job(job).failures for job in site.expected} == {0}
    site.check()


def test_the_result_of_a_process_that_slept_through_its_lease_does_not_land(site: Site) -> None:
    jobs_held = site.add(2, prompt="steps 100")
    site.add(20)
    site.fleet.start("--concurrency", "2")
    wait_for(lambda: site.count("running") == 2)
    (frozen,) = site.fleet.children()
    os.kill(frozen, signal.SIGSTOP)
    site.fleet.start("--concurrency", "2")
    site.finish()
    os.kill(frozen, signal.SIGCONT)
    wait_for(lambda: site.fleet.log().count("lost its lease") >= 1)
    for job in jobs_held:
        lost, won = site.fleet.harness.attempts(job)
        assert (lost.outcome, won.outcome) == ("lost", "succeeded")
        assert lost.worker != won.worker
    site.check()


def test_a_job_that_crashes_its_process_is_quarantined_and_harms_no_neighbour(site: Site) -> None:
    site.add(30)
    (poison,) = site.add(1, prompt="crash")
    site.add(30)
    site.fleet.start("--concurrency", "4")
    site.finish()
    assert site.fleet.log().count("signal 6; starting it again") == jobs.LOSSES_BEFORE_QUARANTINE
    site.check(failed={poison: "worker_lost"})


def test_a_process_whose_engine_hangs_ends_itself_and_is_started_again(site: Site) -> None:
    site.fleet.environment["INPAINT_STALL_SECONDS"] = "1"
    site.add(20)
    (hanging,) = site.add(1, prompt="hang")
    site.add(20)
    site.fleet.start("--concurrency", "2")
    site.finish()
    assert f"job {hanging}: no step for 1 s" in site.fleet.log()
    assert "in _misbehave" in site.fleet.log()
    site.check(failed={hanging: "worker_lost"})


def test_a_device_that_fails_five_jobs_in_a_row_takes_no_more(site: Site) -> None:
    site.add(30, prompt="broken")
    broken = site.fleet.start("--concurrency", "1")
    assert broken.wait(60) == 69
    (reason,) = [line for line in site.fleet.log().splitlines() if "in a row" in line]
    assert "5 jobs in a row failed on cpu" in reason
    assert "the device does not answer" in reason
    assert outcomes(site) == ["retried"] * 5
    assert site.count("running") == 0


def test_a_lost_device_ends_the_process_and_is_a_failure_of_one_job_only(site: Site) -> None:
    """What the launcher does after five such ends: tests/workers/test_supervisor.py."""
    lost = site.add(1, prompt="lost")
    site.add(30)
    site.fleet.start("--concurrency", "2")
    wait_for(lambda: site.fleet.harness.job(lost[0]).failures > 0)
    with site.db.write() as connection:
        connection.execute(
            update(Job).where(Job.id == lost[0]).values(params=Params(**PLAIN).to_json())
        )
    site.finish()
    assert f"ended with status {EX_DEVICE_LOST}" in site.fleet.log()
    assert "lost" not in outcomes(site)
    site.check()


def test_a_killed_launcher_takes_its_process_along(site: Site) -> None:
    site.add(40, prompt="steps 10")
    launcher = site.fleet.start("--concurrency", "2")
    site.await_some(2)
    (child,) = site.fleet.children()
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not psutil.pid_exists(child))
    assert site.count("running") == 0
    site.fleet.start("--concurrency", "4")
    site.finish()
    site.check()
