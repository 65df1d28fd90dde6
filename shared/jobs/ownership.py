"""Which job owns an output: at most one, by a constraint of the database.

A job becomes an owner when it is recorded or reopened. Each of these transactions first takes
the outputs from their present owners, or leaves out the rows that it may not take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    String,
    and_,
    case,
    exists,
    func,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import aliased

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, Attempt, Job
from shared.errors import OutputReplaced
from shared.jobs.leases import NO_LEASE, lock_in_id_order

WAITING_STATES = ("pending", "queued")
# "inpaint"; the advisory lock of every transaction that makes jobs owners.
_OWNERSHIP_LOCK = 0x696E7061696E74

# (output, id, submission_id, line, content_key) of a job
Owner = Row[str, int, int, int, bytes]


@contextmanager
def write_ownership(db: Database) -> Iterator[Connection]:
    """A write transaction that may make jobs owners of outputs; one at a time.

    Without the lock, two transactions could both find an output free, and the constraint would
    end one of them with an error. Two that record the same rows in different orders would also
    deadlock. On SQLite the write lock does the same.
    """
    with db.write() as connection:
        if not db.is_sqlite:
            connection.execute(select(func.pg_advisory_xact_lock(_OWNERSHIP_LOCK)))
        yield connection


def owns_output(job: Any) -> ColumnElement[bool]:
    """True if the object at the job's output is the job's result, or will be.

    job: ``Job`` or an alias of it. The condition of the index ``uq_jobs_owned_output``, with
    literals, because neither database would use the index for bound parameters.
    """
    ended_without_result = (_literal("failed"), _literal("cancelled"))
    is_not_replaced = job.error_code != _literal(OutputReplaced.code)
    return and_(
        job.state.not_in(ended_without_result), or_(job.error_code.is_(None), is_not_replaced)
    )


def _literal(value: str) -> ColumnElement[str]:
    return literal_column(f"'{value}'", String)


_owner = aliased(Job)
OWNED_BY_ANOTHER = exists().where(
    _owner.output == Job.output, _owner.id != Job.id, owns_output(_owner)
)
_IS_STOPPING = and_(Job.state == "running", Job.error_code == OutputReplaced.code)


def find_owners(connection: Connection, outputs: Collection[str]) -> Sequence[Owner]:
    columns = (Job.output, Job.id, Job.submission_id, Job.line, Job.content_key)
    return connection.execute(
        select(*columns).where(Job.output.in_(outputs), owns_output(Job))
    ).all()


def supersede(connection: Connection, ids: Sequence[int], *, submission: int) -> None:
    """Takes the outputs of these jobs away, in the transaction that gives them to others.

    pending, queued -> cancelled; a running job is asked to stop; a succeeded one keeps its
    state. All are marked ``OutputReplaced``. submission: writes the outputs from now on.
    """
    is_waiting = Job.state.in_(WAITING_STATES)
    chosen = (Job.id.in_(ids), owns_output(Job))
    # One statement for all states: between two, a running job that is released to pending
    # could escape both and remain an owner.
    superseded = (
        update(Job)
        .where(Job.id.in_(lock_in_id_order(*chosen)), *chosen)
        .values(
            state=case((is_waiting, "cancelled"), else_=Job.state),
            finished_at=case((is_waiting, clock()), else_=Job.finished_at),
            cancel_requested=case((Job.state == "running", true()), else_=Job.cancel_requested),
            error_code=OutputReplaced.code,
            error_message=f"submission {submission} now writes this output",
        )
    )
    connection.execute(superseded)


def lock_for_reopening(
    connection: Connection, *wanted: ColumnElement[bool], submission: int, replace: bool
) -> None:
    """Locks the jobs that are about to be reopened; with ``replace``, frees their outputs.

    wanted: selects the jobs; those that are neither final nor superseded are left out.
    """
    can_reopen = or_(Job.state.in_(FINAL_STATES), _IS_STOPPING)
    reopened = connection.execute(select(Job.id, Job.output).where(*wanted, can_reopen)).all()
    ids = {row.id for row in reopened}
    owners = find_owners(connection, {row.output for row in reopened}) if replace else ()
    rivals = [owner.id for owner in owners if owner.id not in ids]
    # All of them before the first UPDATE: heartbeats, reaping and pruning lock in this order.
    connection.execute(lock_in_id_order(Job.id.in_([*ids, *rivals]))).all()
    if replace:
        _end_superseded(connection, ids)
        supersede(connection, rivals, submission=submission)


def _end_superseded(connection: Connection, ids: Collection[int]) -> None:
    """running -> cancelled, for superseded jobs whose worker has not stopped yet.

    They can then be reopened. Their workers lose the lease.
    """
    ended = (
        update(Job)
        .where(Job.id.in_(ids), _IS_STOPPING)
        .values(**NO_LEASE, state="cancelled", finished_at=clock())
        .returning(Job.id)
    )
    stopped = connection.execute(ended).scalars().all()
    connection.execute(
        update(Attempt)
        .where(Attempt.job_id.in_(stopped), Attempt.outcome.is_(None))
        .values(outcome="cancelled", finished_at=clock())
    )
