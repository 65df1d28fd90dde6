"""inpaint-submit's work: read and check every row, then record, then dispatch.

The manifest is read once; its checked rows wait in a temporary file, so that nothing is
recorded before the last row is known to be good, and memory does not grow with the rows.
"""

from __future__ import annotations

import json
import marshal
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b, sha256
from itertools import islice
from typing import IO

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from producer import audit
from producer.manifest import Problem, Row, read
from producer.rows import Options, Resolver
from shared import jobs, submissions
from shared.db import Database
from shared.errors import BrokerUnavailable, ManifestError
from shared.locations import parent
from shared.models import FINAL_STATES, Job
from shared.params import further_inputs, is_file
from shared.queue import Queue
from shared.storage import Storage
from shared.submissions import NewJob, joined_versions

CHUNK = 5000
STAT_THREADS = 16
MANY_FOLDERS = 4


# --- checking --------------------------------------------------------------------------------


class Spool:
    """Checked rows on disk, in the order they came; iterable any number of times."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="inpaint-")  # noqa: SIM115
        self._block: list[tuple[object, ...]] = []

    def append(self, job: NewJob) -> None:
        self._block.append(_astuple(job))
        if len(self._block) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        data = marshal.dumps(self._block)
        self._file.write(len(data).to_bytes(8, "big"))
        self._file.write(data)
        self._block = []

    def __iter__(self) -> Iterator[NewJob]:
        self._flush()
        end = self._file.tell()
        self._file.seek(0)
        try:
            while size := int.from_bytes(self._file.read(8), "big"):
                for values in marshal.loads(self._file.read(size)):  # noqa: S302 - written above
                    yield NewJob(**dict(zip(_FIELDS, values, strict=True)))
        finally:
            self._file.seek(end)

    def close(self) -> None:
        self._file.close()


_FIELDS = tuple(NewJob.__dataclass_fields__)


def _astuple(job: NewJob) -> tuple[object, ...]:
    return tuple(getattr(job, name) for name in _FIELDS)


@dataclass(kw_only=True)
class Checked:
    """A manifest whose rows are all known. ``digest`` is the same for the same rows.

    folders: where results go, the first few.
    """

    spool: Spool
    digest: str = ""
    rows: int = 0
    invalid: int = 0
    engines: set[str] = field(default_factory=set)
    folders: dict[str, None] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    def jobs(self) -> Iterator[NewJob]:
        return (job for job in self.spool if job.line not in self.skipped)


def check(options: Options, storage: Storage, *, report: Callable[[Problem], None]) -> Checked:
    """Reads the whole manifest; every problem is reported as it is found.

    Raises ManifestError for what spoils the whole file, an empty one included.
    """
    checked = Checked(spool=Spool())
    with ExitStack() as undo:
        undo.callback(checked.spool.close)
        _check_into(checked, options, storage, report)
        undo.pop_all()
    return checked


def _check_into(
    checked: Checked, options: Options, storage: Storage, report: Callable[[Problem], None]
) -> None:
    resolver = Resolver(options, storage)
    outputs = _Names()
    inputs = _Names()
    digest = sha256(options.manifest.encode())
    has_mask = options.mask is not None
    known = options.known_placeholders()
    for item in read(storage, options.manifest, placeholders=known, has_mask=has_mask):
        checked.rows += 1
        job = resolver.job(item) if isinstance(item, Row) else [item]
        if isinstance(job, list):
            checked.invalid += 1
            for problem in job:
                report(problem)
            continue
        checked.spool.append(job)
        checked.engines.add(job.engine)
        if len(checked.folders) < MANY_FOLDERS:
            checked.folders[parent(job.output)] = None
        outputs.add(job.output)
        inputs.add(job.image)
        if is_file(job.mask) and job.mask != options.mask:
            inputs.add(job.mask)
        for place in further_inputs(job.params):
            inputs.add(place)
        digest.update(b"%s %d %d\n" % (job.content_key, job.line, job.priority))
    if checked.rows == 0:
        raise ManifestError(f"{options.manifest}: no rows under the header; nothing to do")
    if options.mask is not None:
        inputs.add(options.mask)
    _check_outputs(checked, outputs, inputs, report)
    checked.digest = digest.hexdigest()


class _Names:
    """A 64-bit hash per name: eight bytes a row, enough to find the few that need a look."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, name: str) -> None:
        self._hashes.append(_hash(name))

    def repeated(self) -> set[int]:
        ordered = np.sort(self._array())
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

    def shared_with(self, other: _Names) -> set[int]:
        return set(np.intersect1d(self._array(), other._array()).tolist())

    def _array(self) -> NDArray[np.uint64]:
        return np.frombuffer(self._hashes, np.uint64)


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def _inputs(job: NewJob) -> Iterator[tuple[str, str]]:
    yield "image", job.image
    yield "mask", job.mask
    for place in further_inputs(job.params):
        yield "detail mask or font", place


