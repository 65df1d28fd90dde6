"""Job states: the only module that changes them. Each change has its condition in the UPDATE.

SQL is the truth, a message in Redis only a hint that a job may be due: messages may be
lost, doubled or reordered, and ``acquire`` sorts them out. The clock is the database's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Update,
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    insert,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from shared.db import Database, clock
from shared.errors import InpaintError, InputError, LeaseLost
from shared.models import FINAL_STATES, Attempt, BigId, Job
from shared.params import Params, changed
from shared.queue import PRIORITY_CLASSES, Message, Queue
from shared.retry import RetryPolicy

LOSSES_BEFORE_QUARANTINE = 2
# A statement holds at most 32,766 parameters on SQLite, 65,535 on PostgreSQL.
_IDS_PER_STATEMENT = 10_000


def content_key(
    *, image: str, mask: str, output: str, engine: str, params: str, seed: int | None
) -> bytes:
    """16 bytes that are equal for rows asking for the same work. seed: None where not given."""
    parts = (image, mask, output, engine, params, "" if seed is None else str(seed))
    return blake2b("\x00".join(parts).encode(), digest_size=16).digest()


def derived_seed(key: bytes) -> int:
    """The seed of a row that names none: 32 bits of its content key, so reruns agree."""
    return int.from_bytes(key[:4], "big")


# --- dispatch: pending -> queued ---------------------------------------------------------


def dispatch(db: Database, queue: Queue, engine: str, *, bound: int) -> int:
    """Publishes due jobs, highest priority first, while the engine's queue has room.

    The only publisher besides ``redeliver``. Commits, then publishes: a crash between the
    two leaves a queued job without a message, which ``redeliver`` finds. Returns how many.
    Raises BrokerUnavailable after the commit; nothing is lost by it.
    """
    messages: list[Message] = []
    with db.write() as connection:
        if not db.is_sqlite and not _is_only_dispatcher(connection, engine):
            return 0
        for priorities in PRIORITY_CLASSES:
            messages += _claim_due(connection, engine, priorities, bound)
    queue.publish(messages)
    return len(messages)


def _is_only_dispatcher(connection: Connection, engine: str) -> bool:
    # Two dispatchers that count the same room would overfill the queue together.
    lock = func.pg_try_advisory_xact_lock(func.hashtext(f"inpaint.dispatch.{engine}"))
    return bool(connection.execute(select(lock)).scalar_one())


def _claim_due(connection: Connection, engine: str, priorities: range, bound: int) -> list[Message]:
    of_class = and_(Job.engine == engine, Job.priority.between(priorities[0], priorities[-1]))
    due = and_(Job.state == "pending", of_class, Job.run_after <= clock())
    if connection.execute(select(Job.id).where(due).limit(1)).first() is None:
        return []
    queued = select(func.count()).where(Job.state == "queued", of_class)
    room = bound - connection.execute(queued).scalar_one()
    if room <= 0:
        return []
    first = select(Job.id).where(due).order_by(Job.priority.desc(), Job.id).limit(room)
    # As a plain subquery PostgreSQL may run it once per row, and the limit would not hold.
    chosen = first.with_for_update(skip_locked=True).cte("chosen").prefix_with("MATERIALIZED")
    rows = connection.execute(
        update(Job)
        .where(Job.id.in_(select(chosen.c.id)), Job.state == "pending")
        .values(state="queued", queued_at=clock())
        .returning(Job.id, Job.attempt, Job.priority)
    ).all()
    return _messages(engine, rows)


def _messages(engine: str, rows: Iterable[Any]) -> list[Message]:
    ordered = sorted(rows, key=lambda row: (-row.priority, row.id))
    return [
        Message(job=row.id, attempt=row.attempt, engine=engine, priority=row.priority)
        for row in ordered
    ]


def redeliver(db: Database, queue: Queue, engine: str, *, grace_seconds: float) -> int:
    """Publishes again what Redis lost, or a worker took and died with, before acquiring.

    grace_seconds: a job queued more recently is left alone, its message may be on the way.
    A message published twice does no harm: only one of the two can acquire the job.
    """
    overdue = and_(
        Job.state == "queued", Job.engine == engine, Job.queued_at < clock(-grace_seconds)
    )
    with db.read() as connection:
        expected = {
            (row.id, row.attempt)
            for row in connection.execute(select(Job.id, Job.attempt).where(overdue))
        }
    if not expected:
        return 0
    missing = sorted(job for job, _ in expected - queue.waiting(engine))
    rows: list[Any] = []
    for start in range(0, len(missing), _IDS_PER_STATEMENT):
        ids = missing[start : start + _IDS_PER_STATEMENT]
        with db.write() as connection:
            again = update(Job).where(Job.id.in_(ids), overdue).values(queued_at=clock())
            rows += connection.execute(again.returning(Job.id, Job.attempt, Job.priority)).all()
    messages = _messages(engine, rows)
    queue.publish(messages)
    return len(messages)


# --- acquire and heartbeat: queued -> running -> running ----------------------------------


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """A job in this worker's hands. ``attempt`` is the fencing token."""

    id: int
    attempt: int
    engine: str
    image: str
    mask: str
    output: str
    params: Params
    failures: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lease. ``worker`` is unique to one life of one process."""

    worker: str
    device: str
    engine_revision: str


_acquire = (
    update(Job)
    .where(Job.id == bindparam("job"), Job.state == "queued", Job.attempt == bindparam("seen"))
    .values(
        state="running",
        attempt=Job.attempt + 1,
        worker=bindparam("holder"),
        lease_expires_at=clock(bindparam("lease")),
    )
    .returning(
        Job.id,
        Job.attempt,
        Job.engine,
        Job.image,
        Job.mask,
        Job.output,
        Job.params,
        Job.seed,
        Job.failures,
    )
)


def acquire(
    db: Database, *, job: int, seen_attempt: int, holder: Holder, lease_seconds: float
) -> LeasedJob | None:
    """Leases the job and opens its attempt; None where the message is stale or doubled."""
    with db.write() as connection:
        row = connection.execute(
            _acquire,
            {"job": job, "seen": seen_attempt, "holder": holder.worker, "lease": lease_seconds},
        ).first()
        if row is None:
            return None
        connection.execute(
            insert(Attempt).values(started_at=clock()),
            {
                "job_id": row.id,
                "attempt": row.attempt,
                "worker": holder.worker,
                "device": holder.device,
                "engine": row.engine,
                "engine_revision": holder.engine_revision,
                "params": row.params,
                "seed": row.seed,
            },
        )
    return LeasedJob(
        id=row.id,
        attempt=row.attempt,
        engine=row.engine,
        image=row.image,
        mask=row.mask,
        output=row.output,
        params=Params.from_json(row.params, seed=row.seed),
        failures=row.failures,
    )


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a heartbeat found: a lease renewed, and whether its job is to be cancelled."""

    job: int
    attempt: int
    cancel_requested: bool


