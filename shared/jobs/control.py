"""What a user asks for: cancel jobs, run final ones again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    Update,
    bindparam,
    case,
    exists,
    false,
    func,
    null,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, BigId, Job
from shared.errors import InputError
from shared.jobs.completion import NO_ERROR
from shared.jobs.identity import content_key
from shared.jobs.leases import lock_in_id_order
from shared.jobs.ownership import (
    OWNED_BY_ANOTHER,
    WAITING_STATES,
    lock_for_reopening,
    write_ownership,
)
from shared.params import Params, with_values

if TYPE_CHECKING:
    from shared.jobs.submissions import NewJob


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which jobs a command applies to: those that match every field that is not None.

    review: whether a quality gate asks a person to look at the result.
    """

    jobs: tuple[int, ...] | None = None
    submission: int | None = None
    states: tuple[str, ...] | None = None
    error_code: str | None = None
    review: bool | None = None

    def conditions(self) -> tuple[ColumnElement[bool], ...]:
        where: list[ColumnElement[bool]] = [true()]
        if self.jobs is not None:
            where.append(Job.id.in_(self.jobs))
        if self.submission is not None:
            where.append(Job.submission_id == self.submission)
        if self.states is not None:
            where.append(Job.state.in_(self.states))
        if self.error_code is not None:
            where.append(Job.error_code == self.error_code)
        if self.review is not None:
            where.append(Job.review.is_not(None) if self.review else Job.review.is_(None))
        return tuple(where)


@dataclass(frozen=True, kw_only=True)
class CancelResult:
    """cancelled: jobs cancelled at once. requested: running jobs that are asked to stop."""

    cancelled: int
    requested: int


def cancel(db: Database, selection: Selection) -> CancelResult:
    """pending, queued -> cancelled; a running job stops at its next step or heartbeat."""
    where = selection.conditions()
    running = (*where, Job.state == "running")
    flag_running = _update_locked(*running).values(cancel_requested=true())
    flag_rest = _update_locked(*running, Job.cancel_requested.is_(False)).values(
        cancel_requested=true()
    )
    cancel_waiting = _update_locked(*where, Job.state.in_(WAITING_STATES)).values(
        state="cancelled", finished_at=clock()
    )
    with db.write() as connection:
        # Running jobs come first: one that is released between the statements is cancelled
        # because of its flag. One that is acquired between them is flagged by the third.
        requested = connection.execute(flag_running).rowcount
        cancelled = connection.execute(cancel_waiting).rowcount
        requested += connection.execute(flag_rest).rowcount
    return CancelResult(cancelled=cancelled, requested=requested)


def _update_locked(*where: ColumnElement[bool]) -> Update:
    return update(Job).where(Job.id.in_(lock_in_id_order(*where)), *where)


# ``attempt`` is not reset: fencing tokens must never repeat, since a worker may still run an
# earlier attempt.
_REOPENED: Mapping[str, Any] = {
    **NO_ERROR,
    "state": "pending",
    "finished_at": null(),
    "score": null(),
    "review": null(),
    "failures": 0,
    "losses": 0,
    "cancel_requested": false(),
    "run_after": clock(),
}


@dataclass(frozen=True, kw_only=True)
class RetryResult:
    """How many jobs run again, and the engines whose queues they go to.

    replaced: selected final jobs left as they are, because another job writes their output.
    """

    count: int
    engines: set[str]
    replaced: int = 0


def retry(
    db: Database, selection: Selection, *, changes: Mapping[str, Any] | None = None
) -> RetryResult:
    """succeeded, failed, cancelled -> pending, with changed parameters if given.

    A job whose output another job owns is left as it is. Of several jobs with one output,
    only the newest is reopened.
    changes: parameter name to a value that ``params.find_parameter(name).read`` returned.
    Raises ParameterError if the changes contradict a job's other values, and InputError if a
    changed job would equal another one.
    """
    chosen = (*selection.conditions(), Job.state.in_(FINAL_STATES))
    newest = select(func.max(Job.id)).where(*chosen, ~OWNED_BY_ANOTHER).group_by(Job.output)
    # correlate(None): the subquery has a FROM jobs of its own, not the row being updated.
    where = (*chosen, ~OWNED_BY_ANOTHER, Job.id.in_(newest.correlate(None)))
    with write_ownership(db) as connection:
        counted = select(func.count()).select_from(Job).where(*chosen)
        total = connection.execute(counted).scalar_one()
        if changes:
            _change_params(connection, where, changes)
        reopened = _update_locked(*where).values(**_REOPENED).returning(Job.engine)
        engines = connection.execute(reopened).scalars().all()
    return RetryResult(count=len(engines), replaced=total - len(engines), engines=set(engines))


