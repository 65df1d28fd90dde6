"""Validates every row of a manifest before any is recorded.

The manifest is read once. Valid rows are spooled to a temporary file, so that memory does not
grow with the number of rows.
"""

from __future__ import annotations

import marshal
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import islice
from typing import IO

import numpy as np
from numpy.typing import NDArray

from producer.manifest import ManifestRow, Problem, read
from producer.resolve import RowDefaults, RowResolver
from shared.db import Database
from shared.errors import ManifestError, StorageUnavailable
from shared.jobs import submissions
from shared.jobs.submissions import NewJob
from shared.params import further_inputs, is_file
from shared.storage import Storage
from shared.storage.locations import parent

# Rows per transaction: few enough to keep locks short, enough that commits cost little.
CHUNK = 5000
MAX_FOLDERS = 4
_OWN_OUTPUT = "give the row an output of its own"


class JobSpool:
    """Jobs in a temporary file, in the order they were appended; can be iterated repeatedly."""

    def __init__(self) -> None:
        with _spool_errors():
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="inpaint-")  # noqa: SIM115
        self._buffer: list[tuple[object, ...]] = []

    def append(self, job: NewJob) -> None:
        self._buffer.append(_to_tuple(job))
        if len(self._buffer) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        # marshal suffices: tuples of str, bytes and int that only this process reads.
        data = marshal.dumps(self._buffer)
        with _spool_errors():
            self._file.write(len(data).to_bytes(8, "big"))
            self._file.write(data)
            self._file.flush()
        self._buffer = []

    def __iter__(self) -> Iterator[NewJob]:
        self._flush()
        end = self._file.tell()
        self._file.seek(0)
        try:
            while size := int.from_bytes(self._file.read(8), "big"):
                for values in marshal.loads(self._file.read(size)):  # noqa: S302 - written above
                    yield NewJob(**dict(zip(_FIELDS, values, strict=True)))
        finally:
            # A reader that stops early must not make the next append overwrite rows.
            self._file.seek(end)

    def close(self) -> None:
        # Closing writes what is left; where the disk is full, that has been reported.
        with suppress(OSError):
            self._file.close()


@contextmanager
def _spool_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StorageUnavailable(
            f"cannot write a temporary file: {reason}; free space, or set TMPDIR to another folder"
        ) from error


_FIELDS = tuple(NewJob.__dataclass_fields__)


def _to_tuple(job: NewJob) -> tuple[object, ...]:
    return tuple(getattr(job, name) for name in _FIELDS)