def heartbeat(db: Database, *, worker: str, lease_seconds: float) -> list[Beat]:
    """Renews all leases of one worker; a job that is not in the answer was lost."""
    with db.write() as connection:
        rows = connection.execute(
            update(Job)
            .where(Job.state == "running", Job.worker == worker)
            .values(lease_expires_at=clock(lease_seconds))
            .returning(Job.id, Job.attempt, Job.cancel_requested)
        ).all()
    return [
        Beat(job=row.id, attempt=row.attempt, cancel_requested=row.cancel_requested) for row in rows
    ]


_HELD = (
    Job.id == bindparam("of_job"),
    Job.state == "running",
    Job.attempt == bindparam("of_attempt"),
)
_confirm = (
    update(Job).where(*_HELD).values(lease_expires_at=clock(bindparam("lease"))).returning(Job.id)
)


def confirm(db: Database, job: LeasedJob, *, lease_seconds: float) -> None:
    """Renews one lease; raises LeaseLost where it is not ours any more."""
    with db.write() as connection:
        held = connection.execute(_confirm, {**_token(job), "lease": lease_seconds}).first()
    if held is None:
        raise _lost(job)


def _token(job: LeasedJob) -> dict[str, int]:
    return {"of_job": job.id, "of_attempt": job.attempt}


def _lost(job: LeasedJob) -> LeaseLost:
    return LeaseLost(f"job {job.id}: attempt {job.attempt} lost its lease; its work is dropped")


# --- finish: running -> succeeded, failed, pending, cancelled ------------------------------


@dataclass(kw_only=True)
class AttemptRecord:
    """What an attempt has found out so far; filled in as ``run_job`` goes along.

    timings: stage name to seconds.
    """

    image_sha256: str | None = None
    mask_sha256: str | None = None
    result_sha256: str | None = None
    image_version: str | None = None
    mask_version: str | None = None
    width: int | None = None
    height: int | None = None
    regions: int | None = None
    windows: int | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        row = asdict(self)
        row["timings"] = json.dumps({k: round(v, 6) for k, v in self.timings.items()})
        return row


_UNLEASED: Mapping[str, Any] = {"worker": null(), "lease_expires_at": null()}
_NO_ERROR: Mapping[str, Any] = {"error_code": null(), "error_message": null()}

