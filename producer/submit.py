"""inpaint-submit's work once every row is checked: record, then dispatch."""

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

STAT_THREADS = 16


@dataclass(kw_only=True)
class SubmitResult:
    """What one submission did. ``accepted``: rows that will run because of it.

    duplicates: rows whose job existed already and was left as it is. left: jobs of the
    submission that are not final. again: --force or --changed was given. elsewhere: ids of
    jobs that earlier submissions own, that this one asks for as well, and that are not final.
    """

    submission: int
    rows: int
    accepted: int = 0
    duplicates: int = 0
    invalid: int = 0
    resumed: bool = False
    cut_off: bool = False
    again: bool = False
    left: int = 0
    earlier_jobs: array[int] = field(default_factory=lambda: array("q"))
    broker_error: str | None = None

    def to_json(self) -> dict[str, int]:
        names = ("submission", "rows", "accepted", "duplicates", "invalid")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True, kw_only=True)
class RerunOptions:
    """Which existing jobs run again: all (``--force``), or those whose inputs changed."""

    all_rows: bool = False
    changed: bool = False


def submit(
    checked: ValidatedManifest,
    options: RowDefaults,
    *,
    db: Database,
    queue: Queue,
    storage: Storage,
    bound: int,
    again: RerunOptions,
    progress: Callable[[int], None] = lambda _rows: None,
) -> SubmitResult:
    """Records every checked row and dispatches as it goes; safe to repeat after a crash.

    A broker that does not answer is not an error: the jobs are recorded, workers dispatch
    them later, and the summary says so.
    """
    opened = submissions.open_submission(
        db,
        manifest=options.manifest,
        digest=checked.digest,
        options=json.dumps(_recorded_options(options)),
        rows=checked.rows,
        invalid=checked.invalid,
    )
    summary = SubmitResult(
        submission=opened.id,
        rows=checked.rows,
        invalid=checked.invalid,
        resumed=opened.resumed,
        cut_off=opened.interrupted,
        again=again.all_rows or again.changed,
    )
    for chunk in checked.chunks():
        existing = submissions.record(db, opened.id, chunk, replace=again.all_rows)
        summary.earlier_jobs.extend(_unfinished_elsewhere(db, opened.id, existing))
        reopened = _run_again(db, storage, opened.id, existing, again)
        summary.accepted += len(chunk) - len(existing) + reopened
        summary.duplicates += len(existing) - reopened
        _dispatch(db, queue, checked.engines, bound, summary)
        progress(len(chunk))
    submissions.close_submission(db, opened.id)
    summary.left = reports.measure_progress(db, opened.id).left
    return summary


def _recorded_options(options: RowDefaults) -> dict[str, object]:
    recorded = asdict(options)
    recorded["values"] = dict(options.values)
    return recorded


def _dispatch(
    db: Database, queue: Queue, engines: set[str], bound: int, summary: SubmitResult
) -> None:
    if summary.broker_error is not None:
        return
    try:
        for engine in sorted(engines):
            jobs.dispatch(db, queue, engine, bound=bound)
    except BrokerUnavailable as error:
        summary.broker_error = str(error)


def _run_again(
    db: Database, storage: Storage, submission: int, existing: list[NewJob], again: RerunOptions
) -> int:
    if not existing or not (again.all_rows or again.changed):
        return 0
    chosen = existing if again.all_rows else _changed(db, storage, existing)
    lines = {job.content_key: job.line for job in chosen}
    reopened = jobs.reopen_by_content_key(db, submission, lines, replace=again.all_rows)
    if again.all_rows:
        reopened += jobs.reopen_as_submitted(db, submission, chosen)
    return reopened


def _unfinished_elsewhere(db: Database, submission: int, existing: list[NewJob]) -> list[int]:
    if not existing:
        return []
    keys = [job.content_key for job in existing]
    chosen = select(Job.id).where(
        Job.content_key.in_(keys),
        Job.submission_id != submission,
        Job.state.not_in(FINAL_STATES),
    )
    with db.read() as connection:
        return list(connection.execute(chosen).scalars())


_FileVersions = tuple[str | None, ...]


def _changed(db: Database, storage: Storage, existing: list[NewJob]) -> list[NewJob]:
    """Those whose image, mask or result is not the version that the last finished run left."""
    seen = _recorded_versions(db, existing)
    rows = [job for job in existing if job.content_key in seen]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        now = pool.map(lambda job: _versions(storage, job), rows)
        return [
            job
            for job, found in zip(rows, now, strict=True)
            if _differ(found, seen[job.content_key])
        ]


def _differ(now: _FileVersions, seen: _FileVersions) -> bool:
    """A job that never had a result can only have other inputs."""
    return now != seen if seen[-1] is not None else now[:-1] != seen[:-1]


def _recorded_versions(db: Database, existing: list[NewJob]) -> dict[bytes, _FileVersions]:
    keys = [job.content_key for job in existing]
    columns = (Job.content_key, Job.image_version, Job.mask_version, Job.output_version)
    with db.read() as connection:
        rows = connection.execute(
            select(*columns).where(Job.content_key.in_(keys), Job.state.in_(FINAL_STATES))
        ).all()
    return {key: tuple(versions) for key, *versions in rows}


def _versions(storage: Storage, job: NewJob) -> _FileVersions:
    masks = [*([job.mask] if is_file(job.mask) else []), *further_inputs(job.params)]
    image, output, *rest = (_version(storage, place) for place in (job.image, job.output, *masks))
    return image, join_versions(rest), output


def _version(storage: Storage, place: str) -> str | None:
    found = storage.stat(place)
    return found.version if found else None
