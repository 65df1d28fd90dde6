"""A manifest as a stream of rows: CSV, TSV or JSONL, plain or gzipped, on disk or in S3."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from shared.errors import ManifestError
from shared.params import BOOLEANS, PARAMETERS, did_you_mean
from shared.storage import Storage
from shared.storage.locations import name

# Bounds on what one row may hold: without them a file that is no manifest fills the memory.
FIELD_LIMIT = 64 * 1024
LINE_LIMIT = 1024 * 1024
# There are about fifty known columns; the others fill placeholders.
COLUMN_LIMIT = 500
# A suggestion compares a name with every known one; further names are only listed.
_SUGGESTION_LIMIT, _LISTED_LIMIT = 5, 20

LOCATION_COLUMNS = ("image", "mask", "output")
OTHER_COLUMNS = ("key", "preset", "engine", "priority", "style")
PASS_COLUMNS = ("detail_mask", "detail_prompt", "passes")
COLUMNS = (*LOCATION_COLUMNS, *OTHER_COLUMNS, *PASS_COLUMNS, *PARAMETERS)
# Old name to new name. The old one works for one more version, with a warning.
RENAMED_COLUMNS = {"id": "key"}

# PostgreSQL's text type has no NUL; lone surrogates (JSON's "\ud800") have no UTF-8.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is wrong with one line; ``text`` names the column, the value and the remedy."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """One row's cells, stripped; empty ones are left out. ``line`` counts from 1."""

    line: int
    cells: Mapping[str, str]


def stem(manifest: str) -> str:
    """Return the manifest's name without ``.csv``, ``.jsonl.gz`` and the like."""
    without_gz = name(manifest).removesuffix(".gz")
    return without_gz.rpartition(".")[0] or without_gz


def read(
    storage: Storage, manifest: str, *, placeholders: frozenset[str], has_mask: bool
) -> Iterator[ManifestRow | Problem]:
    """Yield the rows in order; a row that cannot be read is yielded as a Problem.

    placeholders: columns allowed besides ``COLUMNS``. has_mask: one mask is given for all rows,
    so that the column is optional. Raises ManifestError if the whole file is unusable: no
    rows, a missing, unknown or duplicate column, not UTF-8, damaged gzip data, or changed
    during the read.
    """
    known = frozenset(COLUMNS) | placeholders
    required = ("image",) if has_mask else ("image", "mask")
    before = storage.stat(manifest)
    with storage.open(manifest) as raw, _reading_errors(manifest), _text(raw) as text:
        yield from _rows(manifest, text, known, required)
    # Half of the old rows and half of the new ones would be neither manifest.
    if storage.stat(manifest) != before:
        raise ManifestError(f"{manifest}: changed while it was read; submit it again")


