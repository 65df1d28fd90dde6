"""Jobs driven at random by several workers over lost, doubled and reordered messages.

A model in plain Python says what each call does. Time passes where the machine says so: a
lease or a wait is moved into the past in the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import delete, func, select, update

from shared import jobs, submissions
from shared.db import Database
from shared.errors import BrokerUnavailable, ImageError, InputError, LeaseLost, OutOfMemory
from shared.jobs import AttemptRecord, Holder, LeasedJob, Selection
from shared.models import FINAL_STATES, Attempt, Job, Submission
from shared.queue import PRIORITY_CLASSES
from shared.retry import RetryPolicy
from shared.submissions import NewJob
from tests.job_table import Longest, new_job
from tests.shared import job_invariants
from tests.shared.job_model import Expected, Wire

ENGINES = ("opencv", "sd2")
WORKERS = ("w1", "w2", "w3")
PICTURES = 4
LEASE_SECONDS = 3600.0
AT_ONCE = RetryPolicy(max_failures=3, base_seconds=0, cap_seconds=0)
LATER = RetryPolicy(max_failures=3, base_seconds=3600, cap_seconds=3600, random=Longest())
ENDS = st.sampled_from(["succeed", "fail", "retry", "release", "cancel", "confirm"])
PAST = datetime(2020, 1, 1, tzinfo=UTC)


class JobMachine(RuleBasedStateMachine):
    def __init__(self, db: Database) -> None:
        super().__init__()
        self.db = db
        self.wire = Wire()
        self.model: dict[int, Expected] = {}
        self.leases: list[LeasedJob] = []
        self.submissions: dict[int, list[NewJob]] = {}
        self.ended: Counter[tuple[int, int]] = Counter()
        self.attempts_seen: dict[int, int] = {}
        with db.write() as connection:
            for kind in (Attempt, Job, Submission):
                connection.execute(delete(kind))

    # --- the producer ---

    @initialize()
    def start(self) -> None:
        self.submit("opencv", 0, [1, 2], cut_off=0, force=False)

    @rule(
        engine=st.sampled_from(ENGINES),
        priority=st.sampled_from([-7, 0, 0, 5, 9]),
        pictures=st.lists(st.integers(1, PICTURES), min_size=1, max_size=4, unique=True),
        cut_off=st.sampled_from([0, 0, 0, 1, 2]),
        force=st.booleans(),
    )
    def submit(
        self, engine: str, priority: int, pictures: list[int], cut_off: int, force: bool
    ) -> None:
        """A manifest; its producer dies before the last ``cut_off`` rows."""
        rows = [
            new_job(
                line,
                image=f"/pictures/{picture}.png",
                mask="alpha",
                output=f"/results/{picture}.png",
                engine=engine,
                priority=priority,
            )
            for line, picture in enumerate(pictures, start=2)
        ]
        submission = self._open(str(len(self.submissions)), resumed=False)
        self.submissions[submission] = rows
        self._record(submission, rows[: len(rows) - cut_off], force)

    @rule(data=st.data(), force=st.booleans())
    def submit_again(self, data: st.DataObject, force: bool) -> None:
        """The same manifest, which knows some rows, or all."""
        submission = data.draw(st.sampled_from(sorted(self.submissions)))
        digest = str(sorted(self.submissions).index(submission))
        assert self._open(digest, resumed=True) == submission
        self._record(submission, self.submissions[submission], force)

    def _open(self, digest: str, *, resumed: bool) -> int:
        opened = submissions.open_submission(
            self.db, manifest="/m.csv", digest=digest, options="{}", rows=0, invalid=0
        )
        assert opened.resumed == resumed
        return opened.id

    def _record(self, submission: int, rows: list[NewJob], force: bool) -> None:
        taken = list(self._taken(submission, rows, force))
        if taken and not force:
            with pytest.raises(InputError, match="is written by job"):
                submissions.record(self.db, submission, rows)
            return
        for one in taken:
            one.supersede()
        added = [row for row in rows if self._add(submission, row)]
        existing = submissions.record(self.db, submission, rows, replace=force)
        assert existing == [row for row in rows if not any(row is one for one in added)]
        self._learn_ids()
        if force:
            self._rerun(submission, existing)

    def _taken(self, submission: int, rows: list[NewJob], force: bool) -> Iterator[Expected]:
        """The jobs that write the rows' outputs and ask for something else."""
        known = set() if force else {one.key for one in self.model.values()}
        for one in self.model.values():
            for row in rows:
                own = one.key == row.content_key or one.place == (submission, row.line)
                if one.owns(row.output) and not own and row.content_key not in known:
                    yield one

    def _add(self, submission: int, row: NewJob) -> bool:
        """Whether the model takes the row: its work is new, and so is its line."""
        for one in self.model.values():
            if one.key == row.content_key or one.place == (submission, row.line):
                return False
        number = -1 - len(self.model)
        self.model[number] = Expected(
            id=number,
            row=row,
            submission=submission,
            line=row.line,
            key=row.content_key,
            seed=row.seed,
        )
        return True

    def _learn_ids(self) -> None:
        with self.db.read() as connection:
            ids = {row.content_key: row.id for row in connection.execute(select(Job))}
        for one in list(self.model.values()):
            if one.id < 0:
                del self.model[one.id]
                one.id = ids[one.key]
                assert one.id not in self.model
                self.model[one.id] = one

    def _rerun(self, submission: int, rows: list[NewJob]) -> None:
        keys = {row.content_key: (submission, row.line) for row in rows}
        reopened = 0
        for key, place in sorted(keys.items()):
            for one in self.model.values():
                if one.key == key and one.is_final:
                    if place not in {other.place for other in self.model.values()}:
                        one.submission, one.line = place
                    one.reopen()
                    reopened += 1
        assert jobs.rerun(self.db, keys, replace=True) == reopened
        self._restore(submission, rows)

    def _restore(self, submission: int, rows: list[NewJob]) -> None:
        restored = 0
        for row in rows:
            keys = {one.key for one in self.model.values()}
            here = [one for one in self.model.values() if one.place == (submission, row.line)]
            if row.content_key not in keys and here and here[0].is_final:
                here[0].key, here[0].seed = row.content_key, row.seed
                here[0].reopen()
                restored += 1
        assert jobs.restore(self.db, submission, rows) == restored

    # --- messages ---

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
        there = self.wire.waiting(engine)
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
        running = [lease for lease in self._lost() if self.model[lease.id].state == "running"]
        with pytest.raises(LeaseLost):
            self._end(data.draw(st.sampled_from(running or self._lost())), how, later)

    def _held(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if self._holds(lease)]

    def _lost(self) -> list[LeasedJob]:
        return [lease for lease in self.leases if not self._holds(lease)]

    def _holds(self, lease: LeasedJob) -> bool:
        one = self.model[lease.id]
        return one.state == "running" and one.attempt == lease.attempt

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
            jobs.confirm(self.db, lease, lease_seconds=LEASE_SECONDS)

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
        beat = jobs.Beat(job=lease.id, attempt=lease.attempt, cancel_requested=False)
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

    # --- people ---

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = self._chosen(data)
        done = jobs.cancel(self.db, Selection(jobs=tuple(one.id for one in chosen)))
        running = [one for one in chosen if one.state == "running"]
        waiting = [one for one in chosen if one.state in ("pending", "queued")]
        assert done == jobs.Cancellation(cancelled=len(waiting), requested=len(running))
        for one in running:
            one.cancelling = True
        for one in waiting:
            one.state = "cancelled"

    @precondition(lambda self: any(one.is_final for one in self.model.values()))
    @rule(
        data=st.data(),
        error=st.sampled_from([None, None, "bad_image", "worker_lost"]),
        seed=st.sampled_from([None, None, 1, 2]),
    )
    def retry(self, data: st.DataObject, error: str | None, seed: int | None) -> None:
        if seed is not None:
            self._retry_with(data.draw(st.sampled_from(list(self.model.values()))), seed)
            return
        chosen = self._chosen(data)
        selection = Selection(jobs=tuple(one.id for one in chosen), error_code=error)
        final = [one for one in chosen if one.is_final and (error is None or one.error == error)]
        free = [one for one in final if not self._owned_by_another(one)]
        newest = {one.row.output: one.id for one in sorted(free, key=lambda one: one.id)}
        reopened = [one for one in free if one.id in newest.values()]
        engines = {one.row.engine for one in reopened}
        replaced = len(final) - len(reopened)
        found = jobs.retry(self.db, selection)
        assert found == jobs.Reopened(count=len(reopened), engines=engines, replaced=replaced)
        for one in reopened:
            one.reopen()

    def _owned_by_another(self, one: Expected) -> bool:
        return any(x.owns(one.row.output) for x in self.model.values() if x is not one)

    def _retry_with(self, one: Expected, seed: int) -> None:
        names = ("image", "mask", "output", "engine", "params")
        key = jobs.content_key(**{name: getattr(one.row, name) for name in names}, seed=seed)
        taken = any(other.key == key for other in self.model.values() if other is not one)
        may_run = one.is_final and not self._owned_by_another(one)
        if may_run and taken:
            with pytest.raises(InputError, match="already does exactly this"):
                jobs.retry(self.db, Selection(jobs=(one.id,)), changes={"seed": seed})
            return
        found = jobs.retry(self.db, Selection(jobs=(one.id,)), changes={"seed": seed})
        assert found.count == may_run
        if may_run:
            one.key, one.seed = key, seed
            one.reopen()

    def _chosen(self, data: st.DataObject) -> list[Expected]:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1, max_size=3))
        return [self.model[job] for job in ids]

    # --- what holds after every step ---

    @invariant()
    def everything_holds(self) -> None:
        with self.db.read() as connection:
            rows = list(connection.execute(select(Job.__table__)))
            attempts = list(connection.execute(select(Attempt.__table__)))
        job_invariants.check(rows, attempts, self.model)
        for row in rows:
            assert row.attempt >= self.attempts_seen.get(row.id, 0), "attempts count up"
            self.attempts_seen[row.id] = row.attempt
        tokens = [(lease.id, lease.attempt) for lease in self.leases]
        assert len(set(tokens)) == len(tokens), "one holder at most may write"
        assert set(self.ended.values()) <= {1}, "and end its attempt once"

    def teardown(self) -> None:
        """However it went, a fleet that lives on brings every job to its end."""
        for _ in range(2 * len(self.model) * jobs.LOSSES_BEFORE_QUARANTINE):
            if self._left() == 0:
                break
            self._work()
        assert self._left() == 0

    def _work(self) -> None:
        far = datetime.now(UTC) - timedelta(seconds=1)
        with self.db.write() as connection:
            connection.execute(update(Job).values(run_after=far))
            connection.execute(
                update(Job).where(Job.state == "running").values(lease_expires_at=far)
            )
        jobs.reap(self.db)
        for engine in ENGINES:
            jobs.dispatch(self.db, self.wire, engine, bound=100)  # type: ignore[arg-type]
            jobs.redeliver(self.db, self.wire, engine, grace_seconds=-1)  # type: ignore[arg-type]
        holder = Holder(worker="last", device="cpu", engine_revision="r1")
        for message in self.wire.messages:
            leased = jobs.acquire(
                self.db, job=message.job, seen_attempt=message.attempt, holder=holder,
                lease_seconds=LEASE_SECONDS,
            )  # fmt: skip
            if leased:
                jobs.succeed(self.db, leased, AttemptRecord(result_sha256="last"))
        self.wire.messages.clear()

    def _left(self) -> int:
        with self.db.read() as connection:
            open_ones = select(func.count()).where(~Job.state.in_(FINAL_STATES))
            return int(connection.execute(open_ones).scalar_one())
