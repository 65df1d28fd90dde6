"""Periodic tasks of a worker process: heartbeats, cancellations, reaping, dispatch."""

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
from workers.job_context import JobContext
from workers.job_runner import release_all
from workers.lease_watch import LeaseWatch
from workers.worker_context import WorkerContext

log = logging.getLogger(__name__)

# A message needs a few intervals to arrive before it counts as lost.
INTERVALS_BEFORE_REDELIVERY = 2.5
MAX_STALL_CHECK_SECONDS = 5.0
# Between two looks at the leases of other workers; a longer pause was an outage or a suspension.
INTERVALS_BEFORE_GAP = 2


class Maintenance:
    """Two threads that run periodic tasks until ``stop``.

    Leases have a thread of their own: a Redis that hangs must not delay heartbeats.
    """

    def __init__(self, worker: WorkerContext, queue: Queue) -> None:
        settings = worker.settings
        heartbeat, interval = settings.heartbeat_seconds, settings.maintenance_seconds
        stall_check = min(heartbeat, MAX_STALL_CHECK_SECONDS)
        leases = [
            _PeriodicTask("heartbeat", heartbeat, lambda: renew_leases(worker)),
            _PeriodicTask("stall check", stall_check, lambda: exit_if_stalled(worker)),
        ]
        watch = LeaseWatch(
            lease_seconds=settings.lease_seconds, max_gap_seconds=INTERVALS_BEFORE_GAP * interval
        )
        queues = [
            _PeriodicTask("reap", interval, lambda: reap_abandoned_leases(worker, watch)),
            _PeriodicTask("dispatch", interval, lambda: dispatch_due_jobs(worker, queue)),
            _PeriodicTask(
                "redeliver", redelivery_seconds(settings), lambda: redeliver(worker, queue)
            ),
        ]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(tasks,), name=name, daemon=True)
            for name, tasks in (("leases", leases), ("queues", queues))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _loop(self, tasks: Sequence[_PeriodicTask]) -> None:
        interval = min(task.seconds for task in tasks)
        while not self._stop.wait(interval):
            for task in tasks:
                task.run_if_due(time.monotonic())


class _PeriodicTask:
    """Runs an action every ``seconds``; logs once when it fails, and once when it works again."""

    def __init__(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self.name = name
        self.seconds = seconds
        self._action = action
        self._due = 0.0
        self._is_failing = False

    def run_if_due(self, now: float) -> None:
        """now: monotonic, in seconds."""
        if now < self._due:
            return
        self._due = now + self.seconds
        try:
            self._action()
        except UnavailableError as error:
            if not self._is_failing:
                log.warning("%s: %s; trying again every %g s", self.name, error, self.seconds)
            self._is_failing = True
        except Exception:
            # The thread must live: without heartbeats this worker loses every job.
            log.exception("%s: unexpected error", self.name)
            self._is_failing = True
        else:
            if self._is_failing:
                log.info("%s: works again", self.name)
            self._is_failing = False


def renew_leases(worker: WorkerContext) -> None:
    """Renew this worker's leases; interrupt jobs that lost theirs or were cancelled."""
    active_jobs = worker.active_jobs
    leased = active_jobs.leased()
    if not leased and not active_jobs.may_have_orphans:
        return
    active_jobs.may_have_orphans = False
    try:
        renewed = jobs.heartbeat(
            worker.maintenance_db,
            worker=worker.holder.worker,
            lease_seconds=worker.settings.lease_seconds,
        )
        _release_orphans(worker, renewed)
    except DatabaseUnavailable:
        active_jobs.may_have_orphans = True
        raise
    _interrupt_lost_and_cancelled(leased, renewed)


def _interrupt_lost_and_cancelled(
    leased: Sequence[JobContext], renewed: Sequence[jobs.RenewedLease]
) -> None:
    by_attempt = {(lease.job, lease.attempt): lease for lease in renewed}
    for job in leased:
        attempt = job.leased.attempt
        lease = by_attempt.get((job.id, attempt))
        if lease is None:
            job.interruption.set(LeaseLost(f"job {job.id}: attempt {attempt} lost its lease"))
        elif lease.cancel_requested:
            job.interruption.set(Cancelled(f"job {job.id} was cancelled"))


def _release_orphans(worker: WorkerContext, renewed: Sequence[jobs.RenewedLease]) -> None:
    """Release jobs that are leased to this worker but that none of its threads handles.

    Otherwise heartbeats would renew such a lease for as long as the worker lives.
    """
    # Read after the heartbeat: every job that it renewed is claimed by now, or has just ended.
    claimed = worker.active_jobs.claimed_ids()
    for lease in renewed:
        if lease.job not in claimed:
            jobs.release_orphan(worker.maintenance_db, lease)
            log.warning(
                "job %s: attempt %s released: leased to this worker but not running here",
                lease.job,
                lease.attempt,
            )


def exit_if_stalled(worker: WorkerContext) -> None:
    """End the process if a job makes no step for ``stall_seconds``; the supervisor restarts it.

    Nothing else stops a thread that hangs in a driver or a C library.
    """
    limit = worker.settings.stall_seconds
    stalled = [
        job.id for job in worker.active_jobs.leased() if job.interruption.idle_seconds > limit
    ]
    if not stalled:
        return
    log.error("job %s: no step for %g s; this process ends, its threads are at:", stalled[0], limit)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    # The stalled jobs keep their leases: the supervisor's reaping counts them as lost.
    release_all(worker, keep=stalled)
    os._exit(EX_STALLED)


def reap_abandoned_leases(worker: WorkerContext, watch: LeaseWatch) -> None:
    """End the attempts of lost workers; never those of this worker, which knows what it runs."""
    leases = jobs.running_leases(worker.maintenance_db, except_of=worker.holder.worker)
    abandoned = watch.abandoned(leases, time.monotonic())
    for lost in jobs.reap(worker.maintenance_db, abandoned):
        log.warning(
            "job %s: attempt %s lost its worker; now %s", lost.job, lost.attempt, lost.state
        )


def redelivery_seconds(settings: Settings) -> float:
    return INTERVALS_BEFORE_REDELIVERY * settings.maintenance_seconds


def dispatch_due_jobs(worker: WorkerContext, queue: Queue) -> None:
    jobs.dispatch(
        worker.maintenance_db, queue, worker.engine.name, bound=worker.settings.queue_bound
    )


def redeliver(worker: WorkerContext, queue: Queue) -> None:
    """Publish again the messages that Redis lost, and discard those that are stale."""
    grace = redelivery_seconds(worker.settings)
    count = jobs.redeliver(worker.maintenance_db, queue, worker.engine.name, grace_seconds=grace)
    jobs.discard_stale_messages(worker.maintenance_db, queue, worker.engine.name)
    if count:
        log.warning("queued %s jobs again whose messages were lost", count)
