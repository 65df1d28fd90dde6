"""A manifest as a stream of rows: CSV, TSV or JSONL, plain or gzipped, on disk or on S3."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from shared.errors import ManifestError
from shared.params import BOOLEANS, PARAMETERS, did_you_mean
from shared.storage import Storage
from shared.storage.locations import name

FIELD_LIMIT = 64 * 1024
LINE_LIMIT = 1024 * 1024
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

LOCATION_COLUMNS = ("image", "mask", "output")
OTHER_COLUMNS = ("id", "preset", "engine", "priority", "style")
PASS_COLUMNS = ("detail_mask", "detail_prompt", "passes")
COLUMNS = (*LOCATION_COLUMNS, *OTHER_COLUMNS, *PASS_COLUMNS, *PARAMETERS)


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
    """The manifest's name without ``.csv``, ``.jsonl.gz`` and the like."""
    bare = name(manifest).removesuffix(".gz")
    return bare.rpartition(".")[0] or bare


def read(
    storage: Storage, manifest: str, *, placeholders: frozenset[str], has_mask: bool
) -> Iterator[ManifestRow | Problem]:
    """Rows, and problems in place of those that cannot be read, in the manifest's order.

    placeholders: columns allowed besides ours. has_mask: a mask is given for all rows.
    Raises ManifestError for what spoils the whole file: no rows, a missing, unknown or
    doubled column, not UTF-8, not gzip after all, changed while it was read.
    """
    known = frozenset(COLUMNS) | placeholders
    required = ("image",) if has_mask else ("image", "mask")
    before = storage.stat(manifest)
    with storage.open(manifest) as raw, _readable(manifest), _text(raw) as text:
        yield from _rows(manifest, text, known, required)
    if storage.stat(manifest) != before:
        raise ManifestError(f"{manifest}: changed while it was read; submit it again")


@contextmanager
def _readable(manifest: str) -> Iterator[None]:
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
    peeked = raw.peek(2)[:2]  # type: ignore[attr-defined]
    binary = gzip.GzipFile(fileobj=raw) if peeked == b"\x1f\x8b" else raw
    with io.TextIOWrapper(cast("IO[bytes]", binary), encoding="utf-8-sig", newline="") as text:
        yield text


def _rows(
    manifest: str, text: IO[str], known: frozenset[str], required: Iterable[str]
) -> Iterator[ManifestRow | Problem]:
    _, dot, ending = name(manifest).removesuffix(".gz").rpartition(".")
    extension = ending.lower() if dot else ""
    if extension in ("jsonl", "ndjson"):
        return _jsonl(manifest, text, known)
    if extension in ("csv", "tsv", "txt"):
        return _csv(manifest, text, known, required, "\t" if extension == "tsv" else ",")
    kind = f"a .{extension} file" if dot else "a file without an extension"
    raise ManifestError(
        f"{manifest}: {kind} is not a manifest; use .csv, .tsv or .jsonl, optionally .gz"
    )


def _csv(
    manifest: str, text: IO[str], known: frozenset[str], required: Iterable[str], delimiter: str
) -> Iterator[ManifestRow | Problem]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(_lines(manifest, text), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_delimiter(manifest, header, delimiter)
        check_columns(manifest, header, known, required)
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield _row(line, header, cells)
    except csv.Error as error:
        raise ManifestError(
            f"{manifest}: line {line}: {_quoting(error, line, reader.line_num)}; mend the quoting"
        ) from error


def _check_delimiter(manifest: str, header: list[str], delimiter: str) -> None:
    """One column whose name holds another delimiter is a header in another dialect."""
    for other, said in (("\t", "tabs"), (";", "semicolons"), ("|", "bars"), (",", "commas")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            wanted = "tabs" if delimiter == "\t" else "commas, or tabs in a .tsv"
            raise ManifestError(
                f"{manifest}: line 1: the columns are separated by {said}; save it with {wanted}"
            )


def _quoting(error: csv.Error, first: int, last: int) -> str:
    """A row of several lines has a quote that was to close earlier, so both ends are named."""
    if first == last:
        return str(error)
    return f"a quote that opens here is not closed as it should, up to line {last}: {error}"


def _lines(manifest: str, text: IO[str]) -> Iterator[str]:
    """The text's lines; raises ManifestError before a huge one fills the memory."""
    for number, content in enumerate(iter(lambda: text.readline(LINE_LIMIT), ""), start=1):
        if len(content) >= LINE_LIMIT:
            raise ManifestError(
                f"{manifest}: line {number}: longer than {LINE_LIMIT:,} characters; "
                "is this a manifest?"
            )
        yield content


def _row(line: int, header: list[str], cells: list[str]) -> ManifestRow | Problem:
    if len(cells) != len(header):
        return Problem(
            line=line,
            text=f"{len(cells)} cells under {len(header)} columns; "
            "quote cells that hold the delimiter",
        )
    stripped = {
        column: value for column, cell in zip(header, cells, strict=True) if (value := cell.strip())
    }
    return _storable(ManifestRow(line=line, cells=stripped))


def _storable(row: ManifestRow) -> ManifestRow | Problem:
    """The row, unless a cell holds what no database and no file name can."""
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
    """Raises ManifestError that lists every wrong column."""
    if not any(header):
        raise ManifestError(f"{manifest}: empty; the first line must name the columns")
    problems = [f"column {column!r} is missing" for column in required if column not in header]
    problems += [
        f"column {column!r} stands there twice"
        for column in sorted(set(header))
        if header.count(column) > 1
    ]
    problems += [
        f"column {column!r} is not known and fills no {{placeholder}}{did_you_mean(column, known)}"
        for column in dict.fromkeys(header)
        if column not in known
    ]
    if problems:
        raise ManifestError(f"{manifest}: line 1: " + "; ".join(problems))


def _jsonl(manifest: str, text: IO[str], known: frozenset[str]) -> Iterator[ManifestRow | Problem]:
    for line, content in enumerate(_lines(manifest, text), start=1):
        if content.strip():
            yield _json_row(line, content, known)


def _json_row(line: int, content: str, known: frozenset[str]) -> ManifestRow | Problem:
    try:
        values = json.loads(content, object_pairs_hook=_no_doubled_key)
    except (ValueError, RecursionError) as error:
        return Problem(line=line, text=f"not JSON: {error}")
    if not isinstance(values, dict):
        return Problem(line=line, text='not a JSON object; write {"image": ..., "mask": ...}')
    cells = {}
    for column, value in values.items():
        if column not in known:
            return Problem(
                line=line,
                text=f"{column}: not a known column and fills no {{placeholder}}"
                f"{did_you_mean(column, known)}",
            )
        if column == "passes" and isinstance(value, list):
            cells[column] = json.dumps(value)
        elif isinstance(value, dict | list) or (isinstance(value, bool) and column not in BOOLEANS):
            return Problem(line=line, text=f"{column}: {value!r} is not text or a number")
        elif value is not None and (cell := str(value).strip()):
            cells[column] = cell
    return _storable(ManifestRow(line=line, cells=cells))


def _no_doubled_key(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values
