"""What a person asks for: cancel, retry, run again."""

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
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from shared.db import Database, clock
from shared.db.models import FINAL_STATES, BigId, Job
from shared.errors import InputError, OutputReplaced
from shared.jobs.completion import NO_ERROR
from shared.jobs.identity import content_key
from shared.jobs.leases import lock_in_id_order
from shared.params import Params, changed

if TYPE_CHECKING:
    from shared.jobs.submissions import NewJob


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which jobs a command means; what is None does not restrict.

    review: whether a gate asks a person to look at the result.
    """

    jobs: tuple[int, ...] | None = None
    submission: int | None = None
    states: tuple[str, ...] | None = None
    error_code: str | None = None
    review: bool | None = None

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
        if self.review is not None:
            chosen.append(Job.review.is_not(None) if self.review else Job.review.is_(None))
        return tuple(chosen)


@dataclass(frozen=True, kw_only=True)
class CancelResult:
    """cancelled: at once. requested: running, stops at its next step or heartbeat."""

    cancelled: int
    requested: int


def cancel(db: Database, selection: Selection) -> CancelResult:
    where = selection.conditions()
    with db.write() as connection:
        # Running ones first: what is queued now may not slip past both statements.
        requested = connection.execute(
            _of(*where, Job.state == "running").values(cancel_requested=true())
        ).rowcount
        cancelled = connection.execute(
            _of(*where, Job.state.in_(("pending", "queued"))).values(
                state="cancelled", finished_at=clock()
            )
        ).rowcount
        late = connection.execute(
            _of(*where, Job.state == "running", Job.cancel_requested.is_(False)).values(
                cancel_requested=true()
            )
        ).rowcount
    return CancelResult(cancelled=cancelled, requested=requested + late)


def _of(*where: ColumnElement[bool]) -> Update:
    return update(Job).where(Job.id.in_(lock_in_id_order(*where)), *where)


def owns_output(job: Any) -> ColumnElement[bool]:
    """What lies at the job's output is the job's, or will be. job: Job or an alias of it."""
    succeeded = and_(job.state == "succeeded", job.error_code.is_distinct_from(OutputReplaced.code))
    return or_(job.state.in_(("pending", "queued", "running")), succeeded)


_owner = aliased(Job)
_OWNED_BY_ANOTHER = exists().where(
    _owner.output == Job.output, _owner.id != Job.id, owns_output(_owner)
)


def supersede(connection: Connection, ids: Sequence[int], *, submission: int) -> None:
    """Takes their outputs from jobs, for a submission that writes there from now on."""
    where = (Job.id.in_(ids), owns_output(Job))
    replaced = {
        "error_code": OutputReplaced.code,
        "error_message": f"submission {submission} writes this output since",
    }
    waiting = Job.state.in_(("pending", "queued"))
    connection.execute(
        _of(*where, waiting).values(state="cancelled", finished_at=clock(), **replaced)
    )
    connection.execute(
        _of(*where, Job.state == "running").values(cancel_requested=true(), **replaced)
    )
    connection.execute(_of(*where, Job.state == "succeeded").values(**replaced))


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
    """How many jobs wait again, and the engines they wait for.

    replaced: how many stay as they are, because another job writes their output.
    """

    count: int
    engines: set[str]
    replaced: int = 0


def retry(
    db: Database, selection: Selection, *, changes: Mapping[str, Any] | None = None
) -> RetryResult:
    """Reopens final jobs, with changed parameters if given.

    A job whose output belongs to another job stays as it is, and so do all but the newest of
    those that write one output.
    changes: parameter name to a value that ``params.find_parameter(name).read`` gave.
    Raises ParameterError where the changes do not go together with a job's other values,
    and InputError where a changed job would ask for what another job already does.
    """
    chosen = (*selection.conditions(), Job.state.in_(FINAL_STATES))
    newest = select(func.max(Job.id)).where(*chosen, ~_OWNED_BY_ANOTHER).group_by(Job.output)
    where = (*chosen, ~_OWNED_BY_ANOTHER, Job.id.in_(newest.correlate(None)))
    with db.write() as connection:
        counted = select(func.count()).select_from(Job).where(*chosen)
        total = connection.execute(counted).scalar_one()
        if changes:
            _change(connection, where, changes)
        rows = connection.execute(_of(*where).values(**_REOPENED).returning(Job.engine)).all()
    engines = {row.engine for row in rows}
    return RetryResult(count=len(rows), replaced=total - len(rows), engines=engines)


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


def reopen_by_content_key(
    db: Database, keys: Mapping[bytes, tuple[int, int]], *, replace: bool = False
) -> int:
    """Reopens final jobs by content key and moves each to a (submission, line).

    replace: also those whose output belongs to another job, which has lost it by then.
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
    may_write = () if replace else (~_OWNED_BY_ANOTHER,)
    moved = (
        update(Job)
        .where(Job.content_key == bindparam("of_key"), Job.state.in_(FINAL_STATES), *may_write)
        .values(
            submission_id=case((taken, Job.submission_id), else_=to_submission),
            line=case((taken, Job.line), else_=to_line),
            **_REOPENED,
        )
    )
    rows = [
        {"of_key": key, "to_submission": submission, "to_line": line}
        for key, (submission, line) in sorted(keys.items())  # else two producers deadlock
    ]
    with db.write() as connection:
        return sum(connection.execute(moved, row).rowcount for row in rows)


def reopen_as_submitted(db: Database, submission: int, rows: Sequence[NewJob]) -> int:
    """Gives final jobs that were changed since back what their rows say, and reopens them.

    A row whose content key another job has is that job's; see ``reopen_by_content_key``.
    """
    other = aliased(Job)
    key = bindparam("to_key", type_=LargeBinary)
    restored = (
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
    values = [
        {
            "of_line": row.line,
            "to_key": row.content_key,
            "to_params": row.params,
            "to_seed": row.seed,
        }
        for row in rows
    ]
    with db.write() as connection:
        return sum(connection.execute(restored, value).rowcount for value in values)