@dataclass(kw_only=True)
class ValidatedManifest:
    """The valid rows of a manifest, and what is known of all rows.

    digest: equal for manifests with equal rows. folders: the first ``MAX_FOLDERS`` folders of
    the results. skipped: lines whose row is in the spool but turned out invalid later.
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
        """Yield the valid rows, ``CHUNK`` at a time."""
        jobs = self.jobs()
        while chunk := list(islice(jobs, CHUNK)):
            yield chunk

    def close(self) -> None:
        self.spool.close()


def validate_manifest(
    defaults: RowDefaults, storage: Storage, *, report: Callable[[Problem], None]
) -> ValidatedManifest:
    """Read the whole manifest and report every problem; the caller closes the result.

    Raises ManifestError if the whole file is unusable, or has no rows.
    """
    manifest = ValidatedManifest(spool=JobSpool())
    with ExitStack() as on_error:
        on_error.callback(manifest.close)
        _Validation(manifest, defaults, storage, report).run()
        on_error.pop_all()
    return manifest


class _Validation:
    """One pass over a manifest's rows. Inputs and outputs are kept as hashes, to compare."""

    def __init__(
        self,
        manifest: ValidatedManifest,
        defaults: RowDefaults,
        storage: Storage,
        report: Callable[[Problem], None],
    ) -> None:
        self._manifest = manifest
        self._defaults = defaults
        self._storage = storage
        self._report = report
        self._resolver = RowResolver(defaults, storage)
        self._inputs = NameHashes()
        self._outputs = NameHashes()
        self._digest = sha256(defaults.manifest.encode())

    def run(self) -> None:
        defaults, manifest = self._defaults, self._manifest
        for row in read(
            self._storage,
            defaults.manifest,
            placeholders=defaults.known_placeholders(),
            has_mask=defaults.mask is not None,
        ):
            manifest.rows += 1
            self._add(row)
        if manifest.rows == 0:
            raise ManifestError(f"{defaults.manifest}: no rows under the header; nothing to do")
        if defaults.mask is not None:
            self._inputs.add(defaults.mask)
        _check_outputs(manifest, self._outputs, self._inputs, self._report)
        manifest.digest = self._digest.hexdigest()

    def _add(self, row: ManifestRow | Problem) -> None:
        job = self._resolver.resolve(row) if isinstance(row, ManifestRow) else [row]
        if isinstance(job, list):
            self._manifest.invalid += 1
            for problem in job:
                self._report(problem)
            return
        self._manifest.spool.append(job)
        self._manifest.engines.add(job.engine)
        if len(self._manifest.folders) < MAX_FOLDERS:
            self._manifest.folders[parent(job.output)] = None
        self._add_names(job)
        self._digest.update(b"%s %d %d\n" % (job.content_key, job.line, job.priority))

    def _add_names(self, job: NewJob) -> None:
        self._outputs.add(job.output)
        self._inputs.add(job.image)
        if is_file(job.mask) and job.mask != self._defaults.mask:
            self._inputs.add(job.mask)
        for location in further_inputs(job.params):
            self._inputs.add(location)


class NameHashes:
    """A 64-bit hash per name: 8 bytes per row, to find the few names that may be equal.

    A collision is harmless: names with equal hashes are compared in full afterwards.
    """

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


def _check_outputs(
    manifest: ValidatedManifest,
    outputs: NameHashes,
    inputs: NameHashes,
    report: Callable[[Problem], None],
) -> None:
    """Report rows whose output is an input of any row, or the output of a different job.

    Rows that ask for the very same work may share an output: they are one job.
    """
    repeated, clashing = outputs.repeated(), outputs.shared_with(inputs)
    if not repeated and not clashing:
        return
    readers = _readers(manifest.spool, clashing) if clashing else {}
    writers: dict[str, NewJob] = {}
    for job in manifest.spool:
        text = None
        if job.output in readers:
            role, line = readers[job.output]
            text = f"output: {job.output!r} is the {role} of line {line}"
        # Only outputs with a repeated hash are kept in full: a handful, not one per row.
        elif _hash(job.output) in repeated:
            first = writers.setdefault(job.output, job)
            if first.content_key != job.content_key:
                text = f"output: {job.output!r} is also written by line {first.line}"
        if text:
            manifest.invalid += 1
            manifest.skipped.add(job.line)
            report(Problem(line=job.line, text=f"{text}; {_OWN_OUTPUT}"))


def _readers(spool: JobSpool, clashing: set[int]) -> dict[str, tuple[str, int]]:
    """Map each input whose hash is in ``clashing`` to its role and the line that reads it."""
    return {
        location: (role, job.line)
        for job in spool
        for role, location in _inputs(job)
        if _hash(location) in clashing
    }


def _inputs(job: NewJob) -> Iterator[tuple[str, str]]:
    yield "image", job.image
    yield "mask", job.mask
    for location in further_inputs(job.params):
        yield "detail mask or font", location


def check_output_owners(
    manifest: ValidatedManifest, db: Database, *, report: Callable[[Problem], None]
) -> None:
    """Report rows whose output belongs to a recorded job that asks for different work."""
    for chunk in manifest.chunks():
        for contested in submissions.find_contested_outputs(db, manifest.digest, chunk):
            line = contested.row.line
            # A row may contest the outputs of several jobs, and is one invalid row.
            manifest.invalid += line not in manifest.skipped
            manifest.skipped.add(line)
            text = f"{contested}; {_OWN_OUTPUT}, or take that one over with --force"
            report(Problem(line=line, text=text))