def _change_params(
    connection: Connection, where: Sequence[ColumnElement[bool]], changes: Mapping[str, Any]
) -> None:
    for job in connection.execute(select(Job).where(*where)).all():
        params = with_values(Params.from_json(job.params, seed=job.seed), changes)
        text, seed = params.to_json(), params.seed
        key = content_key(
            image=job.image,
            mask=job.mask,
            output=job.output,
            engine=job.engine,
            params=text,
            seed=seed,
        )
        try:
            # Final is checked again: another user may have reopened it since the SELECT.
            connection.execute(
                update(Job)
                .where(Job.id == job.id, Job.state.in_(FINAL_STATES))
                .values(params=text, seed=seed, content_key=key)
            )
        except IntegrityError as error:
            raise InputError(
                f"job {job.id}: another job already does exactly this; retry that one"
            ) from error


def reopen_by_content_key(
    db: Database, submission: int, lines: Mapping[bytes, int], *, replace: bool = False
) -> int:
    """succeeded, failed, cancelled -> pending, for the jobs that a submission asks for again.

    lines: content key to the submission's line. Each job moves to that line, unless the line
    belongs to another job (one whose parameters were changed since). replace: supersedes the
    jobs that own the outputs; otherwise a job whose output another job owns stays final.
    Returns how many were reopened.
    """
    to_submission = bindparam("to_submission", submission, type_=BigId)
    to_line = bindparam("to_line", type_=Integer)
    other = aliased(Job)
    line_is_taken = exists().where(
        other.submission_id == to_submission, other.line == to_line, other.id != Job.id
    )
    may_write = () if replace else (~OWNED_BY_ANOTHER,)
    reopen = (
        update(Job)
        .where(Job.content_key == bindparam("of_key"), Job.state.in_(FINAL_STATES), *may_write)
        .values(
            submission_id=case((line_is_taken, Job.submission_id), else_=to_submission),
            line=case((line_is_taken, Job.line), else_=to_line),
            **_REOPENED,
        )
    )
    with write_ownership(db) as connection:
        wanted = Job.content_key.in_(lines)
        lock_for_reopening(connection, wanted, submission=submission, replace=replace)
        return sum(
            connection.execute(reopen, {"of_key": key, "to_line": line}).rowcount
            for key, line in lines.items()
        )


def reopen_as_submitted(db: Database, submission: int, rows: Sequence[NewJob]) -> int:
    """succeeded, failed, cancelled -> pending, with the parameters of the manifest's rows.

    Applies to jobs whose parameters were changed since, and supersedes the jobs that own their
    outputs. If another job has a row's content key, the row is that job's; see
    ``reopen_by_content_key``. Returns how many were reopened.
    """
    other = aliased(Job)
    key = bindparam("to_key", type_=LargeBinary)
    reopen = (
        update(Job)
        .where(
            Job.submission_id == submission,
            Job.line == bindparam("of_line"),
            Job.state.in_(FINAL_STATES),
            ~exists().where(other.content_key == key),
        )
        .values(
            content_key=key,
            params=bindparam("to_params"),
            seed=bindparam("to_seed", type_=BigId),
            **_REOPENED,
        )
    )
    with write_ownership(db) as connection:
        changed = _without_job(connection, rows)
        if not changed:
            return 0
        wanted = (Job.submission_id == submission, Job.line.in_([row.line for row in changed]))
        lock_for_reopening(connection, *wanted, submission=submission, replace=True)
        return sum(connection.execute(reopen, _row_parameters(row)).rowcount for row in changed)


def _without_job(connection: Connection, rows: Sequence[NewJob]) -> list[NewJob]:
    """The rows whose content key no job has."""
    keys = select(Job.content_key).where(Job.content_key.in_([row.content_key for row in rows]))
    existing = set(connection.execute(keys).scalars())
    return [row for row in rows if row.content_key not in existing]


def _row_parameters(row: NewJob) -> dict[str, Any]:
    return {
        "of_line": row.line,
        "to_key": row.content_key,
        "to_params": row.params,
        "to_seed": row.seed,
    }
