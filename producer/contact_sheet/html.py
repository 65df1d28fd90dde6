"""The contact sheet as one HTML file: no network, no scripts but its own, nothing unescaped.

Written card by card; without JavaScript the pictures stand side by side.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from hashlib import sha256
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from sqlalchemy import RowMapping

from producer.contact_sheet.cards import Card, View
from producer.reports import RankedJobs
from shared.storage.locations import is_s3

WEBP_QUALITY = 84
GOOD, FAIR = 0.75, 0.5
SHOWN_CHARACTERS = 600


def write(out: TextIO, ranked: RankedJobs, usual: Mapping[str, Any], cards: Iterable[Card]) -> None:
    """The whole page. usual: parameters that the cards do not repeat."""
    style, script = _asset("page.css"), _asset("page.js")
    out.write(_head(ranked, style, script))
    out.write(_summary(ranked, usual))
    out.write('<main class="cards">\n')
    for card in cards:
        out.write(_card(card))
    out.write(f"</main>\n<script>{script}</script>\n</body>\n</html>\n")


def _asset(name: str) -> str:
    return resources.files("producer.contact_sheet").joinpath(name).read_text("utf-8")


def text(value: object) -> str:
    """Text from outside for HTML: no markup, and no control character takes effect."""
    shown = str(value)
    if len(shown) > SHOWN_CHARACTERS:
        shown = shown[:SHOWN_CHARACTERS] + "..."
    printable = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown
    )
    return escape(printable, quote=True)


def _head(ranked: RankedJobs, style: str, script: str) -> str:
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    title = text(f"Submission {ranked.submission['id']}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )


def _digest(source: str) -> str:
    return f"sha256-{b64encode(sha256(source.encode()).digest()).decode()}"


# --- the top ---------------------------------------------------------------------------------


def _summary(ranked: RankedJobs, usual: Mapping[str, Any]) -> str:
    one = ranked.submission
    left_out = ""
    if ranked.left_out:
        left_out = f"; {ranked.left_out:,} more are left out"
    shown = f"{len(ranked.jobs):,} jobs, the worst first{left_out}"
    return (
        f'<header class="top">\n<div class="titles">\n<h1>Submission {one["id"]}</h1>\n'
        f'<p class="manifest">{text(one["manifest"])}</p>\n<p>{shown}</p>\n'
        f"{_usual(usual)}</div>\n{_histogram(ranked.scores)}</header>\n{_controls(ranked)}"
    )


def _usual(usual: Mapping[str, Any]) -> str:
    if not usual:
        return ""
    return f"<details><summary>Usual parameters</summary>{_values(usual)}</details>\n"


def _values(values: Mapping[str, Any]) -> str:
    return (
        '<dl class="values">'
        + "".join(
            f"<div><dt>{text(name)}</dt><dd>{text(_shown(value))}</dd></div>"
            for name, value in values.items()
        )
        + "</dl>"
    )


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value, ensure_ascii=False)


def _histogram(counts: list[int]) -> str:
    """Bars of how many results scored how much, on a square-root scale."""
    highest = max(counts)
    if not highest:
        return ""
    bars = []
    for place, count in enumerate(counts):
        tall = 44 * (count / highest) ** 0.5
        kind = _grade((place + 0.5) / len(counts))
        label = f"{place / len(counts):.2f} to {(place + 1) / len(counts):.2f}: {count:,}"
        bars.append(
            f'<rect class="{kind}" x="{place * 10 + 1}" y="{46 - tall:.1f}" width="8" '
            f'height="{tall:.1f}"><title>{label}</title></rect>'
        )
    return (
        '<figure class="histogram"><svg viewBox="0 0 200 47" role="img" '
        'aria-label="How many results scored how much">'
        f'{"".join(bars)}<path d="M0 46.5H200"/></svg>'
        "<figcaption><span>0</span><span>score of every result</span><span>1</span></figcaption>"
        "</figure>\n"
    )


def _grade(score: float) -> str:
    return "good" if score >= GOOD else "fair" if score >= FAIR else "poor"


def _controls(ranked: RankedJobs) -> str:
    kinds = [_kind(job) for job in ranked.jobs]
    choices = [("all", "All", len(kinds))]
    choices += [(kind, kind.capitalize(), kinds.count(kind)) for kind in ("failed", "review")]
    buttons = "".join(
        f'<label><input type="radio" name="show" id="show-{name}"'
        f"{' checked' if name == 'all' else ''}>{label} <b>{count:,}</b></label>"
        for name, label, count in choices
    )
    return (
        '<nav class="controls" aria-label="What is shown">\n'
        f'<div class="choice" role="group" aria-label="Jobs">{buttons}</div>\n'
        '<label><input type="checkbox" id="show-mask">Mask</label>\n'
        '<p class="help">Drag a picture, or move with the arrow keys; space or a double click '
        "flips between before and after.</p>\n</nav>\n"
    )


def _kind(job: RowMapping) -> str:
    if job["state"] == "failed":
        return "failed"
    return "review" if job["review"] else "done"


# --- a card ----------------------------------------------------------------------------------


def _card(card: Card) -> str:
    job, kind = card.job, _kind(card.job)
    name = job["key"] or f"job {job['id']}"
    views = _view(card.whole, name, "whole")
    if card.close_up:
        views += _view(card.close_up, name, "close-up")
    return (
        f'<article class="card {kind}" id="job-{job["id"]}">\n<header>'
        f"<h2><bdi>{text(name)}</bdi></h2>{_score(job)}</header>\n"
        f'{_remark(job)}<div class="views">{views}</div>\n'
        f"{_notes(card)}{_facts(card)}</article>\n"
    )


def _score(job: RowMapping) -> str:
    if job["score"] is None:
        return ""
    score = job["score"]
    return (
        f'<span class="score {_grade(score)}" title="0 is the worst, 1 the best">'
        f'<meter min="0" low="{FAIR}" high="{GOOD}" optimum="1" max="1" value="{score:.3f}">'
        f"</meter>{score:.2f}</span>"
    )


def _remark(job: RowMapping) -> str:
    if job["state"] == "failed":
        code, message = job["error_code"], job["error_message"] or ""
        return f'<p class="remark"><b>failed: {text(code)}</b> {text(message)}</p>\n'
    if job["review"]:
        return f'<p class="remark"><b>to be reviewed: {text(job["review"])}</b></p>\n'
    return ""


def _view(view: View, name: str, kind: str) -> str:
    """Two pictures and a slider; one where there is only one; a note where there is none."""
    sides = [(side, image) for side, image in (("before", view.before), ("after", view.after))]
    there = [(side, image) for side, image in sides if image is not None]
    if not there:
        return '<p class="missing">no picture</p>'
    width, height = there[0][1].size
    mask = _mask(view.mask, width, height)
    pictures = "".join(
        f'<figure class="{side}"><img class="{image.mode.lower()}" src="{_data(image)}" '
        f'width="{width}" height="{height}" alt="{side}, {kind}: {text(name)}" '
        f'draggable="false">{mask}<figcaption>{side}</figcaption></figure>'
        for side, image in there
    )
    if len(there) == 1:
        return f'<div class="view single {kind}">{pictures}</div>'
    label = f"{kind}, before to after: {text(name)}"
    slider = (
        f'<input type="range" min="0" max="100" step="1" value="50" aria-label="{label}" hidden>'
    )
    return f'<div class="view pair {kind}">{pictures}{slider}</div>'


def _mask(mask: Image.Image | None, width: int, height: int) -> str:
    if mask is None or not mask.getbbox():
        return ""
    tinted = mask.point(lambda value: 1 if value else 0).convert("P")
    tinted.putpalette((0, 0, 0, 255, 0, 140))
    stream = io.BytesIO()
    tinted.save(stream, "PNG", transparency=bytes((0, 130)), bits=1)
    data = b64encode(stream.getvalue()).decode()
    return (
        f'<img class="mask" src="data:image/png;base64,{data}" width="{width}" '
        f'height="{height}" alt="">'
    )


def _data(image: Image.Image) -> str:
    stream = io.BytesIO()
    profile = image.info.get("icc_profile") or b""
    image.save(stream, "WEBP", quality=WEBP_QUALITY, method=3, icc_profile=profile)
    return f"data:image/webp;base64,{b64encode(stream.getvalue()).decode()}"


def _notes(card: Card) -> str:
    if not card.notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in card.notes)
    return f'<ul class="notes">{items}</ul>\n'


def _facts(card: Card) -> str:
    job = card.job
    facts = {"job": job["id"], "line": job["line"], "seed": job["seed"]}
    if job["attempt"] > 1:
        facts["attempts"] = job["attempt"]
    facts |= _figures(job)
    short = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts.items())
    places = "".join(
        f"<div><dt>{name}</dt><dd>{_place(job[name])}</dd></div>"
        for name in ("image", "mask", "output")
    )
    own = _values(card.params) if card.params else ""
    return (
        f'<footer><p class="facts">{short}</p>\n{own}'
        f'<details><summary>Files</summary><dl class="values">{places}</dl></details></footer>\n'
    )


def _figures(job: RowMapping) -> dict[str, str]:
    """What the gates measured, as far as it is more than nothing."""
    found = json.loads(job["scores"]) if job["scores"] else {}
    return {
        text(name.replace("_", " ")): f"{float(value):.2f}"
        for name, value in found.items()
        if name not in ("score", "finite") and value
    }


def _place(location: str) -> str:
    """A link where a browser can follow it."""
    if is_s3(location) or not location.startswith("/"):
        return text(location)
    return f'<a href="{escape(Path(location).as_uri(), quote=True)}">{text(location)}</a>'
