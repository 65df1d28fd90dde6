"""What a worker process does besides jobs: heartbeats, cancellations, reaping, dispatch."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from shared import jobs
from shared.errors import Cancelled, DatabaseUnavailable, LeaseLost, UnavailableError
from shared.jobs.queue import Queue
from shared.processes import EX_STALLED
from shared.settings import Settings
from workers.job_runner import Bench, give_back

log = logging.getLogger(__name__)

# A message that is on its way is given the time of a few rounds to arrive.
ROUNDS_BEFORE_REDELIVERY = 2.5


class Maintenance:
    """Two threads that tick until ``stop``; what is unavailable is logged, then tried again.

    Leases have a thread of their own: a Redis that hangs may not keep heartbeats waiting.
    """

    def __init__(self, bench: Bench, queue: Queue) -> None:
        settings = bench.settings
        self._stop = threading.Event()
        leases = [
            _Duty("heartbeat", settings.heartbeat_seconds, lambda: beat(bench)),
            _Duty("watch", min(settings.heartbeat_seconds, 5.0), lambda: watch(bench)),
        ]
        queues = [
            _Duty("reap", settings.maintenance_seconds, lambda: reap(bench)),
            _Duty("dispatch", settings.maintenance_seconds, lambda: dispatch(bench, queue)),
            _Duty("redeliver", redelivery_seconds(settings), lambda: redeliver(bench, queue)),
        ]
        self._threads = [
            threading.Thread(target=self._loop, args=(duties,), name=name, daemon=True)
            for name, duties in (("leases", leases), ("queues", queues))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _loop(self, duties: Sequence[_Duty]) -> None:
        tick = min(duty.seconds for duty in duties)
        while not self._stop.wait(tick):
            for duty in duties:
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
    """Renews our leases; tells jobs that were lost or cancelled to stop; gives back orphans."""
    running = bench.running
    held = running.held()
    if not held and not running.may_have_orphans:
        return
    running.may_have_orphans = False
    try:
        beats = jobs.heartbeat(
            bench.db, worker=bench.holder.worker, lease_seconds=bench.settings.lease_seconds
        )
        _release_orphans(bench, beats)
    except DatabaseUnavailable:
        running.may_have_orphans = True
        raise
    renewed = {(beat.job, beat.attempt): beat for beat in beats}
    for one in held:
        job, attempt = one.job.id, one.job.attempt
        beat = renewed.get((job, attempt))
        if beat is None:
            one.interruption.set(LeaseLost(f"job {job}: attempt {attempt} lost its lease"))
        elif beat.cancel_requested:
            one.interruption.set(Cancelled(f"job {job} was cancelled"))


def _release_orphans(bench: Bench, beats: Sequence[jobs.RenewedLease]) -> None:
    """Gives back what is leased to us and in none of our threads' hands.

    Without that we would renew it for as long as we live.
    """
    # Asked after the heartbeat: whatever it found leased is taken, or was given up, by now.
    taken = bench.running.taken()
    for beat in beats:
        if beat.job not in taken:
            jobs.release_orphan(bench.db, beat)
            log.warning("job %s: attempt %s given back: nobody here has it", beat.job, beat.attempt)


def watch(bench: Bench) -> None:
    """Ends a process whose engine hangs; its launcher gives the job back and starts another.

    A thread that is stuck in a driver or a C library cannot be stopped in any other way.
    """
    limit = bench.settings.stall_seconds
    stalled = [
        held.job.id for held in bench.running.held() if held.interruption.idle_seconds > limit
    ]
    if not stalled:
        return
    log.error(
        "job %s: no step for %g s; this process ends, its threads were at:", stalled[0], limit
    )
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    give_back(bench, keep=stalled)
    os._exit(EX_STALLED)


def reap(bench: Bench) -> None:
    for lost in jobs.reap(bench.db):
        log.warning(
            "job %s: attempt %s lost its worker; now %s", lost.job, lost.attempt, lost.state
        )


def redelivery_seconds(settings: Settings) -> float:
    return ROUNDS_BEFORE_REDELIVERY * settings.maintenance_seconds


def dispatch(bench: Bench, queue: Queue) -> None:
    jobs.dispatch(bench.db, queue, bench.engine.name, bound=bench.settings.queue_bound)


def redeliver(bench: Bench, queue: Queue) -> None:
    grace = redelivery_seconds(bench.settings)
    found = jobs.redeliver(bench.db, queue, bench.engine.name, grace_seconds=grace)
    jobs.discard_stale_messages(bench.db, queue, bench.engine.name)
    if found:
        log.warning("queued %s jobs again whose messages were lost", found)
