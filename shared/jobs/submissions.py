"""(none) -> pending: records a submission and the rows of its manifest, in bulk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from shared.db import Database, clock
from shared.db.models import Job, Submission
from shared.errors import InputError
from shared.jobs.ownership import Owner, find_owners, supersede, write_ownership


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """One row of a manifest, resolved; its fields are columns of ``Job``.

    Locations are absolute. params: canonical JSON without the seed.
    """

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
    """``Job.mask_version``: the versions of the mask and the further inputs, in one string.

    A missing file is "-". None if there are no files.
    """
    return " ".join(version or "-" for version in versions) or None


@dataclass(frozen=True, kw_only=True)
class OpenedSubmission:
    """resumed: the same rows were submitted before; interrupted: not all of them were recorded."""

    id: int
    resumed: bool = False
    interrupted: bool = False


def open_submission(
    db: Database, *, manifest: str, digest: str, options: str, rows: int, invalid: int
) -> OpenedSubmission:
    """Gets or creates the submission with this digest."""
    same = select(Submission.id, Submission.recorded_at).where(Submission.digest == digest)
    create = (
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
            existing = connection.execute(same).first()
            if existing is None:
                return OpenedSubmission(id=connection.execute(create).scalar_one())
    except IntegrityError:
        # Another producer created it between the SELECT and the INSERT.
        with db.read() as connection:
            existing = connection.execute(same).one()
    return OpenedSubmission(id=existing.id, resumed=True, interrupted=existing.recorded_at is None)


@dataclass(frozen=True, kw_only=True)
class ContestedOutput:
    """A row whose output belongs to a job that asks for something else."""

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
    """The rows that ``record`` would refuse without ``replace``.

    digest: of their submission. A job at the row's own line of that submission, whose
    parameters were changed since, does not contest the output.
    """
    own = select(Submission.id).where(Submission.digest == digest)
    with db.read() as connection:
        submission = connection.execute(own).scalar()
        return _find_contested(connection, submission, rows)


def _find_contested(
    connection: Connection, submission: int | None, rows: Sequence[NewJob]
) -> list[ContestedOutput]:
    """Only rows without a job are contested: the others change nothing until they are reopened."""
    owners = _owners_by_output(connection, rows)
    suspects = [row for row in rows if row.output in owners]
    if not suspects:
        return []
    keys = {row.content_key for row in suspects}
    has_job = set(
        connection.execute(select(Job.content_key).where(Job.content_key.in_(keys))).scalars()
    )
    return [
        ContestedOutput(row=row, job=owner.id, submission=owner.submission_id)
        for row in suspects
        if row.content_key not in has_job
        for owner in (owners[row.output],)
        if (owner.submission_id, owner.line) != (submission, row.line)
    ]


def _owners_by_output(connection: Connection, rows: Sequence[NewJob]) -> dict[str, Owner]:
    owners = find_owners(connection, {row.output for row in rows})
    return {owner.output: owner for owner in owners}


def record(
    db: Database, submission: int, rows: Sequence[NewJob], *, replace: bool = False
) -> list[NewJob]:
    """Inserts rows as pending jobs in one transaction; returns those that have a job already.

    A row has a job if any submission has one with the same content key.
    replace: supersedes the jobs that own the rows' outputs; otherwise such a row raises
    InputError.
    """
    with write_ownership(db) as connection:
        _lock_submission(connection, submission)
        _take_outputs(connection, submission, rows, replace=replace)
        insert_rows = _insert_sqlite if db.is_sqlite else _insert_postgresql
        lines = insert_rows(connection, submission, rows)
    if len(lines) == len(rows):
        return []
    return [row for row in rows if row.line not in lines]


def _lock_submission(connection: Connection, submission: int) -> None:
    """FOR KEY SHARE: the submission cannot be pruned until the transaction ends."""
    chosen = select(Submission.id).where(Submission.id == submission)
    if connection.execute(chosen.with_for_update(read=True, key_share=True)).first() is None:
        raise InputError(
            f"submission {submission} was pruned while its rows were recorded; submit again"
        )


def _take_outputs(
    connection: Connection, submission: int, rows: Sequence[NewJob], *, replace: bool
) -> None:
    contested = _find_contested(connection, submission, rows)
    if contested and not replace:
        raise InputError(
            f"line {contested[0].row.line}: {contested[0]}; it was submitted a moment ago. "
            "Give the row an output of its own, or replace that one with --force"
        )
    if contested:
        lines = {output.row.line for output in contested}
        taken = select(Job.line).where(Job.submission_id == submission, Job.line.in_(lines))
        # Such a line's job, with changed parameters, takes the output when it is reopened.
        has_job = set(connection.execute(taken).scalars())
        superseded = [output.job for output in contested if output.row.line not in has_job]
        supersede(connection, superseded, submission=submission)


def close_submission(db: Database, submission: int) -> None:
    """Records that every row of the submission has its job."""
    with db.write() as connection:
        connection.execute(
            update(Submission)
            .where(Submission.id == submission, Submission.recorded_at.is_(None))
            .values(recorded_at=clock())
        )


# The bulk INSERTs go to the driver directly, a tuple a row: manifests have millions of rows.
_FIELDS = tuple(field.name for field in fields(NewJob))
_field_values: Callable[[NewJob], tuple[Any, ...]] = attrgetter(*_FIELDS)
_COLUMNS = ", ".join(("submission_id", *_FIELDS))
_INITIAL_COLUMNS = "state, attempt, failures, losses, run_after, created_at"


def _insert_sqlite(connection: Connection, submission: int, rows: Sequence[NewJob]) -> set[int]:
    """Returns the lines inserted; a row whose content key exists is skipped."""
    now = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"
    placeholders = ", ".join("?" * (len(_FIELDS) + 1))
    newest = connection.exec_driver_sql("SELECT coalesce(max(id), 0) FROM jobs").scalar_one()
    cursor = _driver_connection(connection).cursor()
    cursor.executemany(
        f"INSERT INTO jobs ({_COLUMNS}, {_INITIAL_COLUMNS}) "  # noqa: S608 - constant names
        f"VALUES ({placeholders}, 'pending', 0, 0, 0, {now}, {now}) "
        # Not every conflict: an output with another owner is an error.
        "ON CONFLICT (content_key) DO NOTHING ON CONFLICT (submission_id, line) DO NOTHING",
        [(submission, *_field_values(row)) for row in rows],
    )
    if cursor.rowcount == len(rows):
        return {row.line for row in rows}
    # executemany cannot return rows. Ids above ``newest`` are ours: this transaction holds the
    # write lock, so no other one can have inserted since.
    return set(connection.execute(select(Job.line).where(Job.id > newest)).scalars())


def _insert_postgresql(connection: Connection, submission: int, rows: Sequence[NewJob]) -> set[int]:
    """Returns the lines inserted; a row whose content key exists is skipped.

    COPY is the fastest way in but fails on a duplicate key, so it fills a temporary table from
    which one INSERT skips what exists.
    """
    with _driver_connection(connection).cursor() as cursor:
        cursor.execute(
            "CREATE TEMP TABLE IF NOT EXISTS incoming (line integer, key text, content_key bytea, "
            "engine text, image text, mask text, output text, params text, seed bigint, "
            "priority integer) ON COMMIT DELETE ROWS"
        )
        with cursor.copy(f"COPY incoming ({', '.join(_FIELDS)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(_field_values(row))
        now = "statement_timestamp()"
        cursor.execute(
            f"INSERT INTO jobs ({_COLUMNS}, {_INITIAL_COLUMNS}) "  # noqa: S608 - constant names
            f"SELECT %s, {', '.join(_FIELDS)}, 'pending', 0, 0, 0, {now}, {now} "
            # ON CONFLICT takes one target, and an output with another owner is an error.
            "FROM incoming WHERE NOT EXISTS (SELECT FROM jobs "
            "WHERE jobs.submission_id = %s AND jobs.line = incoming.line) "
            "ORDER BY line ON CONFLICT (content_key) DO NOTHING RETURNING line",
            (submission, submission),
        )
        return {line for (line,) in cursor.fetchall()}


def _driver_connection(connection: Connection) -> Any:
    return connection.connection.driver_connection
