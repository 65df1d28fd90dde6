"""pending -> queued, and the repair of messages that Redis lost or kept too long.

The only publisher of messages: submission, retry, recovery and the refill of a bounded queue
all go through ``dispatch``, so that priority and cancellation stay exact in SQL.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, Row, and_, func, select, update

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, Job
from shared.jobs.queue import PRIORITY_CLASSES, Message, MessageId, Queue

# A statement holds at most 32,766 parameters on SQLite, 65,535 on PostgreSQL.
_IDS_PER_STATEMENT = 10_000
_MESSAGE_COLUMNS = (Job.id, Job.attempt, Job.priority, Job.losses)
_MessageRow = Row[int, int, int, int]


def dispatch(db: Database, queue: Queue, engine: str, *, bound: int) -> int:
    """pending -> queued: publishes due jobs while the engine's queue has room.

    Highest priority first, then oldest. bound: most messages per priority class.
    Returns how many were published. Raises BrokerUnavailable after the jobs were committed
    as queued; ``redeliver`` publishes their messages later.
    """
    messages: list[Message] = []
    with db.write() as connection:
        if not db.is_sqlite and not _is_only_dispatcher(connection, engine):
            return 0
        for priorities in PRIORITY_CLASSES:
            messages += _claim_due(connection, engine, priorities, bound)
    # After the commit: a worker that gets a message must find its job queued. A crash here
    # leaves queued jobs without a message, which ``redeliver`` detects.
    queue.publish(messages)
    return len(messages)


def _is_only_dispatcher(connection: Connection, engine: str) -> bool:
    # Two dispatchers that count the same free room would together overfill the queue. On
    # SQLite the write lock excludes the other.
    lock = func.pg_try_advisory_xact_lock(func.hashtext(f"inpaint.dispatch.{engine}"))
    return bool(connection.execute(select(lock)).scalar_one())


def _claim_due(connection: Connection, engine: str, priorities: range, bound: int) -> list[Message]:
    in_class = and_(Job.engine == engine, Job.priority.between(priorities[0], priorities[-1]))
    due = and_(Job.state == "pending", in_class, Job.run_after <= clock())
    # The common case, nothing due, costs one index lookup instead of a count.
    if connection.execute(select(Job.id).where(due).limit(1)).first() is None:
        return []
    queued = select(func.count()).where(Job.state == "queued", in_class)
    room = bound - connection.execute(queued).scalar_one()
    if room <= 0:
        return []
    first = select(Job.id).where(due).order_by(Job.priority.desc(), Job.id).limit(room)
    # PostgreSQL may run a plain subquery once per row, and then LIMIT would not hold.
    # SKIP LOCKED: a job that is being cancelled or retried is left for the next dispatch.
    chosen = first.with_for_update(skip_locked=True).cte("chosen").prefix_with("MATERIALIZED")
    rows = connection.execute(
        update(Job)
        .where(Job.id.in_(select(chosen.c.id)), Job.state == "pending")
        .values(state="queued", queued_at=clock())
        .returning(*_MESSAGE_COLUMNS)
    ).all()
    return _messages(engine, rows)


def _messages(engine: str, rows: Iterable[_MessageRow]) -> list[Message]:
    """rows: of ``_MESSAGE_COLUMNS``. RETURNING has no order, so they are sorted here."""
    ordered = sorted(rows, key=lambda row: (-row.priority, row.id))
    return [
        Message(
            job=row.id,
            attempt=row.attempt,
            engine=engine,
            priority=row.priority,
            exclusive=row.losses > 0,
        )
        for row in ordered
    ]


def redeliver(db: Database, queue: Queue, engine: str, *, grace_seconds: float) -> int:
    """queued -> queued: publishes the messages of queued jobs that Redis no longer has ready.

    Redis lost them, or a worker received them and died before ``acquire``. A duplicate does
    no harm: only one message can acquire the job.
    grace_seconds: jobs queued more recently are skipped; ``dispatch`` may not have published
    them yet, or a live worker is about to acquire them. Returns how many were published.
    """
    overdue = and_(
        Job.state == "queued", Job.engine == engine, Job.queued_at < clock(-grace_seconds)
    )
    with db.read() as connection:
        rows = connection.execute(select(Job.id, Job.attempt).where(overdue))
        expected = {MessageId(job=row.id, attempt=row.attempt) for row in rows}
    if not expected:
        return 0
    missing = sorted(message.job for message in expected - queue.ready_messages(engine))
    lost: list[_MessageRow] = []
    for start in range(0, len(missing), _IDS_PER_STATEMENT):
        ids = missing[start : start + _IDS_PER_STATEMENT]
        # ``overdue`` is checked again: a job acquired in between has moved on, and one that
        # another process has just redelivered has a new ``queued_at``.
        again = update(Job).where(Job.id.in_(ids), overdue).values(queued_at=clock())
        with db.write() as connection:
            lost += connection.execute(again.returning(*_MESSAGE_COLUMNS)).all()
    messages = _messages(engine, lost)
    queue.publish(messages)
    return len(messages)


def discard_stale_messages(db: Database, queue: Queue, engine: str) -> None:
    """Deletes messages that a dead worker left unacknowledged and that can run nothing.

    Redis would otherwise keep them for ``visibility_timeout``. A message stays while its job
    is waiting or running: a live worker may be about to acknowledge it.
    """
    unacked = queue.unacked_messages(engine)
    if not unacked:
        return
    ids = {message.job for message in unacked.values()}
    unfinished = select(Job.id, Job.attempt, Job.state).where(
        Job.id.in_(ids), ~Job.state.in_(FINAL_STATES)
    )
    with db.read() as connection:
        rows = connection.execute(unfinished).all()
    # ``acquire`` increments ``attempt``: a running job's message carries the number before.
    current = {
        MessageId(job=row.id, attempt=row.attempt - (row.state == "running")) for row in rows
    }
    queue.discard_unacked([tag for tag, message in unacked.items() if message not in current])
