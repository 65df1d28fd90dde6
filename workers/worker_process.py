"""One worker process: loads its engine, then consumes Celery's one task, a job.

Started by ``inpaint-worker``, one per device. Exits 69 if the engine cannot be loaded.
"""

from __future__ import annotations

import faulthandler
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
from shared.errors import DeviceLost, EngineError, InpaintError, OutOfMemory
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
from workers.engines import load_engine
from workers.engines.options import engine_options
from workers.engines.protocol import Engine
from workers.exclusive_lock import ExclusiveLock
from workers.job_runner import release_all, run_job
from workers.maintenance import Maintenance
from workers.pending_writes import PendingWrites
from workers.pixel_budget import PixelBudget
from workers.watchdog import start_pings
from workers.worker_context import WorkerContext

log = logging.getLogger(__name__)

EX_OK = 0
GRACE_SECONDS = 2.0
MAX_FAILED_JOBS = 5  # in a row, before the device counts as broken
SWITCH_SECONDS = 0.0005
# Fewer than the job threads of a large batch: a job uses a connection only for moments.
JOB_CONNECTIONS = 16
MAINTENANCE_CONNECTIONS = 2  # one for each of its threads


@click.command()
@click.option("--engine", required=True)
@click.option("--device", required=True)
@click.option("--name", required=True, help="Host and device; stable over restarts.")
@click.option("--worker", required=True, help="The name, plus what is unique to this process.")
@click.option("--watchdog", type=int, help="Descriptor of the pipe that is written to while alive.")
@click.option("--check", is_flag=True, help="Load the engine, print one line, exit.")
def main(
    engine: str, device: str, name: str, worker: str, watchdog: int | None, check: bool
) -> None:
    """Consume jobs until a signal. Settings come from the environment."""
    # Native code that crashes, or that the supervisor aborts, leaves where each thread was.
    faulthandler.enable()
    with exit_on_error("inpaint-worker", status=1, engine_unavailable=EX_UNAVAILABLE):
        configured = settings.load()
        _configure_logging(configured.log_level, name)
        loaded = load_engine(engine, engine_options(configured, device))
        if check:
            click.echo(f"{loaded.name}: {loaded.revision} on {loaded.device}")
            loaded.close()
            return
        context = _worker_context(configured, loaded, worker)
    if watchdog is not None:
        start_pings(watchdog, limit_seconds=configured.freeze_limit_seconds)
    sys.exit(_consume(context, name))


def _worker_context(configured: Settings, engine: Engine, worker: str) -> WorkerContext:
    db = Database(configured.database, pool_size=JOB_CONNECTIONS)
    schema.ensure(db)
    return WorkerContext(
        settings=configured,
        storage=Storage(roots=configured.roots, buckets=configured.buckets),
        engine=engine,
        pixel_budget=PixelBudget(configured.megapixel_budget),
        db=db,
        maintenance_db=Database(configured.database, pool_size=MAINTENANCE_CONNECTIONS),
        holder=Holder(worker=worker, device=engine.device, engine_revision=engine.revision),
        retry_policy=RetryPolicy(
            max_failures=configured.max_failures,
            base_seconds=configured.retry_base_seconds,
            cap_seconds=configured.retry_cap_seconds,
        ),
        pending_writes=PendingWrites(retry_seconds=configured.write_retry_seconds),
    )


def _consume(worker: WorkerContext, name: str) -> int:
    """Run Celery until a signal; return the process's exit status."""
    # Job threads wait for small I/O many times a job. With the default of 5 ms each of them would
    # wait that long for the interpreter lock whenever another thread decodes or composites.
    sys.setswitchinterval(SWITCH_SECONDS)
    url = embedded_redis.broker_url(worker.settings)
    app = celery_app(url, engines=[worker.engine.name])
    health = DeviceHealth(worker.engine.device)
    _register_task(app, worker, health)
    _install_signal_handlers(worker, health)
    maintenance = Maintenance(worker, Queue(url))
    maintenance.start()
    celery_worker = _celery_worker(app, worker, name)
    try:
        celery_worker.start()
    finally:
        _shut_down(worker, maintenance)
    return health.status or int(celery_worker.exitcode or 0)


def _shut_down(worker: WorkerContext, maintenance: Maintenance) -> None:
    worker.active_jobs.request_stop()
    if not worker.pending_writes.join(GRACE_SECONDS):
        release_all(worker)
    # Maintenance ends last: leases need their heartbeats until the engine has stopped.
    worker.engine.close()
    maintenance.stop()
    worker.db.close()
    worker.maintenance_db.close()


def _celery_worker(app: Celery, worker: WorkerContext, name: str) -> Any:
    engine = worker.engine
    concurrency = worker.settings.concurrency or _default_concurrency(engine)
    log.info("%s on %s: %s jobs at a time", engine.name, engine.device, concurrency)
    return app.Worker(
        consumer_cls=Consumer,
        hostname=f"inpaint@{name}",
        pool="threads",
        concurrency=concurrency,
        queues=[queue_name(engine.name)],
        # Leases in the database replace Celery's messages between workers.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        loglevel=worker.settings.log_level,
        quiet=True,
    )


