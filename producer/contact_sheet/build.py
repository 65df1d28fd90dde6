"""Writes a submission's contact sheet: the page, and the picture if one is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from producer import reports
from producer.contact_sheet import html
from producer.contact_sheet import png as png_sheet
from producer.contact_sheet.cards import Card, cards, usual_params
from producer.reports import RankedJobs
from shared.db import Database
from shared.errors import InputError
from shared.settings import Settings
from shared.storage import Storage
from shared.storage.locations import is_s3, parent


def write(
    db: Database,
    settings: Settings,
    submission: int,
    *,
    output: Path,
    png: Path | None,
    limit: int,
    roots: Sequence[Path] = (),
) -> RankedJobs:
    """The page at ``output``, whole or not at all; returns what it shows.

    roots: folders to read from, besides the settings' and the submission's own. Raises
    InputError where there is no such submission, nothing to show, or no place to write to.
    """
    ranked = reports.rank_jobs(db, submission, limit=limit)
    if ranked is None:
        raise InputError(f"submission {submission} does not exist; see inpaint-jobs status")
    if not ranked.jobs:
        raise InputError(f"no job of submission {submission} has succeeded or failed yet")
    usual = usual_params(ranked.sample)
    storage = Storage(roots=_roots(settings, ranked, roots), buckets=settings.buckets)
    kept: list[Card] = []
    found = cards(ranked.jobs, usual, storage, settings)
    with _replacing(output) as out:
        html.write(out, ranked, usual, _keeping(found, kept) if png else found)
    if png:
        title = f"Submission {submission}: the worst {len(kept)} of {_total(ranked)}"
        sheet = png_sheet.draw(title, kept)
        with _writable(png):
            sheet.save(png, "PNG")
    return ranked


def _total(ranked: RankedJobs) -> int:
    return len(ranked.jobs) + ranked.left_out


def _roots(settings: Settings, ranked: RankedJobs, named: Sequence[Path]) -> list[Path]:
    """Where the submission's own files lie: beside its manifest, at its output, and as named."""
    options = json.loads(ranked.submission["options"])
    own = [parent(ranked.submission["manifest"]), options.get("output") or ""]
    local = [os.path.realpath(place) for place in own if place and not is_s3(place)]
    return [*map(Path, local), *(Path(os.path.realpath(root)) for root in named), *settings.roots]


def _keeping(found: Iterable[Card], kept: list[Card]) -> Iterator[Card]:
    """Passes the cards on; the first few, which the picture shows, stay."""
    for card in found:
        if len(kept) < png_sheet.CARDS:
            kept.append(card)
        yield card


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writable(path):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as out:
                yield out
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name another file"
        ) from error
