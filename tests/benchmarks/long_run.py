"""Many small jobs through one worker: does its memory grow, and does it slow down?

``python -m tests.benchmarks.long_run --jobs 20000 --database postgresql``
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from sqlalchemy import func, select

from shared.db.models import Job
from shared.jobs import submissions
from tests import servers
from tests.benchmarks.side_by_side import machine, print_row
from tests.job_table import new_job
from tests.workers.worker_harness import WorkerHarness

ENGINE = "opencv"
FOLDERS = 100
CHUNK = 1000
READY_SECONDS = 60.0
STALL_SECONDS = 120.0
POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The worker process after ``jobs`` jobs."""

    jobs: int
    seconds: float
    resident_mb: float
    files: int
    threads: int


@click.command()
@click.option("--jobs", "count", default=20_000, show_default=True)
@click.option("--every", default=1000, show_default=True, help="Jobs between two lines.")
@click.option(
    "--database", type=click.Choice(["sqlite", "postgresql"]), default="postgresql",
    show_default=True,
)  # fmt: skip
def main(count: int, every: int, database: str) -> None:
    print(machine())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        redis = stack.enter_context(servers.redis_server(folder))
        url = f"sqlite:///{folder / 'jobs.db'}"
        if database == "postgresql":
            cluster = stack.enter_context(servers.postgres_server(folder))
            url = servers.create_database(cluster.url)
        harness = WorkerHarness(url, folder)
        stack.callback(harness.close)
        _submit(harness, count)
        worker = stack.enter_context(_worker(url, redis.url, folder))
        samples = list(_watch(harness, worker, count=count, every=every))
    _summarise(samples)


def _submit(harness: WorkerHarness, count: int) -> None:
    image = harness.write_image("in.png", (64, 64))
    mask = harness.write_mask("mask.png", (64, 64), (20, 20, 40, 40))
    opened = submissions.open_submission(
        harness.db, manifest="/m.csv", digest="long", options="{}", rows=count, invalid=0
    )
    for first in range(1, count + 1, CHUNK):
        rows = [
            new_job(
                line,
                image=image,
                mask=mask,
                output=harness.path(f"out/{line % FOLDERS}/{line}.png"),
                engine=ENGINE,
            )
            for line in range(first, min(first + CHUNK, count + 1))
        ]
        assert submissions.record(harness.db, opened.id, rows) == []


@contextmanager
def _worker(url: str, redis_url: str, folder: Path) -> Iterator[psutil.Process]:
    """The worker process, which its supervisor starts."""
    environment = {
        **os.environ,
        "INPAINT_DATABASE_URL": url,
        "INPAINT_BROKER_URL": redis_url,
        "INPAINT_ROOTS": str(folder),
        "INPAINT_LOG_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "workers.supervisor", "--engine", ENGINE, "--concurrency", "2"]
    supervisor = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not (children := psutil.Process(supervisor.pid).children()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no worker process after {READY_SECONDS:g} s")
            time.sleep(0.05)
        yield children[0]
    finally:
        supervisor.terminate()
        supervisor.wait(20)


def _watch(
    harness: WorkerHarness, worker: psutil.Process, *, count: int, every: int
) -> Iterator[Sample]:
    print_row("jobs", "jobs a second", "resident, MB; open files", "threads")
    while not (done := _done(harness)):
        time.sleep(POLL_SECONDS)  # the worker starts
    start = last_progress = time.monotonic()
    last = _sample(worker, done, 0)
    while done < count:
        time.sleep(POLL_SECONDS)
        now, done_now = time.monotonic(), _done(harness)
        last_progress = now if done_now > done else last_progress
        if now - last_progress > STALL_SECONDS:
            raise RuntimeError(f"no job finished for {STALL_SECONDS:g} s, after {done} jobs")
        done = done_now
        if done - last.jobs < every and done < count:
            continue
        sample = _sample(worker, done, now - start)
        rate = (sample.jobs - last.jobs) / (sample.seconds - last.seconds)
        resources = f"{sample.resident_mb:.1f}; {sample.files}"
        print_row(f"{sample.jobs:,}", f"{rate:.1f}", resources, sample.threads)
        yield sample
        last = sample


def _done(harness: WorkerHarness) -> int:
    with harness.db.read() as connection:
        counted = select(Job.state, func.count()).group_by(Job.state)
        states = {row[0]: row[1] for row in connection.execute(counted)}
    if set(states) & {"failed", "cancelled"}:
        raise RuntimeError(f"not every job succeeded: {states}")
    return int(states.get("succeeded", 0))


def _sample(worker: psutil.Process, jobs: int, seconds: float) -> Sample:
    with worker.oneshot():
        return Sample(
            jobs=jobs,
            seconds=seconds,
            resident_mb=worker.memory_info().rss / 1e6,
            files=worker.num_fds(),
            threads=worker.num_threads(),
        )


def _summarise(samples: list[Sample]) -> None:
    """Compares the last quarter with the first, from its first sample on."""
    quarter = max(len(samples) // 4, 1)
    early, late = samples[quarter - 1], samples[-1]
    first = (early.jobs - samples[0].jobs) / max(early.seconds - samples[0].seconds, 1e-9)
    before = samples[-1 - quarter] if len(samples) > quarter else early
    final = (late.jobs - before.jobs) / max(late.seconds - before.seconds, 1e-9)
    print_row("first quarter, jobs a second", f"{first:.1f}")
    print_row("last quarter, jobs a second", f"{final:.1f}")
    print_row("resident, MB, after a quarter and at the end",
        f"{early.resident_mb:.1f}", f"{late.resident_mb:.1f}")  # fmt: skip
    print_row("open files", early.files, late.files)
    print_row("threads", early.threads, late.threads)


if __name__ == "__main__":
    main()
