"""What a worker process does besides jobs: heartbeats, cancellations, reaping, dispatch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from shared import jobs
from shared.errors import Cancelled, LeaseLost, UnavailableError
from shared.queue import Queue
from workers.run import Bench

log = logging.getLogger(__name__)

REDELIVER_SECONDS = 5.0


class Upkeep:
    """A thread that ticks until ``stop``; an unavailable service is logged, then tried again."""

    def __init__(self, bench: Bench, queue: Queue) -> None:
        self._bench = bench
        self._queue = queue
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="upkeep", daemon=True)
        settings = bench.settings
        self._duties = [
            _Duty("heartbeat", settings.heartbeat_seconds, lambda: beat(bench)),
            _Duty("reap", settings.upkeep_seconds, lambda: reap(bench)),
            _Duty("dispatch", settings.upkeep_seconds, lambda: dispatch(bench, queue)),
            _Duty("redeliver", REDELIVER_SECONDS, lambda: redeliver(bench, queue)),
        ]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        tick = min(duty.seconds for duty in self._duties)
        while not self._stop.wait(tick):
            for duty in self._duties:
                duty.run_if_due(time.monotonic())


class _Duty:
    """Something done every so many seconds; says once that it fails, and once that it works."""

    def __init__(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self.name = name
        self.seconds = seconds
        self._action = action
        self._due = 0.0
        self._failing = False

    def run_if_due(self, now: float) -> None:
        if now < self._due:
            return
        self._due = now + self.seconds
        try:
            self._action()
        except UnavailableError as error:
            if not self._failing:
                log.warning("%s: %s; trying again every %g s", self.name, error, self.seconds)
            self._failing = True
        except Exception:
            # The thread must live: without heartbeats every job of this worker is lost.
            log.exception("%s: unexpected error", self.name)
            self._failing = True
        else:
            if self._failing:
                log.info("%s: works again", self.name)
            self._failing = False


def beat(bench: Bench) -> None:
    """Renews our leases; tells jobs that were lost or cancelled to stop."""
    held = bench.running.held()
    if not held:
        return
    beats = jobs.heartbeat(
        bench.db, worker=bench.holder.worker, lease_seconds=bench.settings.lease_seconds
    )
    renewed = {(beat.job, beat.attempt): beat for beat in beats}
    for one in held:
        job, attempt = one.job.id, one.job.attempt
        beat = renewed.get((job, attempt))
        if beat is None:
            one.interruption.set(LeaseLost(f"job {job}: attempt {attempt} lost its lease"))
        elif beat.cancel_requested:
            one.interruption.set(Cancelled(f"job {job} was cancelled"))


def reap(bench: Bench) -> None:
    for lost in jobs.reap(bench.db):
        log.warning(
            "job %s: attempt %s lost its worker; now %s", lost.job, lost.attempt, lost.state
        )


def dispatch(bench: Bench, queue: Queue) -> None:
    jobs.dispatch(bench.db, queue, bench.engine.name, bound=bench.settings.queue_bound)


def redeliver(bench: Bench, queue: Queue) -> None:
    found = jobs.redeliver(bench.db, queue, bench.engine.name, grace_seconds=REDELIVER_SECONDS)
    if found:
        log.warning("queued %s jobs again whose messages Redis had lost", found)