# A job that its user cancelled meanwhile neither waits again nor counts as failed.
_waits = (
    update(Job)
    .where(*_HELD)
    .values(
        **_UNLEASED,
        state=case((Job.cancel_requested, "cancelled"), else_="pending"),
        finished_at=case((Job.cancel_requested, clock()), else_=null()),
        run_after=clock(bindparam("wait")),
    )
    .returning(Job.state)
)
_fails = (
    update(Job)
    .where(*_HELD)
    .values(
        **_UNLEASED,
        state=case((Job.cancel_requested, "cancelled"), else_="failed"),
        finished_at=clock(),
    )
    .returning(Job.state)
)
_cancels = (
    update(Job)
    .where(*_HELD)
    .values(**_UNLEASED, state="cancelled", finished_at=clock())
    .returning(Job.state)
)
_succeeds = (
    update(Job)
    .where(*_HELD)
    .values(**_UNLEASED, **_NO_ERROR, state="succeeded", finished_at=clock())
    .returning(Job.state)
)
_end_attempt = (
    update(Attempt)
    .where(Attempt.job_id == bindparam("of_job"), Attempt.attempt == bindparam("of_attempt"))
    .values(finished_at=clock())
)


def succeed(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    """Raises LeaseLost, as do all that end an attempt; the attempt is then the reaper's."""
    found = {
        "image_version": record.image_version,
        "mask_version": record.mask_version,
        "result_sha256": record.result_sha256,
    }
    _finish(db, job, record, _succeeds, found, outcome="succeeded")


def fail(
    db: Database, job: LeasedJob, record: AttemptRecord, error: InpaintError, policy: RetryPolicy
) -> float | None:
    """Fails the job, or sends it back to wait; returns the wait in seconds, None if final."""
    failures = job.failures + 1
    wait = policy.delay_seconds(failures) if error.retryable else None
    found: dict[str, Any] = {
        "error_code": error.code,
        "error_message": str(error),
        "failures": failures,
    }
    if wait is None:
        _finish(db, job, record, _fails, found, outcome="failed", error=error)
        return None
    found["wait"] = wait
    state = _finish(db, job, record, _waits, found, outcome="retried", error=error)
    return wait if state == "pending" else None


def release(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    """Gives the job back on shutdown; it is due at once and no failure is counted."""
    _finish(db, job, record, _waits, {"wait": 0.0}, outcome="released")


def finish_cancelled(db: Database, job: LeasedJob, record: AttemptRecord) -> None:
    _finish(db, job, record, _cancels, {}, outcome="cancelled")


def _finish(
    db: Database,
    job: LeasedJob,
    record: AttemptRecord,
    ends: Update,
    found: Mapping[str, Any],
    *,
    outcome: str,
    error: InpaintError | None = None,
) -> str:
    """Ends the attempt in the job's own transaction, and gives the job's new state."""
    ended = {
        **_token(job),
        **record.to_row(),
        "outcome": outcome,
        "error_code": error.code if error else None,
        "error_message": str(error) if error else None,
    }
    with db.write() as connection:
        state = connection.execute(ends, {**_token(job), **found}).scalar()
        if state is None:
            raise _lost(job)
        if outcome == "retried" and state == "cancelled":
            ended["outcome"] = "failed"
        connection.execute(_end_attempt, ended)
    return str(state)


# --- reap: running -> pending, failed -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reaped:
    job: int
    attempt: int
    state: str


def reap(db: Database) -> list[Reaped]:
    """Takes back leases that ran out. The second lost worker quarantines the job.

    The condition is inside the UPDATE, so a heartbeat that comes in time wins.
    """
    quarantined = Job.losses + 1 >= LOSSES_BEFORE_QUARANTINE
    state = case((Job.cancel_requested, "cancelled"), (quarantined, "failed"), else_="pending")
    message = "two workers were lost while they ran this job; retry it once the cause is known"
    with db.write() as connection:
        rows = connection.execute(
            update(Job)
            .where(Job.state == "running", Job.lease_expires_at < clock())
            .values(
                **_UNLEASED,
                state=state,
                losses=Job.losses + 1,
                run_after=clock(),
                finished_at=case((or_(Job.cancel_requested, quarantined), clock()), else_=null()),
                error_code=case((quarantined, "worker_lost"), else_=Job.error_code),
                error_message=case((quarantined, message), else_=Job.error_message),
            )
            .returning(Job.id, Job.attempt, Job.state)
        ).all()
        if rows:
            connection.execute(
                update(Attempt)
                .where(
                    tuple_(Attempt.job_id, Attempt.attempt).in_([(r.id, r.attempt) for r in rows]),
                    Attempt.outcome.is_(None),
                )
                .values(
                    outcome="lost",
                    finished_at=clock(),
                    error_code="worker_lost",
                    error_message="the worker stopped sending heartbeats",
                )
            )
    return [Reaped(job=row.id, attempt=row.attempt, state=row.state) for row in rows]


# --- a person's cancel and retry -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which jobs a command means; what is None does not restrict."""

    jobs: tuple[int, ...] | None = None
    submission: int | None = None
    states: tuple[str, ...] | None = None
    error_code: str | None = None

    def conditions(self) -> tuple[ColumnElement[bool], ...]:
        chosen: list[ColumnElement[bool]] = [true()]
        if self.jobs is not None:
            chosen.append(Job.id.in_(self.jobs))
        if self.submission is not None:
            chosen.append(Job.submission_id == self.submission)
        if self.states is not None:
            chosen.append(Job.state.in_(self.states))
        if self.error_code is not None:
            chosen.append(Job.error_code == self.error_code)
        return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """cancelled: at once. requested: running, stops at its next step or heartbeat."""

    cancelled: int
    requested: int


def cancel(db: Database, selection: Selection) -> Cancellation:
    where = selection.conditions()
    with db.write() as connection:
        # Running ones first: what is queued now may not slip past both statements.
        requested = connection.execute(
            update(Job).where(*where, Job.state == "running").values(cancel_requested=true())
        ).rowcount
        cancelled = connection.execute(
            update(Job)
            .where(*where, Job.state.in_(("pending", "queued")))
            .values(state="cancelled", finished_at=clock())
        ).rowcount
        late = connection.execute(
            update(Job)
            .where(*where, Job.state == "running", Job.cancel_requested.is_(False))
            .values(cancel_requested=true())
        ).rowcount
    return Cancellation(cancelled=cancelled, requested=requested + late)


_REOPENED: Mapping[str, Any] = {
    **_NO_ERROR,
    "state": "pending",
    "finished_at": null(),
    "failures": 0,
    "losses": 0,
    "cancel_requested": false(),
    "run_after": clock(),
}


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """How many jobs wait again, and the engines they wait for."""

    count: int
    engines: set[str]


def retry(
    db: Database, selection: Selection, *, changes: Mapping[str, Any] | None = None
) -> Reopened:
    """Reopens final jobs, with changed parameters if given.

    changes: parameter name to a value that ``params.find_parameter(name).read`` gave.
    Raises ParameterError where the changes do not go together with a job's other values,
    and InputError where a changed job would ask for what another job already does.
    """
    where = (*selection.conditions(), Job.state.in_(FINAL_STATES))
    with db.write() as connection:
        if changes:
            _change(connection, where, changes)
        rows = connection.execute(
            update(Job).where(*where).values(**_REOPENED).returning(Job.engine)
        ).all()
    return Reopened(count=len(rows), engines={row.engine for row in rows})


def _change(connection: Connection, where: Sequence[Any], changes: Mapping[str, Any]) -> None:
    rows = connection.execute(select(Job).where(*where)).all()
    for row in rows:
        params = changed(Params.from_json(row.params, seed=row.seed), changes)
        text, seed = params.to_json(), params.seed
        key = content_key(
            image=row.image,
            mask=row.mask,
            output=row.output,
            engine=row.engine,
            params=text,
            seed=seed,
        )
        try:
            with connection.begin_nested():
                connection.execute(
                    update(Job)
                    .where(Job.id == row.id, Job.state.in_(FINAL_STATES))
                    .values(params=text, seed=seed, content_key=key)
                )
        except IntegrityError as error:
            raise InputError(
                f"job {row.id}: another job already does exactly this; retry that one"
            ) from error


def rerun(db: Database, keys: Mapping[bytes, tuple[int, int]]) -> int:
    """Reopens final jobs by content key and moves each to a (submission, line).

    A job belongs to the submission that last asked for it, unless a job whose parameters
    were changed since has that line. Returns how many were reopened.
    """
    to_submission, to_line = (
        bindparam("to_submission", type_=BigId),
        bindparam("to_line", type_=Integer),
    )
    other = aliased(Job)
    taken = exists().where(
        other.submission_id == to_submission, other.line == to_line, other.id != Job.id
    )
    moved = (
        update(Job)
        .where(Job.content_key == bindparam("of_key"), Job.state.in_(FINAL_STATES))
        .values(
            submission_id=case((taken, Job.submission_id), else_=to_submission),
            line=case((taken, Job.line), else_=to_line),
            **_REOPENED,
        )
    )
    rows = [
        {"of_key": key, "to_submission": submission, "to_line": line}
        for key, (submission, line) in keys.items()
    ]
    with db.write() as connection:
        return sum(connection.execute(moved, row).rowcount for row in rows)
