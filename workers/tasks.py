"""One worker process: loads its engine, then consumes the one Celery task there is.

Started by ``inpaint-worker``, one per device. Exits 69 where the engine cannot be loaded.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from types import FrameType
from typing import Any

import click
from celery import Celery, signals
from celery.exceptions import Reject, SecurityWarning
from celery.worker import state as celery_state

from shared import embedded, schema, settings
from shared.db import Database
from shared.errors import EngineUnavailable, InpaintError
from shared.jobs import Holder
from shared.params import is_native
from shared.processes import EX_UNAVAILABLE, SAME_SIGNAL_SECONDS
from shared.queue import TASK, Queue, celery_app, queue_name
from shared.retry import RetryPolicy
from shared.settings import Settings
from shared.storage import Storage
from workers.engines import load_engine
from workers.run import Bench, Running, give_back, run_job
from workers.upkeep import Upkeep

log = logging.getLogger(__name__)

EX_OK = 0
JOB_THREADS_PER_BATCH = 2
GRACE_SECONDS = 2.0
SWITCH_SECONDS = 0.0005


@click.command()
@click.option("--engine", required=True)
@click.option("--device", required=True)
@click.option("--name", required=True, help="Host and device.")
@click.option("--concurrency", type=int, required=True)
@click.option("--max-batch", type=int, required=True)
@click.option("--check", is_flag=True, help="Load the engine, print one line, exit.")
def main(
    engine: str, device: str, name: str, concurrency: int, max_batch: int, check: bool
) -> None:
    try:
        configured = settings.load()
        _configure_logging(configured.log_level, name)
        loaded = load_engine(engine, device=device, max_batch=max_batch)
        if check:
            click.echo(f"{loaded.name}: {loaded.revision} on {loaded.device}")
            loaded.close()
            return
        bench = _bench(configured, loaded, name)
    except EngineUnavailable as error:
        click.echo(f"inpaint-worker: {error}", err=True)
        sys.exit(EX_UNAVAILABLE)
    except InpaintError as error:
        click.echo(f"inpaint-worker: {error}", err=True)
        sys.exit(1)
    threads = concurrency or _default_concurrency(engine, max_batch)
    sys.exit(_consume(bench, name, threads))


def _default_concurrency(engine: str, max_batch: int) -> int:
    """Enough jobs in hand that fetching, decoding and encoding never keep the device waiting."""
    return os.cpu_count() or 1 if is_native(engine) else JOB_THREADS_PER_BATCH * max_batch


def _bench(configured: Settings, engine: Any, name: str) -> Bench:
    db = Database(configured.database, pool_size=16)
    schema.ensure(db)
    worker = f"{name}-{os.getpid()}-{secrets.token_hex(2)}"
    return Bench(
        settings=configured,
        db=db,
        storage=Storage(roots=configured.roots, buckets=configured.buckets),
        engine=engine,
        holder=Holder(worker=worker, device=engine.device, engine_revision=engine.revision),
        running=Running(),
        retry=RetryPolicy(
            max_failures=configured.max_failures,
            base_seconds=configured.retry_base_seconds,
            cap_seconds=configured.retry_cap_seconds,
        ),
    )


def _consume(bench: Bench, name: str, threads: int) -> int:
    """Runs Celery until a signal; returns the process's exit status."""
    # Job threads wait on small I/O many times a job; with the usual 5 ms each of them would
    # wait that long for the interpreter whenever another thread decodes or composites.
    sys.setswitchinterval(SWITCH_SECONDS)
    url = embedded.broker_url(bench.settings)
    app = celery_app(url, engines=[bench.engine.name])
    _register(app, bench)
    _install_signals(bench)
    upkeep = Upkeep(bench, Queue(url))
    upkeep.start()
    log.info("%s on %s: %s jobs at a time", bench.engine.name, bench.engine.device, threads)
    worker = app.Worker(
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
        bench.engine.close()
        upkeep.stop()
        bench.db.close()
    return int(worker.exitcode or 0)


def _register(app: Celery, bench: Bench) -> None:
    @app.task(name=TASK)
    def task(job: int, attempt: int) -> None:
        if bench.running.stopping:
            raise Reject("the worker is shutting down", requeue=True)
        ended = run_job(bench, job=job, seen_attempt=attempt)
        if ended is not None and ended.code == "device_lost":
            # CUDA does not recover inside a process; the launcher starts a fresh one.
            os.kill(os.getpid(), signal.SIGTERM)


def _install_signals(bench: Bench) -> None:
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
        threading.Thread(target=_leave, args=(bench,), name="leave", daemon=True).start()

    def install(**_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    # Celery installs its own handlers while it starts; ours come after them.
    signals.worker_ready.connect(install, weak=False)
    install()


def _leave(bench: Bench) -> None:
    """Ends the process where a step takes too long to wait for; its jobs go back first."""
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and bench.running.held():
        time.sleep(0.05)
    if bench.running.held():
        give_back(bench)
        os._exit(0)


def _configure_logging(level: str, name: str) -> None:
    logging.basicConfig(
        level=level, format=f"%(asctime)s %(levelname)s {name} %(message)s", stream=sys.stderr
    )
    for noisy in ("celery", "kombu", "botocore", "PIL"):
        logging.getLogger(noisy).setLevel("WARNING")
    # Celery warns root of pickled messages; ours are JSON.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    signals.setup_logging.connect(lambda **_: None, weak=False)


if __name__ == "__main__":
    main()
