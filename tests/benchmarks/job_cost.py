"""The overhead of a job: a 64x64 image with an engine that does nothing, compared with a Celery
task that does nothing, in the same kind of worker process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import redis

from shared import jobs
from shared.jobs.queue import TASK, Message, Queue, celery_app, queue_name
from tests import servers
from tests.benchmarks.side_by_side import measure_alternately, print_row
from tests.workers.worker_harness import WorkerHarness
from workers.engines import opencv
from workers.engines.protocol import Pixels, RegionWork

COUNT, REPEATS, THREADS = 500, 3, 2
STALL_SECONDS = 300.0
# The engine's name decides the plan of regions: OpenCV gets the image as one.
ENGINE = "opencv"


class IdentityEngine:
    """Returns the region unchanged."""

    name, revision, device = ENGINE, "1", "cpu"

    def submit(self, work: RegionWork) -> Future[Pixels]:
        future: Future[Pixels] = Future()
        future.set_result(work.image)
        return future

    def close(self) -> None: ...


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with servers.redis_server(folder) as server, servers.postgres_server(folder) as cluster:
            urls = {
                "SQLite": f"sqlite:///{folder / 'jobs.db'}",
                "PostgreSQL": servers.create_database(cluster.url),
            }
            for kind, url in urls.items():
                _compare(kind, url, server.url, folder / kind)


def _compare(kind: str, url: str, redis_url: str, folder: Path) -> None:
    folder.mkdir()
    harness = WorkerHarness(url, folder)
    image = harness.write_image("in.png", (64, 64))
    mask = harness.write_mask("mask.png", (64, 64), (20, 20, 40, 40))
    runs = iter(range(REPEATS + 1))

    def ours() -> float:
        number = next(runs)
        for index in range(COUNT):
            harness.add(
                image=image,
                mask=mask,
                output=harness.path(f"out/{number}-{index}.png"),
                engine=ENGINE,
                mode="full",
            )
        queue = Queue(redis_url)
        jobs.dispatch(harness.db, queue, ENGINE, bound=COUNT)
        queue.close()
        return _seconds_until_drained(lambda: _unfinished(harness))

    environment = {
        **os.environ,
        "INPAINT_DATABASE_URL": url,
        "INPAINT_BROKER_URL": redis_url,
        "INPAINT_ROOTS": str(folder),
    }
    with _worker("ours", environment), _worker("bare", environment):
        ours()  # warms up
        pair = measure_alternately(ours, lambda: _bare(redis_url), repeats=REPEATS)
    harness.close()
    print_row(f"cost of a job, {kind}, ms", "ours", "bare Celery no-op", "times")
    ours_ms, bare_ms = min(pair.ours) / COUNT * 1000, min(pair.theirs) / COUNT * 1000
    print_row("", f"{ours_ms:.2f}", f"{bare_ms:.2f}", f"{1 / pair.ratio:.1f}x")


def _unfinished(harness: WorkerHarness) -> int:
    with harness.db.read() as connection:
        counted = connection.exec_driver_sql(
            "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running', 'pending')"
        )
        return int(counted.scalar_one())


def _bare(redis_url: str) -> float:
    """Seconds for the bare tasks; published in the same way as ours, so only the workers differ."""
    client = redis.Redis.from_url(redis_url)
    client.set("done", 0)
    queue = Queue(redis_url)
    queue.publish([Message(job=n, attempt=0, engine="bare") for n in range(COUNT)])
    queue.close()
    seconds = _seconds_until_drained(lambda: COUNT - int(client.get("done") or 0))
    client.close()
    return seconds


def _seconds_until_drained(left: Callable[[], int]) -> float:
    start = time.perf_counter()
    while jobs_left := left():
        if time.perf_counter() - start > STALL_SECONDS:
            raise RuntimeError(f"{jobs_left} jobs not finished after {STALL_SECONDS:g} s")
        time.sleep(0.05)
    return time.perf_counter() - start


@contextmanager
def _worker(kind: str, environment: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.benchmarks.job_cost", kind]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _run_ours() -> None:
    from workers.worker_process import main as worker

    opencv.load = lambda _name, _options: IdentityEngine()  # type: ignore[assignment,return-value]
    os.environ |= {
        "INPAINT_CONCURRENCY": str(THREADS),
        "INPAINT_MAX_BATCH": "1",
        "INPAINT_MEGAPIXEL_BUDGET": "1000",
    }
    worker(["--engine", ENGINE, "--device", "cpu", "--name", "bench", "--worker", "bench-1"])


def _run_bare() -> None:
    """The task increments a counter in Redis: the least from which its end can be seen."""
    url = os.environ["INPAINT_BROKER_URL"]
    app = celery_app(url, engines=["bare"])
    counter = redis.Redis.from_url(url)

    @app.task(name=TASK)
    def task(_job: int, _attempt: int, _alone: bool) -> None:
        counter.incr("done")

    app.Worker(
        pool="threads",
        concurrency=THREADS,
        queues=[queue_name("bare")],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel="ERROR",
    ).start()


if __name__ == "__main__":
    roles = {"ours": _run_ours, "bare": _run_bare}
    roles.get(sys.argv[1] if len(sys.argv) > 1 else "", main)()
