"""The whole machine: the rules of users, and the invariants checked after every step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import combinations
from threading import Barrier

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from sqlalchemy import func, select, update

from shared import jobs
from shared.db.models import FINAL_STATES, Attempt, Job, Submission
from shared.errors import InputError
from shared.jobs import AttemptRecord, Holder, Selection
from tests.shared.job_machine import invariants
from tests.shared.job_machine.model import ModelJob
from tests.shared.job_machine.submitting import ProducerRules
from tests.shared.job_machine.table import ENGINES, LEASE_SECONDS
from tests.shared.job_machine.working import WorkerRules


class JobMachine(ProducerRules, WorkerRules):
    """All rules: producers, workers, time and users."""

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = self._chosen(data)
        result = jobs.cancel(self.db, Selection(jobs=tuple(job.id for job in chosen)))
        running = [job for job in chosen if job.state == "running"]
        waiting = [job for job in chosen if job.state in ("pending", "queued")]
        assert result == jobs.CancelResult(cancelled=len(waiting), requested=len(running))
        for job in running:
            job.cancel_requested = True
        for job in waiting:
            job.state = "cancelled"

    @precondition(lambda self: any(job.is_final for job in self.model.values()))
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
        selection = Selection(jobs=tuple(job.id for job in chosen), error_code=error)
        final = [job for job in chosen if job.is_final and (error is None or job.error == error)]
        free = [job for job in final if not self._owned_by_another(job)]
        newest = {job.row.output: job.id for job in sorted(free, key=lambda job: job.id)}
        reopened = [job for job in free if job.id in newest.values()]
        engines = {job.row.engine for job in reopened}
        replaced = len(final) - len(reopened)
        result = jobs.retry(self.db, selection)
        assert result == jobs.RetryResult(count=len(reopened), engines=engines, replaced=replaced)
        for job in reopened:
            job.reopen()

    @precondition(lambda self: any(self._rivals()))
    @rule(data=st.data())
    def two_retries(self, data: st.DataObject) -> None:
        """Two users retry two jobs of one output at once: one of them gets it, or none."""
        rivals = data.draw(st.sampled_from(list(self._rivals())))
        owned = any(self._owned_by_another(job) for job in rivals)
        together = Barrier(2)

        def retry(job: ModelJob) -> int:
            together.wait()
            return jobs.retry(self.db, Selection(jobs=(job.id,))).count

        with ThreadPoolExecutor(2) as pool:
            counts = list(pool.map(retry, rivals))
        # The owner may be one of the two: the other cannot take its output.
        assert sum(counts) == (not owned or any(job.owns(job.row.output) for job in rivals))
        for job, count in zip(rivals, counts, strict=True):
            if count:
                job.reopen()

    def _rivals(self) -> Iterator[tuple[ModelJob, ModelJob]]:
        """Pairs of final jobs that have the same output."""
        final = [job for job in self.model.values() if job.is_final]
        for first, second in combinations(final, 2):
            if first.row.output == second.row.output:
                yield first, second

    def _owned_by_another(self, job: ModelJob) -> bool:
        return any(other.owns(job.row.output) for other in self.model.values() if other is not job)

    def _retry_with(self, job: ModelJob, seed: int) -> None:
        names = ("image", "mask", "output", "engine", "params")
        key = jobs.content_key(**{name: getattr(job.row, name) for name in names}, seed=seed)
        is_duplicate = any(other.key == key for other in self.model.values() if other is not job)
        may_run = job.is_final and not self._owned_by_another(job)
        if may_run and is_duplicate:
            with pytest.raises(InputError, match="already does exactly this"):
                jobs.retry(self.db, Selection(jobs=(job.id,)), changes={"seed": seed})
            return
        result = jobs.retry(self.db, Selection(jobs=(job.id,)), changes={"seed": seed})
        assert result.count == may_run
        if may_run:
            job.key, job.seed = key, seed
            job.reopen()

    @rule()
    def prune(self) -> None:
        """Deletes all finished jobs; messages and stale leases of them remain."""
        chosen = jobs.find_prunable(self.db, older_than_seconds=-1)
        finished = {
            submission
            for submission in self.submissions
            if all(job.is_final for job in self.model.values() if job.submission == submission)
        }
        assert {prunable.submission for prunable in chosen} == finished
        not_deleted = {max(self.model, default=0)} if self.db.is_sqlite else set()
        deleted = [
            job.id
            for job in self.model.values()
            if job.submission in finished and job.id not in not_deleted
        ]
        assert jobs.prune(self.db, chosen, older_than_seconds=-1) == len(deleted)
        for job_id in deleted:
            del self.model[job_id]
        self._remove_submissions(finished)

    def _remove_submissions(self, finished: set[int]) -> None:
        remaining = {job.submission for job in self.model.values()}
        if self.db.is_sqlite:
            remaining.add(max(self.submissions, default=0))
        for submission in finished - remaining:
            del self.submissions[submission]
        with self.db.read() as connection:
            ids = set(connection.execute(select(Submission.id)).scalars())
        assert ids == set(self.submissions)

    def _chosen(self, data: st.DataObject) -> list[ModelJob]:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.model)), min_size=1, max_size=3))
        return [self.model[job_id] for job_id in ids]

    # --- after every step ---

    @invariant()
    def the_invariants_hold(self) -> None:
        with self.db.read() as connection:
            rows = list(connection.execute(select(Job.__table__)))
            attempts = list(connection.execute(select(Attempt.__table__)))
        invariants.check(rows, attempts, self.model)
        for row in rows:
            assert row.attempt >= self.attempts_seen.get(row.id, 0), "attempts only grow"
            self.attempts_seen[row.id] = row.attempt
        tokens = [(lease.id, lease.attempt) for lease in self.leases]
        assert len(set(tokens)) == len(tokens), "at most one holder of a fencing token"
        assert set(self.ended.values()) <= {1}, "and it ends its attempt once"

    def teardown(self) -> None:
        """Whatever happened, workers that keep running finish every job."""
        for _ in range(2 * len(self.model) * jobs.LOSSES_BEFORE_QUARANTINE):
            if self._left() == 0:
                break
            self._run_all()
        assert self._left() == 0

    def _run_all(self) -> None:
        past = datetime.now(UTC) - timedelta(seconds=1)
        with self.db.write() as connection:
            connection.execute(update(Job).values(run_after=past))
            connection.execute(
                update(Job).where(Job.state == "running").values(lease_expires_at=past)
            )
        jobs.reap(self.db)
        for engine in ENGINES:
            jobs.dispatch(self.db, self.queue, engine, bound=100)  # type: ignore[arg-type]
            jobs.redeliver(self.db, self.queue, engine, grace_seconds=-1)  # type: ignore[arg-type]
        holder = Holder(worker="last", device="cpu", engine_revision="r1")
        for message in self.queue.messages:
            leased = jobs.acquire(
                self.db, job=message.job, seen_attempt=message.attempt, holder=holder,
                lease_seconds=LEASE_SECONDS,
            )  # fmt: skip
            if leased:
                jobs.succeed(self.db, leased, AttemptRecord(result_sha256="last"))
        self.queue.messages.clear()

    def _left(self) -> int:
        with self.db.read() as connection:
            unfinished = select(func.count()).where(~Job.state.in_(FINAL_STATES))
            return int(connection.execute(unfinished).scalar_one())