@contextmanager
def _reading_errors(manifest: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ManifestError(
            f"{manifest}: not UTF-8 (byte {byte:#04x}: {error.reason}); save it as UTF-8"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ManifestError(f"{manifest}: the gzip data is damaged: {error}") from error


@contextmanager
def _text(raw: IO[bytes]) -> Iterator[IO[str]]:
    # By content, not by name: S3 objects and downloads often lose or keep a wrong ".gz".
    magic = raw.peek(2)[:2]  # type: ignore[attr-defined]
    binary = gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw
    # utf-8-sig drops the byte order mark that Excel writes.
    with io.TextIOWrapper(cast("IO[bytes]", binary), encoding="utf-8-sig", newline="") as text:
        yield text


def _rows(
    manifest: str, text: IO[str], known: frozenset[str], required: Iterable[str]
) -> Iterator[ManifestRow | Problem]:
    _, dot, suffix = name(manifest).removesuffix(".gz").rpartition(".")
    extension = suffix.lower() if dot else ""
    if extension in ("jsonl", "ndjson"):
        return _jsonl_rows(manifest, text, known)
    if extension in ("csv", "tsv", "txt"):
        delimiter = "\t" if extension == "tsv" else ","
        return _csv_rows(manifest, text, known, required, delimiter)
    kind = f"a .{extension} file" if dot else "a file without an extension"
    raise ManifestError(
        f"{manifest}: {kind} is not a manifest; use .csv, .tsv or .jsonl, optionally .gz"
    )


# --- CSV and TSV -----------------------------------------------------------------------------


def _csv_rows(
    manifest: str, text: IO[str], known: frozenset[str], required: Iterable[str], delimiter: str
) -> Iterator[ManifestRow | Problem]:
    csv.field_size_limit(FIELD_LIMIT)
    lines = _RowLines(manifest, text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if len(header) > COLUMN_LIMIT:
            raise ManifestError(f"{manifest}: line 1: {_too_many_columns(len(header))}")
        _check_delimiter(manifest, header, delimiter)
        header = _rename_header(manifest, header)
        check_columns(manifest, header, known, required)
        while True:
            line = reader.line_num + 1
            lines.start_row(line)
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield _csv_row(line, header, cells)
    except csv.Error as error:
        reason = _quoting_error(error, line, reader.line_num)
        raise ManifestError(f"{manifest}: line {line}: {reason}; fix the quoting") from error


def _check_delimiter(manifest: str, header: list[str], delimiter: str) -> None:
    """Raise ManifestError if the only column's name contains another delimiter."""
    for other, plural in (("\t", "tabs"), (";", "semicolons"), ("|", "bars"), (",", "commas")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            expected = "tabs" if delimiter == "\t" else "commas, or tabs in a .tsv"
            raise ManifestError(
                f"{manifest}: line 1: the columns are separated by {plural}; "
                f"save it with {expected}"
            )


def _rename_header(manifest: str, header: list[str]) -> list[str]:
    """Replace old column names, with a warning; raise ManifestError if both names are there."""
    for old, new in RENAMED_COLUMNS.items():
        if old in header and new in header:
            raise ManifestError(f"{manifest}: line 1: {_both_names(old, new)}")
        if old in header:
            _warn_of_old_name(manifest, old, new)
    return [RENAMED_COLUMNS.get(column, column) for column in header]


def _warn_of_old_name(manifest: str, old: str, new: str) -> None:
    log.warning(
        "%s: column %r is now called %r; the next version refuses the old name", manifest, old, new
    )


def _both_names(old: str, new: str) -> str:
    return f"columns {old!r} and {new!r} are the same, {old!r} is the old name; remove one of them"


def _too_many_columns(count: int) -> str:
    return f"{count:,} columns; at most {COLUMN_LIMIT} are allowed: is this a manifest?"


def _quoting_error(error: csv.Error, first: int, last: int) -> str:
    # The csv module names the line where it gave up; the unclosed quote is where the row begins.
    if first == last:
        return str(error)
    return f"a quote that opens here is not closed properly, up to line {last}: {error}"


class _RowLines:
    """A file's lines; raises ManifestError before a row of many lines fills the memory.

    Quoted cells may hold line ends, so that the csv module joins lines without a limit.
    """

    def __init__(self, manifest: str, text: IO[str]) -> None:
        self._manifest = manifest
        self._lines = _lines(manifest, text)
        self.start_row(1)

    def start_row(self, line: int) -> None:
        self._first_line, self._length = line, 0

    def __iter__(self) -> Iterator[str]:
        for content in self._lines:
            self._length += len(content)
            if self._length > LINE_LIMIT:
                raise ManifestError(
                    f"{self._manifest}: line {self._first_line}: a row of more than "
                    f"{LINE_LIMIT:,} characters; is a quote not closed?"
                )
            yield content


def _lines(manifest: str, text: IO[str]) -> Iterator[str]:
    """Yield the lines; raise ManifestError before a huge one fills the memory."""
    for number, content in enumerate(iter(lambda: text.readline(LINE_LIMIT), ""), start=1):
        if len(content) >= LINE_LIMIT:
            raise ManifestError(
                f"{manifest}: line {number}: longer than {LINE_LIMIT:,} characters; "
                "is this a manifest?"
            )
        yield content


def _csv_row(line: int, header: list[str], cells: list[str]) -> ManifestRow | Problem:
    if len(cells) != len(header):
        return Problem(
            line=line,
            text=f"{len(cells)} cells under {len(header)} columns; "
            "quote cells that hold the delimiter",
        )
    stripped = {
        column: value for column, cell in zip(header, cells, strict=True) if (value := cell.strip())
    }
    return _check_storable(ManifestRow(line=line, cells=stripped))


def _check_storable(row: ManifestRow) -> ManifestRow | Problem:
    """Return a Problem if a cell holds text that neither a database nor a file name can hold."""
    text = "".join(row.cells.values())
    if text.isprintable() or not _UNSTORABLE.search(text):
        return row
    column = next(column for column, cell in row.cells.items() if _UNSTORABLE.search(cell))
    return Problem(
        line=row.line, text=f"{column}: {row.cells[column]!r} holds NUL or half a character"
    )


def check_columns(
    manifest: str, header: list[str], known: frozenset[str], required: Iterable[str]
) -> None:
    """Raise ManifestError that lists every missing, duplicate and unknown column."""
    if not any(header):
        raise ManifestError(f"{manifest}: empty; the first line must name the columns")
    problems = [f"column {column!r} is missing" for column in required if column not in header]
    counts = Counter(header)
    problems += _listed(
        f"duplicate column {column!r}" for column in sorted(counts) if counts[column] > 1
    )
    unknown = (column for column in counts if column not in known)
    suggest = _Suggestions(known)
    problems += _listed(
        f"column {column!r} is not known and fills no {{placeholder}}{suggest(column)}"
        for column in unknown
    )
    if problems:
        raise ManifestError(f"{manifest}: line 1: " + "; ".join(problems))


class _Suggestions:
    """``did_you_mean`` for the first few unknown names: each is compared with all known ones."""

    def __init__(self, known: frozenset[str]) -> None:
        self._known = sorted(known)  # in the same order in every run
        self._given: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self._given and len(self._given) >= _SUGGESTION_LIMIT:
            return ""
        if name not in self._given:
            self._given[name] = did_you_mean(name, self._known)
        return self._given[name]


def _listed(problems: Iterable[str]) -> list[str]:
    """The first problems of a kind, and how many more there are."""
    listed = list(problems)
    more = len(listed) - _LISTED_LIMIT
    return listed[:_LISTED_LIMIT] + ([f"and {more:,} more like this"] if more > 0 else [])


# --- JSONL -----------------------------------------------------------------------------------


def _jsonl_rows(
    manifest: str, text: IO[str], known: frozenset[str]
) -> Iterator[ManifestRow | Problem]:
    warned: set[str] = set()
    suggest = _Suggestions(known)
    for line, content in enumerate(_lines(manifest, text), start=1):
        if not content.strip():
            continue
        values = _parse_object(line, content)
        if isinstance(values, Problem):
            yield values
            continue
        if len(values) > COLUMN_LIMIT:
            yield Problem(line=line, text=_too_many_columns(len(values)))
            continue
        for old in (values.keys() & RENAMED_COLUMNS.keys()) - warned:
            warned.add(old)
            _warn_of_old_name(manifest, old, RENAMED_COLUMNS[old])
        yield _json_row(line, values, known, suggest)


def _parse_object(line: int, content: str) -> dict[str, object] | Problem:
    try:
        values = json.loads(content, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        return Problem(line=line, text=f"not JSON: {error}")
    if not isinstance(values, dict):
        return Problem(line=line, text='not a JSON object; write {"image": ..., "mask": ...}')
    return values


def _json_row(
    line: int, values: Mapping[str, object], known: frozenset[str], suggest: _Suggestions
) -> ManifestRow | Problem:
    cells: dict[str, str] = {}
    for field, value in values.items():
        column = RENAMED_COLUMNS.get(field, field)
        if column != field and column in values:
            return Problem(line=line, text=_both_names(field, column))
        if column not in known:
            return Problem(
                line=line,
                text=f"{column}: not a known column and fills no {{placeholder}}{suggest(column)}",
            )
        cell = _cell_text(column, value)
        if cell is None:
            return Problem(line=line, text=f"{column}: {value!r} is not text or a number")
        if cell:
            cells[column] = cell
    return _check_storable(ManifestRow(line=line, cells=cells))


def _cell_text(column: str, value: object) -> str | None:
    """Return a JSON value as a CSV cell would hold it; None if it has no such form."""
    if column == "passes" and isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, dict | list) or (isinstance(value, bool) and column not in BOOLEANS):
        return None
    return "" if value is None else str(value).strip()


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # json.loads keeps the last of two equal keys without a warning.
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("duplicate key")
    return values
