"""Records a validated manifest's rows as jobs and dispatches them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from sqlalchemy import select

from producer import reports
from producer.resolve import RowDefaults
from producer.validate import ValidatedManifest
from shared import jobs
from shared.db import Database
from shared.db.models import FINAL_STATES, Job
from shared.errors import BrokerUnavailable
from shared.jobs import submissions
from shared.jobs.queue import Queue
from shared.jobs.submissions import NewJob, join_versions
from shared.params import further_inputs, is_file
from shared.storage import Storage

# A stat on S3 is a network round trip: the threads only wait.
STAT_THREADS = 16


@dataclass(kw_only=True)
class SubmitResult:
    """What a submission did.

    accepted: rows that will run because of it. duplicates: rows whose job exists and is not
    run again. resumed: the same rows had been submitted before; was_interrupted: not all of
    them had been recorded. is_rerun: ``--force`` or ``--changed`` was given. left: its jobs that
    are not final. earlier_jobs: numbers of jobs that belong to earlier submissions, are rows of
    this one too, and are not final.
    """

    submission: int
    rows: int
    accepted: int = 0
    duplicates: int = 0
    invalid: int = 0
    resumed: bool = False
    was_interrupted: bool = False
    is_rerun: bool = False
    left: int = 0
    # An array: 8 bytes a job, where a million of them may be on record.
    earlier_jobs: array[int] = field(default_factory=lambda: array("q"))
    broker_error: str | None = None

    def to_json(self) -> dict[str, int]:
        return {
            "submission": self.submission,
            "rows": self.rows,
            "accepted": self.accepted,
            "duplicates": self.duplicates,
            "invalid": self.invalid,
        }


@dataclass(frozen=True, kw_only=True)
class RerunOptions:
    """Which existing jobs run again: all (``--force``), or those whose files changed."""

    all_rows: bool = False
    changed_rows: bool = False

    def __bool__(self) -> bool:
        return self.all_rows or self.changed_rows


def submit_manifest(
    manifest: ValidatedManifest,
    defaults: RowDefaults,
    *,
    db: Database,
    queue: Queue,
    storage: Storage,
    bound: int,
    rerun: RerunOptions,
    progress: Callable[[int], None] = lambda _rows: None,
) -> SubmitResult:
    """Record every valid row and dispatch after each chunk; safe to repeat after a crash.

    bound: most messages per engine and priority in the queue. If the broker does not answer,
    the jobs are recorded all the same, workers dispatch them later, and the result says so.
    """
    opened = submissions.open_submission(
        db,
        manifest=defaults.manifest,
        digest=manifest.digest,
        options=json.dumps(asdict(defaults) | {"values": dict(defaults.values)}),
        rows=manifest.rows,
        invalid=manifest.invalid,
    )
    result = SubmitResult(
        submission=opened.id,
        rows=manifest.rows,
        invalid=manifest.invalid,
        resumed=opened.resumed,
        was_interrupted=opened.interrupted,
        is_rerun=bool(rerun),
    )
    for chunk in manifest.chunks():
        existing = submissions.record(db, opened.id, chunk, replace=rerun.all_rows)
        result.earlier_jobs.extend(_unfinished_earlier_jobs(db, opened.id, existing))
        reopened = _reopen(db, storage, opened.id, existing, rerun)
        result.accepted += len(chunk) - len(existing) + reopened
        result.duplicates += len(existing) - reopened
        _dispatch(db, queue, manifest.engines, bound, result)
        progress(len(chunk))
    submissions.close_submission(db, opened.id)
    result.left = reports.measure_progress(db, opened.id).left
    return result


def _dispatch(
    db: Database, queue: Queue, engines: set[str], bound: int, result: SubmitResult
) -> None:
    # After the first failure each further attempt would only add a time-out per chunk.
    if result.broker_error is not None:
        return
    try:
        for engine in sorted(engines):
            jobs.dispatch(db, queue, engine, bound=bound)
    except BrokerUnavailable as error:
        result.broker_error = str(error)


def _unfinished_earlier_jobs(db: Database, submission: int, existing: list[NewJob]) -> list[int]:
    if not existing:
        return []
    query = select(Job.id).where(
        Job.content_key.in_([job.content_key for job in existing]),
        Job.submission_id != submission,
        Job.state.not_in(FINAL_STATES),
    )
    with db.read() as connection:
        return list(connection.execute(query).scalars())


# --- running rows again ----------------------------------------------------------------------


def _reopen(
    db: Database, storage: Storage, submission: int, existing: list[NewJob], rerun: RerunOptions
) -> int:
    """Reopen the final jobs of these rows, as ``rerun`` says; return how many."""
    if not existing or not rerun:
        return 0
    rows = existing if rerun.all_rows else _changed_rows(db, storage, existing)
    lines = {job.content_key: job.line for job in rows}
    reopened = jobs.reopen_by_content_key(db, submission, lines, replace=rerun.all_rows)
    if rerun.all_rows:
        # "retry --set" gives a job another content key; --force undoes that.
        reopened += jobs.reopen_as_submitted(db, submission, rows)
    return reopened


# Versions (ETag, or size and time) of the image, of all masks and fonts, and of the result.
_FileVersions = tuple[str | None, ...]


def _changed_rows(db: Database, storage: Storage, existing: list[NewJob]) -> list[NewJob]:
    """Return the rows whose files are not the versions that the job's last run recorded."""
    recorded = _recorded_versions(db, existing)
    rows = [job for job in existing if job.content_key in recorded]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        current = pool.map(lambda job: _current_versions(storage, job), rows)
        return [
            job
            for job, versions in zip(rows, current, strict=True)
            if _differ(versions, recorded[job.content_key])
        ]


def _differ(current: _FileVersions, recorded: _FileVersions) -> bool:
    # A job that never succeeded has no result of its own; what is there is not compared.
    return current != recorded if recorded[-1] is not None else current[:-1] != recorded[:-1]


def _recorded_versions(db: Database, existing: list[NewJob]) -> dict[bytes, _FileVersions]:
    keys = [job.content_key for job in existing]
    columns = (Job.content_key, Job.image_version, Job.mask_version, Job.output_version)
    query = select(*columns).where(Job.content_key.in_(keys), Job.state.in_(FINAL_STATES))
    with db.read() as connection:
        return {key: tuple(versions) for key, *versions in connection.execute(query)}


def _current_versions(storage: Storage, job: NewJob) -> _FileVersions:
    masks = [*([job.mask] if is_file(job.mask) else []), *further_inputs(job.params)]
    image, output, *inputs = (
        _version(storage, location) for location in (job.image, job.output, *masks)
    )
    return image, join_versions(inputs), output


def _version(storage: Storage, location: str) -> str | None:
    stat = storage.stat(location)
    return stat.version if stat else None
