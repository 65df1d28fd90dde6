"""Producers that die at random rows, meet each other, or wait for another one's jobs."""

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
from tests.faults.site import Site, pause
from tests.workers.fleet import wait_for

ROWS = 8_000


def write_manifest(path: Path, rows: range) -> Path:
    lines = (f"{n % 6}.png,{n % 6}-mask.png,{n}.png" for n in rows)
    path.write_text("\n".join(["image,mask,output", *lines]) + "\n")
    return path


def start(site: Site, manifest: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from producer.cli.submit import submit; submit()",
        str(manifest),
    ]
    command += ["--engine", "opencv", "--output", site.outputs, "--json", *options]
    return subprocess.Popen(
        command,
        env=site.fleet.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def count(site: Site) -> int:
    with site.db.read() as connection:
        return int(connection.execute(select(func.count()).select_from(Job)).scalar_one())


def lines(site: Site) -> int:
    with site.db.read() as connection:
        return int(connection.execute(select(func.count(Job.line.distinct()))).scalar_one())


def test_a_producer_killed_at_random_rows_and_started_again_counts_exactly(site: Site) -> None:
    manifest = write_manifest(site.catalog.folder / "killed.csv", range(ROWS))
    chance = random.Random(5)
    cut_off = 0
    while cut_off < 3:
        before = count(site)
        process = start(site, manifest)
        wait_for(lambda: count(site) > before or process.poll() is not None)  # noqa: B023
        pause(chance.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        cut_off += 1
        if count(site) == ROWS:
            break
    before = count(site)
    assert before > 0
    summary = finish(start(site, manifest))
    assert summary["rows"] == ROWS
    assert summary["accepted"] + summary["duplicates"] == ROWS
    assert summary["accepted"] == ROWS - before
    assert (count(site), lines(site)) == (ROWS, ROWS)
    with site.db.read() as connection:
        assert connection.execute(select(Submission.recorded_at)).scalar_one() is not None


def test_two_producers_with_one_manifest_record_each_row_once(site: Site) -> None:
    manifest = write_manifest(site.catalog.folder / "twice.csv", range(ROWS))
    ended = [finish(process) for process in (start(site, manifest), start(site, manifest))]
    assert sum(summary["accepted"] for summary in ended) == ROWS
    assert ended[0]["submission"] == ended[1]["submission"]
    assert (count(site), lines(site)) == (ROWS, ROWS)


def test_waiting_for_rows_that_another_submission_owns_waits_for_its_jobs(site: Site) -> None:
    finish(start(site, write_manifest(site.catalog.folder / "a.csv", range(40))))
    waiting = start(site, write_manifest(site.catalog.folder / "b.csv", range(30)), "--wait")
    wait_for(lambda: _submissions(site) == 2)
    pause(1)
    assert waiting.poll() is None
    site.fleet.start("--concurrency", "2")
    summary = finish(waiting)
    assert (summary["duplicates"], summary["succeeded"]) == (30, 30)


def _submissions(site: Site) -> int:
    with site.db.read() as connection:
        return int(connection.execute(select(func.count()).select_from(Submission)).scalar_one())
