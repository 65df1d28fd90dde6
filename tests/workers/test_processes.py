"""Real worker processes: Celery, Redis, signals, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

import pytest
import redis
from sqlalchemy import select

from shared.db.models import Job
from shared.jobs import submissions
from shared.jobs.submissions import NewJob
from tests.workers.fleet import Fleet, wait_for


@pytest.fixture
def fleet(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(database_url, redis_url, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def sqlite_fleet(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(f"sqlite:///{tmp_path / 'i.db'}", redis_url, tmp_path)
    yield fleet
    fleet.close()


def test_two_workers_share_the_jobs_and_each_job_runs_once(fleet: Fleet) -> None:
    jobs = fleet.add(40)
    fleet.start("--concurrency", "2")
    fleet.start("--concurrency", "2")
    wait_for(lambda: set(fleet.states()) == {"succeeded"})
    workers = set()
    for job in jobs:
        (attempt,) = fleet.harness.attempts(job)
        assert attempt.outcome == "succeeded"
        workers.add(attempt.worker)
        assert Path(fleet.harness.path(f"out/{jobs.index(job)}.png")).is_file()
    assert not fleet.harness.temporary_files()
    assert fleet.queue.length("opencv") == 0
    assert all("-cpu-" in worker for worker in workers)


@pytest.mark.parametrize("also_the_child", [False, True])
def test_sigterm_releases_running_jobs_and_ends_the_process(
    sqlite_fleet: Fleet, also_the_child: bool
) -> None:
    """A terminal or a service manager may signal supervisor and child at the same moment."""
    fleet = sqlite_fleet
    jobs = fleet.add(3, size=(500, 500), radius=30)
    supervisor = fleet.start("--concurrency", "2")
    wait_for(lambda: "running" in fleet.states())
    children = fleet.children() if also_the_child else []
    supervisor.terminate()
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert supervisor.wait(20) == 0
    assert "released" in fleet.log()
    assert "running" not in fleet.states()
    outcomes = [attempt.outcome for job in jobs for attempt in fleet.harness.attempts(job)]
    assert None not in outcomes
    assert {fleet.harness.job(job).failures for job in jobs} == {0}


def test_a_killed_process_is_restarted_and_its_jobs_run_again(
    sqlite_fleet: Fleet,
) -> None:
    fleet = sqlite_fleet
    # The supervisor sees it die and reaps its leases: no job waits for their end.
    fleet.environment |= {"INPAINT_LEASE_SECONDS": "600"}
    jobs = fleet.add(3, size=(500, 500), radius=10)
    fleet.start("--concurrency", "1")
    wait_for(lambda: "running" in fleet.states())
    (child,) = fleet.children()
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: set(fleet.states()) == {"succeeded"})
    outcomes = [attempt.outcome for job in jobs for attempt in fleet.harness.attempts(job)]
    assert outcomes.count("lost") == 1
    assert outcomes.count("succeeded") == 3
    assert "starting it again" in fleet.log()


def test_jobs_whose_messages_redis_lost_are_published_again(
    sqlite_fleet: Fleet, redis_url: str
) -> None:
    fleet = sqlite_fleet
    jobs = fleet.add(5)
    messages = fleet.harness.dispatch("opencv")
    assert len(messages) == 5
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    fleet.start("--concurrency", "1")
    wait_for(lambda: set(fleet.states()) == {"succeeded"})
    assert len(jobs) == 5
    assert "whose messages were lost" in fleet.log()


def test_cancelling_a_running_job_stops_it_and_the_worker_goes_on(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    first = fleet.add(1, size=(500, 500), radius=20, prefix="big-")[0]
    second = fleet.add(1, prefix="small-")[0]
    fleet.start("--concurrency", "1")
    wait_for(lambda: fleet.harness.job(first).state == "running")
    fleet.harness.cancel(first)
    wait_for(lambda: fleet.harness.job(first).state == "cancelled")
    wait_for(lambda: fleet.harness.job(second).state == "succeeded")
    assert not Path(fleet.harness.path("big-out/0.png")).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "diffusers:/nowhere/model"], "/nowhere/model"),
        (["--engine", "diffusers:stabilityai/stable-diffusion-2-inpainting"], "sd2-community"),
        (["--engine", "gpt"], "not known"),
        (["--engine", "opencv", "--devices", "0"], "opencv runs on the CPU, not on '0'"),
        (["--engine", "sd2", "--devices", "all"], "no CUDA device"),
        (["--engine", "sd2", "--devices", "3"], "no CUDA device '3'"),
    ],
)
def test_an_engine_that_cannot_be_loaded_is_one_line_before_any_job_is_acquired(
    sqlite_fleet: Fleet, options: list[str], message: str
) -> None:
    fleet = sqlite_fleet
    (job,) = fleet.add(1)
    fleet.harness.dispatch("opencv")
    cpu = [] if "--devices" in options else ["--devices", "cpu"]
    command = [sys.executable, "-m", "workers.supervisor", *options, *cpu]
    environment = {**fleet.environment, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert process.returncode in (2, 69)
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("inpaint-worker: ")
    assert message in lines[0]
    assert fleet.harness.attempts(job) == []


def test_check_prints_engine_revision_and_device(sqlite_fleet: Fleet) -> None:
    command = [sys.executable, "-m", "workers.supervisor", "--engine", "opencv", "--check"]
    process = subprocess.run(
        command, env=sqlite_fleet.environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0
    assert process.stdout.startswith("opencv: opencv ")
    assert process.stdout.strip().endswith("on cpu")


def test_the_embedded_redis_lives_as_long_as_the_worker(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("INPAINT_")
    }
    command = [sys.executable, "-m", "workers.supervisor", "--engine", "opencv"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=file, stderr=file)
    wait_for(lambda: "jobs at a time" in log.read_text())
    redis_log = (tmp_path / ".inpaint" / "redis" / "redis.log").read_text()
    assert "Ready to accept connections" in redis_log
    process.terminate()
    assert process.wait(20) == 0
    redis_log = (tmp_path / ".inpaint" / "redis" / "redis.log").read_text()
    assert "bye bye" in redis_log


def test_a_superseded_job_publishes_nothing_over_the_winner_s_result(fleet: Fleet) -> None:
    """Its worker learns of it only before the put: the engine's call is one step."""
    fleet.environment |= {"INPAINT_HEARTBEAT_SECONDS": "15", "INPAINT_LEASE_SECONDS": "60"}
    (old,) = fleet.add(1, size=(200, 200), radius=24)
    fleet.start("--concurrency", "2")
    wait_for(lambda: fleet.states() == ["running"])
    mask = fleet.harness.write_mask("small.png", (200, 200), (9, 9, 20, 20))
    with fleet.harness.db.read() as connection:
        row = connection.execute(select(*(Job.__table__.c[f.name] for f in fields(NewJob)))).one()
    quick = NewJob(**{**row._asdict(), "line": 9, "content_key": bytes(16), "mask": mask})
    assert submissions.record(fleet.harness.db, 1, [quick], replace=True) == []
    wait_for(lambda: fleet.states() == ["cancelled", "succeeded"])
    assert fleet.harness.job(old).error_code == "output_replaced"
    assert [attempt.outcome for attempt in fleet.harness.attempts(old)] == ["cancelled"]
    published = sha256(Path(quick.output).read_bytes()).hexdigest()
    assert published == fleet.harness.job(old + 1).result_sha256
