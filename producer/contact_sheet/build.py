"""Writes a submission's contact sheet: the HTML page, and a PNG if asked for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from producer import reports
from producer.contact_sheet import html
from producer.contact_sheet import png as png_sheet
from producer.contact_sheet.cards import Card, build_cards, usual_params
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
    """Write the page to ``output``, completely or not at all; return the jobs it shows.

    roots: folders that images may be read from, besides the settings' and the submission's.
    Raises InputError if there is no such submission, nothing to show, or a file cannot be
    written.
    """
    ranked = reports.rank_jobs(db, submission, limit=limit)
    if ranked is None:
        raise InputError(f"submission {submission} does not exist; see inpaint-jobs status")
    if not ranked.jobs:
        raise InputError(f"no job of submission {submission} has succeeded or failed yet")
    usual = usual_params(ranked.params_sample)
    storage = Storage(roots=_roots(settings, ranked, roots), buckets=settings.buckets)
    png_cards: list[Card] = []
    cards = build_cards(ranked.jobs, usual, storage, settings)
    with _replace_when_complete(output) as out:
        html.write(out, ranked, usual, _collect_first(cards, png_cards) if png else cards)
    if png:
        total = len(ranked.jobs) + ranked.left_out
        title = f"Submission {submission}: the worst {len(png_cards)} of {total}"
        sheet = png_sheet.draw(title, png_cards)
        with _write_errors(png):
            sheet.save(png, "PNG")
    return ranked


def _roots(settings: Settings, ranked: RankedJobs, named: Sequence[Path]) -> list[Path]:
    """Folders to read from: the manifest's, the output's, ``--root`` and the settings'."""
    locations = [parent(ranked.manifest), ranked.options.get("output") or ""]
    # Storage compares real paths, so that no symlink leads out of a root.
    local = [os.path.realpath(place) for place in locations if place and not is_s3(place)]
    return [*map(Path, local), *(Path(os.path.realpath(root)) for root in named), *settings.roots]


def _collect_first(cards: Iterable[Card], first: list[Card]) -> Iterator[Card]:
    """Yield all cards and append those that the PNG shows to ``first``."""
    for card in cards:
        if len(first) < png_sheet.MAX_CARDS:
            first.append(card)
        yield card


@contextmanager
def _replace_when_complete(path: Path) -> Iterator[TextIO]:
    """Open a temporary file that replaces ``path`` at the end, unless an error is raised."""
    # In the same folder: a rename is atomic only within one file system. "x" and a random name:
    # nobody can plant a link that is written through.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _write_errors(path):
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as out:
                yield out
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Raise InputError in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name another file"
        ) from error