def _check_outputs(
    checked: Checked, outputs: _Names, inputs: _Names, report: Callable[[Problem], None]
) -> None:
    """Two rows may share an output only where they ask for the very same work."""
    repeated, clashing = outputs.repeated(), outputs.shared_with(inputs)
    if not repeated and not clashing:
        return
    read_at = {
        source: (what, job.line)
        for job in checked.spool
        for what, source in _inputs(job)
        if clashing and _hash(source) in clashing
    }
    first: dict[str, NewJob] = {}
    for job in checked.spool:
        text = None
        if job.output in read_at:
            what, line = read_at[job.output]
            text = f"output: {job.output!r} is the {what} of line {line}"
        elif _hash(job.output) in repeated:
            same = first.setdefault(job.output, job)
            if same.content_key != job.content_key:
                text = f"output: {job.output!r} is also written by line {same.line}"
        if text:
            checked.invalid += 1
            checked.skipped.add(job.line)
            report(Problem(line=job.line, text=f"{text}; give the row an output of its own"))


def check_owners(checked: Checked, db: Database, *, report: Callable[[Problem], None]) -> None:
    """Reports rows whose output belongs to a job that asks for something else."""
    for chunk in _chunks(checked.jobs()):
        for taken in submissions.find_taken(db, checked.digest, chunk):
            checked.invalid += taken.row.line not in checked.skipped
            checked.skipped.add(taken.row.line)
            text = f"{taken}; give the row an output of its own, or replace that one with --force"
            report(Problem(line=taken.row.line, text=text))


# --- recording -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Summary:
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
    elsewhere: array[int] = field(default_factory=lambda: array("q"))
    broker_error: str | None = None

    def to_json(self) -> dict[str, int]:
        names = ("submission", "rows", "accepted", "duplicates", "invalid")
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True, kw_only=True)
class Again:
    """Which existing jobs run again: all (``--force``), or those whose inputs changed."""

    everything: bool = False
    changed: bool = False


def submit(
    checked: Checked,
    options: Options,
    *,
    db: Database,
    queue: Queue,
    storage: Storage,
    bound: int,
    again: Again,
    progress: Callable[[int], None] = lambda _rows: None,
) -> Summary:
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
    summary = Summary(
        submission=opened.id,
        rows=checked.rows,
        invalid=checked.invalid,
        resumed=opened.resumed,
        cut_off=opened.cut_off,
        again=again.everything or again.changed,
    )
    for chunk in _chunks(checked.jobs()):
        existing = submissions.record(db, opened.id, chunk, replace=again.everything)
        summary.elsewhere.extend(_unfinished_elsewhere(db, opened.id, existing))
        reopened = _run_again(db, storage, opened.id, existing, again)
        summary.accepted += len(chunk) - len(existing) + reopened
        summary.duplicates += len(existing) - reopened
        _dispatch(db, queue, checked.engines, bound, summary)
        progress(len(chunk))
    submissions.close_submission(db, opened.id)
    summary.left = audit.progress(db, opened.id).left
    return summary


def _recorded_options(options: Options) -> dict[str, object]:
    recorded = asdict(options)
    recorded["values"] = dict(options.values)
    return recorded


def _chunks(rows: Iterable[NewJob]) -> Iterator[list[NewJob]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _dispatch(db: Database, queue: Queue, engines: set[str], bound: int, summary: Summary) -> None:
    if summary.broker_error is not None:
        return
    try:
        for engine in sorted(engines):
            jobs.dispatch(db, queue, engine, bound=bound)
    except BrokerUnavailable as error:
        summary.broker_error = str(error)


def _run_again(
    db: Database, storage: Storage, submission: int, existing: list[NewJob], again: Again
) -> int:
    if not existing or not (again.everything or again.changed):
        return 0
    chosen = existing if again.everything else _changed(db, storage, existing)
    keys = {job.content_key: (submission, job.line) for job in chosen}
    reopened = jobs.rerun(db, keys, replace=again.everything)
    if again.everything:
        reopened += jobs.restore(db, submission, chosen)
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


_Versions = tuple[str | None, ...]


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


def _differ(now: _Versions, seen: _Versions) -> bool:
    """A job that never had a result can only have other inputs."""
    return now != seen if seen[-1] is not None else now[:-1] != seen[:-1]


def _recorded_versions(db: Database, existing: list[NewJob]) -> dict[bytes, _Versions]:
    keys = [job.content_key for job in existing]
    columns = (Job.content_key, Job.image_version, Job.mask_version, Job.output_version)
    with db.read() as connection:
        rows = connection.execute(
            select(*columns).where(Job.content_key.in_(keys), Job.state.in_(FINAL_STATES))
        ).all()
    return {key: tuple(versions) for key, *versions in rows}


def _versions(storage: Storage, job: NewJob) -> _Versions:
    masks = [*([job.mask] if is_file(job.mask) else []), *further_inputs(job.params)]
    image, output, *rest = (_version(storage, place) for place in (job.image, job.output, *masks))
    return image, joined_versions(rest), output


def _version(storage: Storage, place: str) -> str | None:
    found = storage.stat(place)
    return found.version if found else None
