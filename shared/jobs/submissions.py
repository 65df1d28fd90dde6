"""Recording a manifest: submissions, and their rows as pending jobs, in bulk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from shared import jobs
from shared.db import Database, clock
from shared.db.models import Job, Submission
from shared.errors import InputError

_RECORD_LOCK = 0x696E7061696E74  # any number that all producers share


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """One row, resolved: locations absolute, ``params`` canonical JSON without the seed."""

    line: int
    key: str | None
    content_key: bytes
    engine: str
    image: str
    mask: str
    output: str
    params: str
    seed: int
    priority: int


def join_versions(versions: Sequence[str | None]) -> str | None:
    """``Job.mask_version``: of the mask and of each further input; None where there is no file."""
    return " ".join(version or "-" for version in versions) or None


@dataclass(frozen=True, kw_only=True)
class OpenedSubmission:
    """``resumed``: the same rows were submitted before; ``interrupted``: and not to the end."""

    id: int
    resumed: bool = False
    interrupted: bool = False


def open_submission(
    db: Database, *, manifest: str, digest: str, options: str, rows: int, invalid: int
) -> OpenedSubmission:
    """Finds or makes the submission of this digest; safe for two producers at once."""
    same = select(Submission.id, Submission.recorded_at).where(Submission.digest == digest)
    made = (
        insert(Submission)
        .values(
            manifest=manifest,
            digest=digest,
            options=options,
            rows=rows,
            invalid=invalid,
            created_at=clock(),
        )
        .returning(Submission.id)
    )
    try:
        with db.write() as connection:
            found = connection.execute(same).first()
            if found is None:
                return OpenedSubmission(id=connection.execute(made).scalar_one())
    except IntegrityError:
        with db.read() as connection:
            found = connection.execute(same).one()
    return OpenedSubmission(id=found.id, resumed=True, interrupted=found.recorded_at is None)


@dataclass(frozen=True, kw_only=True)
class ContestedOutput:
    """A row whose output another job writes, or has written."""

    row: NewJob
    job: int
    submission: int

    def __str__(self) -> str:
        return (
            f"output: {self.row.output!r} is written by job {self.job} "
            f"(submission {self.submission}), which asks for something else"
        )


def find_contested_outputs(
    db: Database, digest: str, rows: Sequence[NewJob]
) -> list[ContestedOutput]:
    """The rows that may not be recorded because of their outputs.

    digest: of their submission. A job at the row's own line there was changed since by a person.
    """
    own = select(Submission.id).where(Submission.digest == digest)
    with db.read() as connection:
        return _find_contested(connection, connection.execute(own).scalar(), rows, new=True)


def _find_contested(
    connection: Connection, submission: int | None, rows: Sequence[NewJob], *, new: bool
) -> list[ContestedOutput]:
    """new: only rows that have no job yet; the others write nothing unless they are forced.

    A changed job at the row's own line keeps the output, unless another job does what the row
    asks for: forced, that one writes it.
    """
    chosen = select(Job.output, Job.id, Job.submission_id, Job.line, Job.content_key).where(
        Job.output.in_({row.output for row in rows}), jobs.owns_output(Job)
    )
    owners: dict[str, list[Any]] = {}
    for owner in connection.execute(chosen):
        owners.setdefault(owner.output, []).append(owner)
    suspects = [row for row in rows if row.output in owners]
    if not suspects:
        return []
    keys = {row.content_key for row in suspects}
    having = select(Job.content_key).where(Job.content_key.in_(keys))
    known = set(connection.execute(having).scalars())
    return [
        ContestedOutput(row=row, job=owner.id, submission=owner.submission_id)
        for row in suspects
        if not (new and row.content_key in known)
        for owner in owners[row.output]
        if owner.content_key != row.content_key
        and (
            (owner.submission_id, owner.line) != (submission, row.line) or row.content_key in known
        )
    ]


def record(
    db: Database, submission: int, rows: Sequence[NewJob], *, replace: bool = False
) -> list[NewJob]:
    """Inserts rows as pending jobs in one transaction; returns those that existed already.

    A row exists already where a job with its content key does, in any submission.
    replace: takes outputs from the jobs that write them; else InputError names the first.
    """
    with db.write() as connection:
        if not db.is_sqlite:
            # Two producers that insert the same keys in another order would wait for each
            # other; and of two rows with one output only the first may come in.
            connection.execute(select(func.pg_advisory_xact_lock(_RECORD_LOCK)))
        _lock_submission(connection, submission)
        _take_outputs(connection, submission, rows, replace=replace)
        insert_rows = _insert_sqlite if db.is_sqlite else _insert_postgresql
        lines = insert_rows(connection, submission, rows)
    if len(lines) == len(rows):
        return []
    return [row for row in rows if row.line not in lines]


def _lock_submission(connection: Connection, submission: int) -> None:
    """Keeps the submission from being pruned until the transaction ends."""
    there = select(Submission.id).where(Submission.id == submission)
    if connection.execute(there.with_for_update(read=True, key_share=True)).first() is None:
        raise InputError(
            f"submission {submission} was pruned while its rows were recorded; submit again"
        )


def _take_outputs(
    connection: Connection, submission: int, rows: Sequence[NewJob], *, replace: bool
) -> None:
    taken = _find_contested(connection, submission, rows, new=not replace)
    if taken and not replace:
        raise InputError(
            f"line {taken[0].row.line}: {taken[0]}; it was submitted a moment ago. "
            "Give the row an output of its own, or replace that one with --force"
        )
    if taken:
        jobs.supersede(connection, [one.job for one in taken], submission=submission)


def close_submission(db: Database, submission: int) -> None:
    """Marks every row as recorded."""
    with db.write() as connection:
        connection.execute(
            update(Submission)
            .where(Submission.id == submission, Submission.recorded_at.is_(None))
            .values(recorded_at=clock())
        )


_FIELDS = tuple(field.name for field in fields(NewJob))
_values = attrgetter(*_FIELDS)
_COLUMNS = ", ".join(("submission_id", *_FIELDS))
_REST = "state, attempt, failures, losses, run_after, created_at"


def _insert_sqlite(connection: Connection, submission: int, rows: Sequence[NewJob]) -> set[int]:
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"
    marks = ", ".join("?" * (len(_FIELDS) + 1))
    newest = connection.exec_driver_sql("SELECT coalesce(max(id), 0) FROM jobs").scalar_one()
    cursor = _driver(connection).cursor()
    cursor.executemany(
        f"INSERT INTO jobs ({_COLUMNS}, {_REST}) "  # noqa: S608 - constant names
        f"VALUES ({marks}, 'pending', 0, 0, 0, {now}, {now}) ON CONFLICT DO NOTHING",
        [(submission, *_values(row)) for row in rows],
    )
    if cursor.rowcount == len(rows):
        return {row.line for row in rows}
    # Exact, because the write lock is ours: nobody else can have added a row since.
    return set(connection.execute(select(Job.line).where(Job.id > newest)).scalars())


def _insert_postgresql(connection: Connection, submission: int, rows: Sequence[NewJob]) -> set[int]:
    """COPY into a temporary table, then one INSERT that skips what exists."""
    with _driver(connection).cursor() as cursor:
        cursor.execute(
            "CREATE TEMP TABLE IF NOT EXISTS incoming (line integer, key text, content_key bytea, "
            "engine text, image text, mask text, output text, params text, seed bigint, "
            "priority integer) ON COMMIT DELETE ROWS"
        )
        with cursor.copy(f"COPY incoming ({', '.join(_FIELDS)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(_values(row))
        now = "statement_timestamp()"
        cursor.execute(
            f"INSERT INTO jobs ({_COLUMNS}, {_REST}) "  # noqa: S608 - constant names
            f"SELECT %s, {', '.join(_FIELDS)}, 'pending', 0, 0, 0, {now}, {now} "
            "FROM incoming ORDER BY line ON CONFLICT DO NOTHING RETURNING line",
            (submission,),
        )
        return {line for (line,) in cursor.fetchall()}


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection
