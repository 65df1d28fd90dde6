"""pending -> queued: the only publisher of messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, and_, func, select, update

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, Job
from shared.jobs.queue import PRIORITY_CLASSES, Message, Queue

# A statement holds at most 32,766 parameters on SQLite, 65,535 on PostgreSQL.
_IDS_PER_STATEMENT = 10_000
_MESSAGE_COLUMNS = (Job.id, Job.attempt, Job.priority, Job.losses)


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
        .returning(*_MESSAGE_COLUMNS)
    ).all()
    return _messages(engine, rows)


def _messages(engine: str, rows: Iterable[Any]) -> list[Message]:
    ordered = sorted(rows, key=lambda row: (-row.priority, row.id))
    return [
        Message(
            job=row.id,
            attempt=row.attempt,
            engine=engine,
            priority=row.priority,
            alone=row.losses > 0,
        )
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
    missing = sorted(job for job, _ in expected - queue.ready_messages(engine))
    rows: list[Any] = []
    for start in range(0, len(missing), _IDS_PER_STATEMENT):
        ids = missing[start : start + _IDS_PER_STATEMENT]
        with db.write() as connection:
            again = update(Job).where(Job.id.in_(ids), overdue).values(queued_at=clock())
            rows += connection.execute(again.returning(*_MESSAGE_COLUMNS)).all()
    messages = _messages(engine, rows)
    queue.publish(messages)
    return len(messages)


def discard_stale_messages(db: Database, queue: Queue, engine: str) -> None:
    """Removes from Redis what dead workers took and never answered.

    A message stays while its job may still run by it; one whose job has moved on would run
    nothing, and Redis would keep it for ``visibility_timeout``.
    """
    taken = queue.unacked_messages(engine)
    if not taken:
        return
    ids = {job for job, _ in taken.values()}
    with db.read() as connection:
        rows = connection.execute(
            select(Job.id, Job.attempt, Job.state).where(
                Job.id.in_(ids), ~Job.state.in_(FINAL_STATES)
            )
        ).all()
    # Acquiring counts the attempt up: a running job's message names the number before.
    live = {(row.id, row.attempt - (row.state == "running")) for row in rows}
    queue.discard_unacked([tag for tag, message in taken.items() if message not in live])
