"""What workers, Redis and time do to jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from sqlalchemy import update

from shared import jobs
from shared.db.models import Job
from shared.errors import BrokerUnavailable, ImageError, LeaseLost, OutOfMemory
from shared.jobs import AttemptRecord, Holder, LeasedJob
from shared.jobs.queue import PRIORITY_CLASSES
from tests.shared.job_machine.model import Expected
from tests.shared.job_machine.table import (
    AT_ONCE,
    ENDS,
    ENGINES,
    LATER,
    LEASE_SECONDS,
    PAST,
    WORKERS,
    Table,
)


class Working(Table):
    @rule(engine=st.sampled_from(ENGINES), bound=st.integers(1, 3), answers=st.booleans())
    def dispatch(self, engine: str, bound: int, answers: bool) -> None:
        chosen = list(self._dispatched(engine, bound))
        for one in chosen:
            one.state = "queued"
        expected = [(one.id, one.attempt) for one in chosen] if answers else []
        assert self._published(answers, lambda: jobs.dispatch(
            self.db, self.wire, engine, bound=bound  # type: ignore[arg-type]
        )) == expected  # fmt: skip

    def _dispatched(self, engine: str, bound: int) -> Iterator[Expected]:
        """Due jobs, highest priority first, while there is room in their class."""
        for priorities in PRIORITY_CLASSES:
            of_class = [
                one
                for one in self.model.values()
                if one.row.engine == engine and one.row.priority in priorities
            ]
            room = bound - sum(one.state == "queued" for one in of_class)
            due = [one for one in of_class if one.state == "pending" and one.due]
            due.sort(key=lambda one: (-one.row.priority, one.id))
            yield from due[: max(room, 0)]

    @rule(engine=st.sampled_from(ENGINES), answers=st.booleans())
    def redeliver(self, engine: str, answers: bool) -> None:
        there = self.wire.ready_messages(engine)
        expected = {
            (one.id, one.attempt)
            for one in self.model.values()
            if one.state == "queued" and one.row.engine == engine
        } - there
        sent = self._published(answers, lambda: jobs.redeliver(
            self.db, self.wire, engine, grace_seconds=-1  # type: ignore[arg-type]
        ))  # fmt: skip
        assert sorted(sent) == sorted(expected if answers else [])

    def _published(self, answers: bool, publish: Any) -> list[tuple[int, int]]:
        before = len(self.wire.messages)
        self.wire.answers = answers
        try:
            publish()
        except BrokerUnavailable:
            assert not answers
        self.wire.answers = True
        return [(one.job, one.attempt) for one in self.wire.messages[before:]]

    @precondition(lambda self: self.wire.messages)
    @rule(data=st.data(), flush=st.booleans())
    def lose(self, data: st.DataObject, flush: bool) -> None:
        if flush:
            self.wire.messages.clear()
        else:
            self.wire.messages.remove(data.draw(st.sampled_from(self.wire.messages)))

    # --- workers ---

    @precondition(lambda self: self.wire.messages)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), stays=st.booleans())
    def acquire(self, data: st.DataObject, worker: str, stays: bool) -> None:
        """Any message, in any order; one that stays comes a second time."""
        message = data.draw(st.sampled_from(self.wire.messages))
        if not stays:
            self.wire.messages.remove(message)
        leased = jobs.acquire(
            self.db,
            job=message.job,
            seen_attempt=message.attempt,
            holder=Holder(worker=worker, device="cpu", engine_revision="r1"),
            lease_seconds=LEASE_SECONDS,
        )
        one = self.model.get(message.job)
        if one is None or one.state != "queued" or one.attempt != message.attempt:
            assert leased is None
            return
        assert leased is not None
        assert (leased.id, leased.attempt) == (one.id, one.attempt + 1)
        assert (leased.failures, leased.params.seed) == (one.failures, one.seed)
        one.state, one.worker = "running", worker
        one.outcomes.append(None)
        self.leases.append(leased)

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        beats = jobs.heartbeat(self.db, worker=worker, lease_seconds=LEASE_SECONDS)
        held = [one for one in self.model.values() if one.worker == worker]
        for one in held:
            one.expired = False
        found = {(beat.job, beat.attempt, beat.cancel_requested) for beat in beats}
        assert found == {(one.id, one.attempt, one.cancelling) for one in held}

    @precondition(lambda self: self._held())
    @rule(data=st.data(), how=ENDS, later=st.booleans())
    def end_held(self, data: st.DataObject, how: str, later: bool) -> None:
        lease = data.draw(st.sampled_from(self._held()))
        self._end(lease, how, later)
        one = self.model[lease.id]
        if how == "confirm":
            one.expired = False
            return
        self.ended[lease.id, lease.attempt] += 1
        self._expect_end(one, how, later)

    @precondition(lambda self: self._lost())
    @rule(data=st.data(), how=ENDS, later=st.booleans())
    def end_lost(self, data: st.DataObject, how: str, later: bool) -> None:
        """A worker that was thawed, or ends twice: the job has moved on, perhaps to another."""
        running = [
            lease
            for lease in self._lost()
            if lease.id in self.model and self.model[lease.id].state == "running"
        ]
        with pytest.raises(LeaseLost):
            self._end(data.draw(st.sampled_from(running or self._lost())), how, later)

    def _held(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if self._holds(lease)]

    def _lost(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if not self._holds(lease)]

    def _holds(self, lease: LeasedJob) -> bool:
        one = self.model.get(lease.id)
        return one is not None and one.state == "running" and one.attempt == lease.attempt

    def _end(self, lease: LeasedJob, how: str, later: bool) -> None:
        record = AttemptRecord(result_sha256=f"{lease.id}-{lease.attempt}")
        policy = LATER if later else AT_ONCE
        if how == "succeed":
            jobs.succeed(self.db, lease, record)
        elif how == "fail":
            jobs.fail(self.db, lease, AttemptRecord(), ImageError("no picture"), policy)
        elif how == "retry":
            jobs.fail(self.db, lease, AttemptRecord(), OutOfMemory("full"), policy)
        elif how == "release":
            jobs.release(self.db, lease, AttemptRecord())
        elif how == "cancel":
            jobs.finish_cancelled(self.db, lease, AttemptRecord())
        else:
            jobs.renew_lease(self.db, lease, lease_seconds=LEASE_SECONDS)

    def _expect_end(self, one: Expected, how: str, later: bool) -> None:
        if how in ("fail", "retry"):
            one.failures += 1
            one.error = ImageError.code if how == "fail" else OutOfMemory.code
        if how == "retry" and one.failures < AT_ONCE.max_failures:
            one.end("retried", "pending", due=not later)
        elif how in ("fail", "retry"):
            one.end("failed", "failed")
        elif how == "release":
            one.end("released", "pending")
        elif how == "cancel":
            one.end("cancelled", "cancelled")
        else:
            one.error = "output_replaced" if one.error == "output_replaced" else None
            one.results.append(f"{one.id}-{one.attempt}")
            one.end("succeeded", "succeeded")

    # --- time ---

    @rule(data=st.data())
    def time_passes(self, data: st.DataObject) -> None:
        """Whatever waits is due, and some leases have run out."""
        for one in self.model.values():
            if one.state == "pending" and not one.due:
                self._set(one, run_after=PAST)
                one.due = True
            if one.state == "running" and data.draw(st.booleans()):
                self._set(one, lease_expires_at=PAST)
                one.expired = True

    def _set(self, one: Expected, **values: Any) -> None:
        with self.db.write() as connection:
            connection.execute(update(Job).where(Job.id == one.id).values(**values))

    @rule()
    def reap(self) -> None:
        reaped = self._reaped([one for one in self.model.values() if one.expired])
        assert {(lost.job, lost.attempt, lost.state) for lost in jobs.reap(self.db)} == reaped

    def _reaped(self, lost: Sequence[Expected]) -> set[tuple[int, int, str]]:
        for one in lost:
            one.losses += 1
            if one.losses >= jobs.LOSSES_BEFORE_QUARANTINE:
                one.error = "worker_lost"
                one.end("lost", "failed")
            else:
                one.end("lost", "pending")
        return {(one.id, one.attempt, one.state) for one in lost}

    @rule(worker=st.sampled_from(WORKERS))
    def reap_worker(self, worker: str) -> None:
        """Its launcher saw the process die."""
        expected = [one for one in self.model.values() if one.worker == worker]
        reaped = self._reaped(expected)
        found = {
            (lost.job, lost.attempt, lost.state)
            for lost in jobs.reap_worker(self.db, worker=worker, reason="killed by signal 9")
        }
        assert found == reaped

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_orphan(self, data: st.DataObject) -> None:
        """A worker beats for a lease that it knows nothing of, or that is no longer its own."""
        lease = data.draw(st.sampled_from(self.leases))
        held = self._holds(lease)
        beat = jobs.RenewedLease(job=lease.id, attempt=lease.attempt, cancel_requested=False)
        jobs.release_orphan(self.db, beat)
        if held:
            one = self.model[lease.id]
            self.ended[lease.id, lease.attempt] += 1
            one.end("cancelled" if one.cancelling else "released", "pending")

    # --- what happens most, in one step ---

    @precondition(lambda self: any(one.state == "pending" for one in self.model.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), stays=st.booleans())
    def serve(self, data: st.DataObject, worker: str, stays: bool) -> None:
        for engine in ENGINES:
            self.dispatch(engine=engine, bound=3, answers=True)
        if self.wire.messages:
            self.acquire(data=data, worker=worker, stays=stays)

    @precondition(lambda self: any(one.state == "running" for one in self.model.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), taken_over=st.booleans())
    def lose_worker(self, data: st.DataObject, worker: str, taken_over: bool) -> None:
        one = data.draw(st.sampled_from([x for x in self.model.values() if x.state == "running"]))
        self._set(one, lease_expires_at=PAST)
        one.expired = True
        self.reap()
        if taken_over:
            self.serve(data=data, worker=worker, stays=False)
