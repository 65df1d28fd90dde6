"""Producers that are killed at random rows, run concurrently, or wait for each other's jobs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from sqlalchemy import func, select

from shared.db.models import Job, Submission
from tests.faults.scenario import Scenario, pause
from tests.workers.fleet import wait_for

ROWS = 8_000


def write_manifest(path: Path, rows: range) -> Path:
    lines = (f"{n % 6}.png,{n % 6}-mask.png,{n}.png" for n in rows)
    path.write_text("\n".join(["image,mask,output", *lines]) + "\n")
    return path


def start(scenario: Scenario, manifest: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from producer.cli.submit import submit; submit()",
        str(manifest),
    ]
    command += ["--engine", "opencv", "--output", scenario.outputs, "--json", *options]
    return subprocess.Popen(
        command,
        env=scenario.fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def job_count(scenario: Scenario) -> int:
    with scenario.db.read() as connection:
        return int(connection.execute(select(func.count()).select_from(Job)).scalar_one())


def line_count(scenario: Scenario) -> int:
    with scenario.db.read() as connection:
        return int(connection.execute(select(func.count(Job.line.distinct()))).scalar_one())


def test_a_producer_killed_at_random_rows_and_restarted_records_each_row_once(
    scenario: Scenario,
) -> None:
    manifest = write_manifest(scenario.catalog.folder / "killed.csv", range(ROWS))
    rng = random.Random(5)
    kills = 0
    while kills < 3:
        before = job_count(scenario)
        process = start(scenario, manifest)
        wait_for(lambda: job_count(scenario) > before or process.poll() is not None)  # noqa: B023
        pause(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if job_count(scenario) == ROWS:
            break
    before = job_count(scenario)
    assert before > 0
    summary = finish(start(scenario, manifest))
    assert summary["rows"] == ROWS
    assert summary["accepted"] + summary["duplicates"] == ROWS
    assert summary["accepted"] == ROWS - before
    assert (job_count(scenario), line_count(scenario)) == (ROWS, ROWS)
    with scenario.db.read() as connection:
        assert connection.execute(select(Submission.recorded_at)).scalar_one() is not None


def test_two_producers_with_one_manifest_record_each_row_once(scenario: Scenario) -> None:
    manifest = write_manifest(scenario.catalog.folder / "twice.csv", range(ROWS))
    processes = [start(scenario, manifest), start(scenario, manifest)]
    first, second = [finish(process) for process in processes]
    assert first["accepted"] + second["accepted"] == ROWS
    assert first["submission"] == second["submission"]
    assert (job_count(scenario), line_count(scenario)) == (ROWS, ROWS)


def test_waiting_for_rows_that_another_submission_owns_waits_for_its_jobs(
    scenario: Scenario,
) -> None:
    finish(start(scenario, write_manifest(scenario.catalog.folder / "a.csv", range(40))))
    waiting = start(
        scenario, write_manifest(scenario.catalog.folder / "b.csv", range(30)), "--wait"
    )
    wait_for(lambda: _submission_count(scenario) == 2)
    pause(1)
    assert waiting.poll() is None
    scenario.fleet.start("--concurrency", "2")
    summary = finish(waiting)
    assert (summary["duplicates"], summary["succeeded"]) == (30, 30)


def _submission_count(scenario: Scenario) -> int:
    with scenario.db.read() as connection:
        return int(connection.execute(select(func.count()).select_from(Submission)).scalar_one())