def _default_concurrency(engine: Engine) -> int:
    """Enough jobs that the device never waits for fetching, decoding and encoding."""
    jobs = engine_spec(engine.name).jobs_per_batch_row * engine.max_batch
    return jobs or os.cpu_count() or 1


class DeviceHealth:
    """Decides from the engine's errors when the device is broken and the process must end.

    A job that fails repeatedly counts once: the fault may be the job's.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._failed_jobs: set[int] = set()
        self._has_succeeded = False
        self.status = EX_OK

    def note(self, job: int, error: InpaintError | None) -> bool:
        """True if this process can do no more work; ``status`` is then its exit status."""
        if error is None:
            self._failed_jobs, self._has_succeeded = set(), True
        if not isinstance(error, EngineError) or isinstance(error, OutOfMemory) or self.status:
            return False
        self._failed_jobs.add(job)
        if isinstance(error, DeviceLost):
            # CUDA does not recover inside a process; the supervisor starts another.
            self.status = EX_DEVICE_LOST_LATER if self._has_succeeded else EX_DEVICE_LOST
        elif len(self._failed_jobs) >= MAX_FAILED_JOBS:
            self.status = EX_UNAVAILABLE
            print_error(
                "inpaint-worker",
                f"{len(self._failed_jobs)} jobs in a row failed on {self._device}, "
                f"and this process takes no more: {error.code}: {error}",
            )
        return bool(self.status)


class Consumer(celery.worker.consumer.Consumer):
    """Retries a lost broker every second; Celery's pauses grow to half a minute."""

    def ensure_connected(self, conn: Any) -> Any:
        is_reported = False

        def report(error: Exception, _interval: float) -> None:
            nonlocal is_reported
            if not is_reported:
                log.warning("broker %s: %s; trying again every second", conn.as_uri(), error)
            is_reported = True

        conn.ensure_connection(
            report, interval_start=1, interval_step=0, interval_max=1, callback=maybe_shutdown
        )
        # During a failover Redis accepts connections as a replica, but consuming is writing:
        # Celery would fail and connect again sixty times a second.
        while conn.default_channel.client.role()[0] in (b"slave", "slave"):
            report(ConnectionError("it is a replica"), 1)
            maybe_shutdown()
            time.sleep(1)
        return conn


def _register_task(app: Celery, worker: WorkerContext, health: DeviceHealth) -> None:
    lock = ExclusiveLock()

    def is_stopping() -> bool:
        return worker.active_jobs.stopping

    @app.task(name=TASK)
    def task(job: int, attempt: int, exclusive: bool = False) -> None:
        acquire = lock.exclusive if exclusive else lock.shared
        with acquire(stop=is_stopping) as acquired:
            if not acquired:
                raise Reject("the worker is shutting down", requeue=True)
            error = run_job(worker, job=job, seen_attempt=attempt, exclusive=exclusive)
            if health.note(job, error):
                os.kill(os.getpid(), signal.SIGTERM)


def _install_signal_handlers(worker: WorkerContext, health: DeviceHealth) -> None:
    """The first SIGTERM or SIGINT stops every job at its next step; a later one exits at once."""
    first_signal_at: float | None = None

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal first_signal_at
        if first_signal_at is not None:
            if time.monotonic() - first_signal_at > SAME_SIGNAL_SECONDS:
                os._exit(1)
            return
        first_signal_at = time.monotonic()
        worker.active_jobs.request_stop()
        celery_state.should_stop = EX_OK  # type: ignore[assignment]
        threading.Thread(
            target=_exit_after_grace, args=(worker, health), name="exit", daemon=True
        ).start()

    def install(**_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    # Celery installs its own handlers while it starts; these replace them afterwards.
    signals.worker_ready.connect(install, weak=False)
    install()


def _exit_after_grace(worker: WorkerContext, health: DeviceHealth) -> None:
    """Release the jobs that do not reach their next step in time, and end the process."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and worker.active_jobs.leased():
        time.sleep(0.05)
    if worker.active_jobs.leased():
        release_all(worker)
        os._exit(health.status)


def _configure_logging(level: str, name: str) -> None:
    logging.basicConfig(
        level=level, format=f"%(asctime)s %(levelname)s {name} %(message)s", stream=sys.stderr
    )
    for noisy in ("celery", "kombu", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel("WARNING")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_shorten_celery_record)
    # Celery warns of pickled messages if it runs as root, but these are JSON. Whenever the broker
    # is lost it also announces a change of its next version.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    # A receiver keeps Celery from installing its own logging.
    signals.setup_logging.connect(lambda **_: None, weak=False)


def _shorten_celery_record(record: logging.LogRecord) -> bool:
    """Cut the traceback of a lost broker, sixty lines of redis, kombu and Celery, to its message.

    False, which drops the record, for a message that goes back to the queue at shutdown.
    """
    if record.name.startswith(("celery.worker", "celery.bootsteps")):
        record.exc_info = None
    return not (record.exc_info and record.exc_info[0] is Reject)


if __name__ == "__main__":
    main()
