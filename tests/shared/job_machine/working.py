"""The rules of workers, of Redis and of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from sqlalchemy import update

from shared import jobs
from shared.db.models import Job
from shared.errors import BrokerUnavailable, Cancelled, ImageError, LeaseLost, OutOfMemory
from shared.jobs import AttemptRecord, Holder, LeasedJob
from shared.jobs.queue import PRIORITY_CLASSES
from tests.shared.job_machine.model import ModelJob
from tests.shared.job_machine.table import (
    ENDS,
    ENGINES,
    LEASE_SECONDS,
    PAST,
    RETRY_AT_ONCE,
    RETRY_LATER,
    WORKERS,
    MachineState,
)


class WorkerRules(MachineState):
    @rule(engine=st.sampled_from(ENGINES), bound=st.integers(1, 3), answers=st.booleans())
    def dispatch(self, engine: str, bound: int, answers: bool) -> None:
        chosen = list(self._dispatched(engine, bound))
        for job in chosen:
            job.state = "queued"
        expected = [(job.id, job.attempt) for job in chosen] if answers else []
        assert self._published(answers, lambda: jobs.dispatch(
            self.db, self.queue, engine, bound=bound  # type: ignore[arg-type]
        )) == expected  # fmt: skip

    def _dispatched(self, engine: str, bound: int) -> Iterator[ModelJob]:
        """Due jobs, highest priority first, while there is room in their class."""
        for priorities in PRIORITY_CLASSES:
            of_class = [
                job
                for job in self.model.values()
                if job.row.engine == engine and job.row.priority in priorities
            ]
            room = bound - sum(job.state == "queued" for job in of_class)
            due = [job for job in of_class if job.state == "pending" and job.due]
            due.sort(key=lambda job: (-job.row.priority, job.id))
            yield from due[: max(room, 0)]

    @rule(engine=st.sampled_from(ENGINES), answers=st.booleans())
    def redeliver(self, engine: str, answers: bool) -> None:
        ready = self.queue.ready_messages(engine)
        expected = {
            (job.id, job.attempt)
            for job in self.model.values()
            if job.state == "queued" and job.row.engine == engine
        } - ready
        sent = self._published(answers, lambda: jobs.redeliver(
            self.db, self.queue, engine, grace_seconds=-1  # type: ignore[arg-type]
        ))  # fmt: skip
        assert sorted(sent) == sorted(expected if answers else [])

    def _published(self, answers: bool, publish: Any) -> list[tuple[int, int]]:
        before = len(self.queue.messages)
        self.queue.answers = answers
        try:
            publish()
        except BrokerUnavailable:
            assert not answers
        self.queue.answers = True
        return [message.id for message in self.queue.messages[before:]]

    @precondition(lambda self: self.queue.messages)
    @rule(data=st.data(), flush=st.booleans())
    def lose_messages(self, data: st.DataObject, flush: bool) -> None:
        if flush:
            self.queue.messages.clear()
        else:
            self.queue.messages.remove(data.draw(st.sampled_from(self.queue.messages)))

    # --- workers ---

    @precondition(lambda self: self.queue.messages)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), stays=st.booleans())
    def acquire(self, data: st.DataObject, worker: str, stays: bool) -> None:
        """Any message, in any order; one that ``stays`` is delivered twice."""
        message = data.draw(st.sampled_from(self.queue.messages))
        if not stays:
            self.queue.messages.remove(message)
        leased = jobs.acquire(
            self.db,
            job=message.job,
            seen_attempt=message.attempt,
            holder=Holder(worker=worker, device="cpu", engine_revision="r1"),
            lease_seconds=LEASE_SECONDS,
        )
        job = self.model.get(message.job)
        if job is None or job.state != "queued" or job.attempt != message.attempt:
            assert leased is None
            return
        assert leased is not None
        assert (leased.id, leased.attempt) == (job.id, job.attempt + 1)
        assert (leased.failures, leased.params.seed) == (job.failures, job.seed)
        job.state, job.worker = "running", worker
        job.outcomes.append(None)
        self.leases.append(leased)

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        renewed = jobs.heartbeat(self.db, worker=worker, lease_seconds=LEASE_SECONDS)
        leased = [job for job in self.model.values() if job.worker == worker]
        for job in leased:
            job.expired = False
        actual = {(lease.job, lease.attempt, lease.cancel_requested) for lease in renewed}
        assert actual == {(job.id, job.attempt, job.cancel_requested) for job in leased}

    @precondition(lambda self: self._current_leases())
    @rule(data=st.data(), how=ENDS, later=st.booleans())
    def end_held(self, data: st.DataObject, how: str, later: bool) -> None:
        lease = data.draw(st.sampled_from(self._current_leases()))
        job = self.model[lease.id]
        if how == "renew" and job.is_stopping:
            with pytest.raises(Cancelled, match="another submission now writes"):
                self._end(lease, how, later)
            return
        self._end(lease, how, later)
        if how == "renew":
            job.expired = False
            return
        self.ended[lease.id, lease.attempt] += 1
        self._expect_end(job, how, later)

    @precondition(lambda self: self._lost_leases())
    @rule(data=st.data(), how=ENDS, later=st.booleans())
    def end_lost(self, data: st.DataObject, how: str, later: bool) -> None:
        """A worker that was suspended, or ends an attempt twice, after the job has moved on."""
        running = [
            lease
            for lease in self._lost_leases()
            if lease.id in self.model and self.model[lease.id].state == "running"
        ]
        with pytest.raises(LeaseLost):
            self._end(data.draw(st.sampled_from(running or self._lost_leases())), how, later)

    def _current_leases(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if self._holds(lease)]

    def _lost_leases(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if not self._holds(lease)]

    def _holds(self, lease: LeasedJob) -> bool:
        job = self.model.get(lease.id)
        return job is not None and job.state == "running" and job.attempt == lease.attempt

    def _end(self, lease: LeasedJob, how: str, later: bool) -> None:
        record = AttemptRecord(result_sha256=f"{lease.id}-{lease.attempt}")
        policy = RETRY_LATER if later else RETRY_AT_ONCE
        if how == "succeed":
            jobs.succeed(self.db, lease, record)
        elif how == "fail":
            jobs.fail(self.db, lease, AttemptRecord(), ImageError("not an image"), policy)
        elif how == "retry":
            jobs.fail(self.db, lease, AttemptRecord(), OutOfMemory("full"), policy)
        elif how == "release":
            jobs.release(self.db, lease, AttemptRecord())
        elif how == "cancel":
            jobs.finish_cancelled(self.db, lease, AttemptRecord())
        else:
            jobs.renew_lease(self.db, lease, lease_seconds=LEASE_SECONDS)

    def _expect_end(self, job: ModelJob, how: str, later: bool) -> None:
        if how in ("fail", "retry"):
            job.failures += 1
            job.error = ImageError.code if how == "fail" else OutOfMemory.code
        if how == "retry" and job.failures < RETRY_AT_ONCE.max_failures:
            job.end("retried", "pending", due=not later)
        elif how in ("fail", "retry"):
            job.end("failed", "failed")
        elif how == "release":
            job.end("released", "pending")
        elif how == "cancel":
            job.end("cancelled", "cancelled")
        else:
            job.error = "output_replaced" if job.error == "output_replaced" else None
            job.results.append(f"{job.id}-{job.attempt}")
            job.end("succeeded", "succeeded")

    # --- time ---

    @rule(data=st.data())
    def time_passes(self, data: st.DataObject) -> None:
        """All pending jobs become due, and some leases expire."""
        for job in self.model.values():
            if job.state == "pending" and not job.due:
                self._set(job, run_after=PAST)
                job.due = True
            if job.state == "running" and data.draw(st.booleans()):
                self._set(job, lease_expires_at=PAST)
                job.expired = True

    def _running(self) -> list[ModelJob]:
        return [job for job in self.model.values() if job.state == "running"]

    def _set(self, job: ModelJob, **values: Any) -> None:
        with self.db.write() as connection:
            connection.execute(update(Job).where(Job.id == job.id).values(**values))

    @rule()
    def reap(self) -> None:
        reaped = self._reaped([job for job in self.model.values() if job.expired])
        assert {(lost.job, lost.attempt, lost.state) for lost in jobs.reap(self.db)} == reaped

    def _reaped(self, lost: Sequence[ModelJob]) -> set[tuple[int, int, str]]:
        for job in lost:
            job.losses += 1
            if job.losses >= jobs.LOSSES_BEFORE_QUARANTINE:
                job.error = "worker_lost"
                job.end("lost", "failed")
            else:
                job.end("lost", "pending")
        return {(job.id, job.attempt, job.state) for job in lost}

    @rule(worker=st.sampled_from(WORKERS))
    def reap_worker(self, worker: str) -> None:
        """The supervisor saw the worker process exit."""
        expected = [job for job in self.model.values() if job.worker == worker]
        reaped = self._reaped(expected)
        actual = {
            (lost.job, lost.attempt, lost.state)
            for lost in jobs.reap_worker(self.db, worker=worker, reason="killed by signal 9")
        }
        assert actual == reaped

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_orphan(self, data: st.DataObject) -> None:
        """A worker releases a lease that none of its threads runs, or that it lost since."""
        lease = data.draw(st.sampled_from(self.leases))
        holds_lease = self._holds(lease)
        renewed = jobs.RenewedLease(job=lease.id, attempt=lease.attempt, cancel_requested=False)
        jobs.release_orphan(self.db, renewed)
        if holds_lease:
            job = self.model[lease.id]
            self.ended[lease.id, lease.attempt] += 1
            job.end("cancelled" if job.cancel_requested else "released", "pending")

    # --- frequent sequences as one step ---

    @precondition(lambda self: any(job.state == "pending" for job in self.model.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), stays=st.booleans())
    def dispatch_and_acquire(self, data: st.DataObject, worker: str, stays: bool) -> None:
        for engine in ENGINES:
            self.dispatch(engine=engine, bound=3, answers=True)
        if self.queue.messages:
            self.acquire(data=data, worker=worker, stays=stays)

    @precondition(lambda self: any(job.state == "running" for job in self.model.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), reacquired=st.booleans())
    def lose_worker(self, data: st.DataObject, worker: str, reacquired: bool) -> None:
        job = data.draw(st.sampled_from(self._running()))
        self._set(job, lease_expires_at=PAST)
        job.expired = True
        self.reap()
        if reacquired:
            self.dispatch_and_acquire(data=data, worker=worker, stays=False)
