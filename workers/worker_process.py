"""One worker process: loads its engine, then consumes the one Celery task there is.

Started by ``inpaint-worker``, one per device. Exits 69 where the engine cannot be loaded.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from types import FrameType
from typing import Any

import celery.worker.consumer
import click
from celery import Celery, signals
from celery.exceptions import CPendingDeprecationWarning, Reject, SecurityWarning
from celery.worker import state as celery_state
from celery.worker.state import maybe_shutdown

from shared import embedded_redis, settings
from shared.command_errors import exit_on_error, print_error
from shared.db import Database, schema
from shared.engines import engine_spec
from shared.errors import EngineError, InpaintError, OutOfMemory
from shared.jobs import Holder
from shared.jobs.queue import TASK, Queue, celery_app, queue_name
from shared.jobs.retry import RetryPolicy
from shared.processes import (
    EX_DEVICE_LOST,
    EX_DEVICE_LOST_LATER,
    EX_UNAVAILABLE,
    SAME_SIGNAL_SECONDS,
)
from shared.settings import Settings
from shared.storage import Storage
from workers.active_jobs import ActiveJobs
from workers.engines import load_engine
from workers.engines.options import engine_options
from workers.engines.protocol import Engine
from workers.exclusive_lock import ExclusiveLock
from workers.job_runner import Bench, give_back, run_job
from workers.maintenance import Maintenance
from workers.pixel_budget import PixelBudget

log = logging.getLogger(__name__)

EX_OK = 0
GRACE_SECONDS = 2.0
FAILURES_OF_A_DEVICE = 5
SWITCH_SECONDS = 0.0005


@click.command()
@click.option("--engine", required=True)
@click.option("--device", required=True)
@click.option("--name", required=True, help="Host and device.")
@click.option("--worker", required=True, help="The name, and what tells this life from others.")
@click.option("--concurrency", type=int, required=True)
@click.option("--max-batch", required=True)
@click.option("--megapixel-budget", type=int, required=True)
@click.option("--compile", required=True)
@click.option("--quantization", required=True)
@click.option("--deterministic", is_flag=True)
@click.option("--check", is_flag=True, help="Load the engine, print one line, exit.")
def main(
    engine: str,
    device: str,
    name: str,
    worker: str,
    concurrency: int,
    check: bool,
    **how: Any,
) -> None:
    with exit_on_error("inpaint-worker", status=1, engine_unavailable=EX_UNAVAILABLE):
        configured = settings.load(**how)
        _configure_logging(configured.log_level, name)
        loaded = load_engine(engine, engine_options(configured, device))
        if check:
            click.echo(f"{loaded.name}: {loaded.revision} on {loaded.device}")
            loaded.close()
            return
        bench = _bench(configured, loaded, worker)
    threads = concurrency or _default_concurrency(loaded)
    sys.exit(_consume(bench, name, threads))


def _default_concurrency(engine: Engine) -> int:
    """Enough jobs in hand that fetching, decoding and encoding never keep the device waiting."""
    jobs = engine_spec(engine.name).jobs_per_batch_row * engine.max_batch
    return jobs or os.cpu_count() or 1


def _bench(configured: Settings, engine: Any, worker: str) -> Bench:
    db = Database(configured.database, pool_size=16)
    schema.ensure(db)
    return Bench(
        settings=configured,
        db=db,
        storage=Storage(roots=configured.roots, buckets=configured.buckets),
        engine=engine,
        holder=Holder(worker=worker, device=engine.device, engine_revision=engine.revision),
        running=ActiveJobs(),
        retry=RetryPolicy(
            max_failures=configured.max_failures,
            base_seconds=configured.retry_base_seconds,
            cap_seconds=configured.retry_cap_seconds,
        ),
        room=PixelBudget(configured.megapixel_budget),
    )


def _consume(bench: Bench, name: str, threads: int) -> int:
    """Runs Celery until a signal; returns the process's exit status."""
    # Job threads wait on small I/O many times a job; with the usual 5 ms each of them would
    # wait that long for the interpreter whenever another thread decodes or composites.
    sys.setswitchinterval(SWITCH_SECONDS)
    url = embedded_redis.broker_url(bench.settings)
    app = celery_app(url, engines=[bench.engine.name])
    health = Health(bench.engine.device)
    _register(app, bench, health)
    _install_signals(bench, health)
    upkeep = Maintenance(bench, Queue(url))
    upkeep.start()
    log.info("%s on %s: %s jobs at a time", bench.engine.name, bench.engine.device, threads)
    worker = app.Worker(
        consumer_cls=Consumer,
        hostname=f"inpaint@{name}",
        pool="threads",
        concurrency=threads,
        queues=[queue_name(bench.engine.name)],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel=bench.settings.log_level,
        quiet=True,
    )
    try:
        worker.start()
    finally:
        bench.running.release_all()
        if not bench.waiting.join(GRACE_SECONDS):
            give_back(bench)
        bench.engine.close()
        upkeep.stop()
        bench.db.close()
    return health.status or int(worker.exitcode or 0)


