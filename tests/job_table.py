"""The job table for tests: add jobs, take them through their states, and inspect them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select, update

from shared import jobs
from shared.db import Database
from shared.db.models import Attempt, Job, Submission
from shared.jobs import AttemptRecord, Holder, LeasedJob, Selection, submissions
from shared.jobs.queue import Message
from shared.jobs.retry import RetryPolicy
from shared.jobs.submissions import NewJob
from shared.params import Params

ENGINE = "opencv"
LEASE_SECONDS = 60.0


class UpperBound(random.Random):
    """Always returns the upper bound, so that the jitter of a wait is known."""

    def uniform(self, a: float, b: float) -> float:
        return b


RETRY_AT_ONCE = RetryPolicy(max_failures=5, base_seconds=0, cap_seconds=0)
RETRY_LATER = RetryPolicy(max_failures=5, base_seconds=30, cap_seconds=900, random=UpperBound())


@dataclass
class RecordingQueue:
    """Records published messages instead of sending them."""

    messages: list[Message] = field(default_factory=list)

    def publish(self, messages: Sequence[Message]) -> None:
        self.messages.extend(messages)


def new_job(line: int, **changes: Any) -> NewJob:
    """A row as the producer records it; ``content_key`` is computed unless given."""
    params = changes.pop("params", Params())
    row = NewJob(
        line=line,
        key=f"sku-{line}",
        content_key=b"",
        engine=ENGINE,
        image=f"/images/{line}.png",
        mask=f"/masks/{line}.png",
        output=f"/results/{line}.png",
        params=params.to_json(),
        seed=params.seed,
        priority=0,
    )
    row = replace(row, **changes)
    if row.content_key:
        return row
    names = ("image", "mask", "output", "engine", "params", "seed")
    return replace(row, content_key=jobs.content_key(**{n: getattr(row, n) for n in names}))


class JobTable:
    """Shortcuts for the operations on jobs. Jobs are given by their numbers."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._lines = 1

    def submission(self, digest: str = "digest", *, manifest: str = "/m.csv") -> int:
        opened = submissions.open_submission(
            self.db, manifest=manifest, digest=digest, options="{}", rows=1, invalid=0
        )
        return opened.id

    def add(self, count: int = 1, *, submission: int | None = None, **changes: Any) -> list[int]:
        """Adds pending jobs on the next lines; returns their numbers."""
        owner = self.submission() if submission is None else submission
        rows = [new_job(self._lines + n, **changes) for n in range(1, count + 1)]
        self._lines += count
        assert submissions.record(self.db, owner, rows) == []
        keys = [row.content_key for row in rows]
        with self.db.read() as connection:
            return list(
                connection.execute(
                    select(Job.id).where(Job.content_key.in_(keys)).order_by(Job.id)
                ).scalars()
            )

    def add_one(self, **changes: Any) -> int:
        return self.add(**changes)[0]

    def dispatch(self, *, bound: int = 1000, engine: str = ENGINE) -> list[Message]:
        """Queues the due jobs; returns their messages in publishing order."""
        queue = RecordingQueue()
        jobs.dispatch(self.db, queue, engine, bound=bound)  # type: ignore[arg-type]
        return queue.messages

    def acquire(
        self, job: int, *, seen: int = 0, worker: str = "w1", lease: float = LEASE_SECONDS
    ) -> LeasedJob | None:
        holder = Holder(worker=worker, device="cpu", engine_revision="r1")
        return jobs.acquire(self.db, job=job, seen_attempt=seen, holder=holder, lease_seconds=lease)

    def run(self, job: int, *, worker: str = "w1", lease: float = LEASE_SECONDS) -> LeasedJob:
        """Dispatches the job and acquires it. A negative lease has already expired."""
        self.dispatch()
        leased = self.acquire(job, seen=self.job(job).attempt, worker=worker, lease=lease)
        assert leased is not None, f"job {job} is {self.job(job).state}"
        return leased

    def succeed(self, job: int, **record: Any) -> None:
        jobs.succeed(self.db, self.run(job), AttemptRecord(**record))

    def cancel(self, *ids: int) -> jobs.CancelResult:
        return jobs.cancel(self.db, Selection(jobs=ids))

    def retry(self, *ids: int, **changes: Any) -> jobs.RetryResult:
        return jobs.retry(self.db, Selection(jobs=ids), changes=changes)

    def set(self, job: int, **values: Any) -> None:
        """Writes columns directly, past the state machine."""
        with self.db.write() as connection:
            connection.execute(update(Job).where(Job.id == job).values(**values))

    def job(self, job: int) -> Any:
        with self.db.read() as connection:
            return connection.execute(select(Job.__table__).where(Job.id == job)).one()

    def state(self, job: int) -> str:
        return str(self.job(job).state)

    def states(self) -> list[str]:
        with self.db.read() as connection:
            return list(connection.execute(select(Job.state).order_by(Job.id)).scalars())

    def attempts(self, job: int) -> list[Any]:
        with self.db.read() as connection:
            chosen = select(Attempt.__table__).where(Attempt.job_id == job)
            return list(connection.execute(chosen.order_by(Attempt.attempt)))

    def submissions(self) -> list[Any]:
        with self.db.read() as connection:
            return list(connection.execute(select(Submission.__table__).order_by(Submission.id)))
