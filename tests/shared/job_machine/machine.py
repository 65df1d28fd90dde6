"""The whole machine: what people ask for, and what holds after every step."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from sqlalchemy import func, select, update

from shared import jobs
from shared.db.models import FINAL_STATES, Attempt, Job, Submission
from shared.errors import InputError
from shared.jobs import AttemptRecord, Holder, Selection
from tests.shared.job_machine import invariants
from tests.shared.job_machine.model import Expected
from tests.shared.job_machine.submitting import Submitting
from tests.shared.job_machine.table import ENGINES, LEASE_SECONDS
from tests.shared.job_machine.working import Working


class JobMachine(Submitting, Working):
    """People ask for things besides; what holds is looked at after every step."""

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = self._chosen(data)
        done = jobs.cancel(self.db, Selection(jobs=tuple(one.id for one in chosen)))
        running = [one for one in chosen if one.state == "running"]
        waiting = [one for one in chosen if one.state in ("pending", "queued")]
        assert done == jobs.CancelResult(cancelled=len(waiting), requested=len(running))
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
        assert found == jobs.RetryResult(count=len(reopened), engines=engines, replaced=replaced)
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

    @rule()
    def prune(self) -> None:
        """Whatever is finished is forgotten; its messages and leases are still about."""
        chosen = jobs.find_prunable(self.db, older_than_seconds=-1)
        finished = {
            submission
            for submission in self.submissions
            if all(one.is_final for one in self.model.values() if one.submission == submission)
        }
        assert {one.submission for one in chosen} == finished
        kept = {max(self.model, default=0)} if self.db.is_sqlite else set()
        gone = [
            one.id
            for one in self.model.values()
            if one.submission in finished and one.id not in kept
        ]
        assert jobs.prune(self.db, chosen, older_than_seconds=-1) == len(gone)
        for job in gone:
            del self.model[job]
        self._forget_submissions(finished)

    def _forget_submissions(self, finished: set[int]) -> None:
        kept = {one.submission for one in self.model.values()}
        if self.db.is_sqlite:
            kept.add(max(self.submissions, default=0))
        for submission in finished - kept:
            del self.submissions[submission]
        with self.db.read() as connection:
            ids = set(connection.execute(select(Submission.id)).scalars())
        assert ids == set(self.submissions)

    def _chosen(self, data: st.DataObject) -> list[Expected]:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1, max_size=3))
        return [self.model[job] for job in ids]

    # --- what holds after every step ---

    @invariant()
    def everything_holds(self) -> None:
        with self.db.read() as connection:
            rows = list(connection.execute(select(Job.__table__)))
            attempts = list(connection.execute(select(Attempt.__table__)))
        invariants.check(rows, attempts, self.model)
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
