"""A manifest's rows, all read and checked before anything is recorded.

The manifest is read once; its checked rows wait in a temporary file, so that memory does not
grow with the rows.
"""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import islice
from typing import IO

import numpy as np
from numpy.typing import NDArray

from producer.manifest import ManifestRow, Problem, read
from producer.resolve import RowDefaults, RowResolver
from shared.db import Database
from shared.errors import ManifestError
from shared.jobs import submissions
from shared.jobs.submissions import NewJob
from shared.params import further_inputs, is_file
from shared.storage import Storage
from shared.storage.locations import parent

CHUNK = 5000
MANY_FOLDERS = 4


class JobSpool:
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
class ValidatedManifest:
    """A manifest whose rows are all known. ``digest`` is the same for the same rows.

    folders: where results go, the first few.
    """

    spool: JobSpool
    digest: str = ""
    rows: int = 0
    invalid: int = 0
    engines: set[str] = field(default_factory=set)
    folders: dict[str, None] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    def jobs(self) -> Iterator[NewJob]:
        return (job for job in self.spool if job.line not in self.skipped)

    def chunks(self) -> Iterator[list[NewJob]]:
        """The same, as many at a time as one transaction takes."""
        rows = self.jobs()
        while chunk := list(islice(rows, CHUNK)):
            yield chunk


def validate_manifest(
    options: RowDefaults, storage: Storage, *, report: Callable[[Problem], None]
) -> ValidatedManifest:
    """Reads the whole manifest; every problem is reported as it is found.

    Raises ManifestError for what spoils the whole file, an empty one included.
    """
    checked = ValidatedManifest(spool=JobSpool())
    with ExitStack() as undo:
        undo.callback(checked.spool.close)
        _validate_into(checked, options, storage, report)
        undo.pop_all()
    return checked


def _validate_into(
    checked: ValidatedManifest,
    options: RowDefaults,
    storage: Storage,
    report: Callable[[Problem], None],
) -> None:
    resolver = RowResolver(options, storage)
    outputs = NameHashes()
    inputs = NameHashes()
    digest = sha256(options.manifest.encode())
    has_mask = options.mask is not None
    known = options.known_placeholders()
    for item in read(storage, options.manifest, placeholders=known, has_mask=has_mask):
        checked.rows += 1
        job = resolver.job(item) if isinstance(item, ManifestRow) else [item]
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


class NameHashes:
    """A 64-bit hash per name: eight bytes a row, enough to find the few that need a look."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, name: str) -> None:
        self._hashes.append(_hash(name))

    def repeated(self) -> set[int]:
        ordered = np.sort(self._array())
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

    def shared_with(self, other: NameHashes) -> set[int]:
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
    checked: ValidatedManifest,
    outputs: NameHashes,
    inputs: NameHashes,
    report: Callable[[Problem], None],
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


def check_output_owners(
    checked: ValidatedManifest, db: Database, *, report: Callable[[Problem], None]
) -> None:
    """Reports rows whose output belongs to a job that asks for something else."""
    for chunk in checked.chunks():
        for taken in submissions.find_contested_outputs(db, checked.digest, chunk):
            checked.invalid += taken.row.line not in checked.skipped
            checked.skipped.add(taken.row.line)
            text = f"{taken}; give the row an output of its own, or replace that one with --force"
            report(Problem(line=taken.row.line, text=text))