class Health:
    """Counts the jobs in a row that the engine failed, and says when the process has to end.

    A job that fails again and again counts once: it may be the job's own fault.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._failed: set[int] = set()
        self._succeeded = False
        self.status = EX_OK

    def note(self, job: int, ended: InpaintError | None) -> bool:
        """True where this process can do no more work; ``status`` is then its exit status."""
        if ended is None:
            self._failed, self._succeeded = set(), True
        if not isinstance(ended, EngineError) or isinstance(ended, OutOfMemory) or self.status:
            return False
        self._failed.add(job)
        if ended.code == "device_lost":
            # CUDA does not recover inside a process; the launcher starts a fresh one.
            self.status = EX_DEVICE_LOST_LATER if self._succeeded else EX_DEVICE_LOST
        elif len(self._failed) >= FAILURES_OF_A_DEVICE:
            self.status = EX_UNAVAILABLE
            print_error(
                "inpaint-worker",
                f"{len(self._failed)} jobs in a row failed on {self._device}, "
                f"which takes no more of them: {ended.code}: {ended}",
            )
        return bool(self.status)


class Consumer(celery.worker.consumer.Consumer):
    """Looks for a lost broker every second; Celery would wait up to half a minute."""

    def ensure_connected(self, conn: Any) -> Any:
        said: list[str] = []

        def say(error: Exception, _interval: float) -> None:
            if not said:
                log.warning("broker %s: %s; trying again every second", conn.as_uri(), error)
            said.append(str(error))

        conn.ensure_connection(
            say, interval_start=1, interval_step=0, interval_max=1, callback=maybe_shutdown
        )
        while conn.default_channel.client.role()[0] in (b"slave", "slave"):
            # In a failover; consuming is writing, and Celery would connect sixty times a second.
            say(ConnectionError("it is a replica"), 1)
            maybe_shutdown()
            time.sleep(1)
        return conn


def _register(app: Celery, bench: Bench, health: Health) -> None:
    turns = ExclusiveLock()

    @app.task(name=TASK)
    def task(job: int, attempt: int, alone: bool = False) -> None:
        with turns.turn(alone=alone, stop=lambda: bench.running.stopping) as came:
            if not came:
                raise Reject("the worker is shutting down", requeue=True)
            if health.note(job, run_job(bench, job=job, seen_attempt=attempt, alone=alone)):
                os.kill(os.getpid(), signal.SIGTERM)


def _install_signals(bench: Bench, health: Health) -> None:
    """The first SIGTERM or SIGINT releases every job; a later one exits at once."""
    asked: list[float] = []

    def stop(_number: int, _frame: FrameType | None) -> None:
        if asked:
            if time.monotonic() - asked[0] > SAME_SIGNAL_SECONDS:
                os._exit(1)
            return
        asked.append(time.monotonic())
        bench.running.release_all()
        celery_state.should_stop = EX_OK  # type: ignore[assignment]
        threading.Thread(target=_leave, args=(bench, health), name="leave", daemon=True).start()

    def install(**_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    # Celery installs its own handlers while it starts; ours come after them.
    signals.worker_ready.connect(install, weak=False)
    install()


def _leave(bench: Bench, health: Health) -> None:
    """Ends the process where a step takes too long to wait for; its jobs go back first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and bench.running.held():
        time.sleep(0.05)
    if bench.running.held():
        give_back(bench)
        os._exit(health.status)


def _configure_logging(level: str, name: str) -> None:
    logging.basicConfig(
        level=level, format=f"%(asctime)s %(levelname)s {name} %(message)s", stream=sys.stderr
    )
    for noisy in ("celery", "kombu", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel("WARNING")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_celery_s_traceback)
    # Celery warns root of pickled messages; ours are JSON. And at each loss of the broker it
    # announces what a later version will do.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    signals.setup_logging.connect(lambda **_: None, weak=False)


def _without_celery_s_traceback(record: logging.LogRecord) -> bool:
    """A broker that fails is one line, not the sixty of redis, kombu and Celery.

    And a message that goes back to the queue at shutdown is no news.
    """
    if record.name.startswith(("celery.worker", "celery.bootsteps")):
        record.exc_info = None
    return not (record.exc_info and record.exc_info[0] is Reject)


if __name__ == "__main__":
    main()
