"""Renders the contact sheet's page, ``page.html.j2``: one file, no network, no foreign script.

Every text from outside passes ``_printable`` and Jinja2's escaping. Exempt (``Markup``) are only
the page's own style and script, and URIs made here. Without JavaScript the images are shown side
by side.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from producer.contact_sheet.cards import Card
from producer.reports import RankedJob, RankedJobs
from shared.storage.locations import is_s3

WEBP_QUALITY = 84
GOOD_SCORE, FAIR_SCORE = 0.75, 0.5
MAX_CHARACTERS = 600
BAR_PX = 44


def write(out: TextIO, ranked: RankedJobs, usual: Mapping[str, Any], cards: Iterable[Card]) -> None:
    """Write the whole page. usual: parameters that the cards do not repeat.

    ``cards`` is consumed as the page is written, so that few images are in memory at a time.
    """
    page = _environment().get_template("page.html.j2")
    for part in page.generate(
        style=Markup(_read_asset("page.css")),  # noqa: S704 - the page's own
        script=Markup(_read_asset("page.js")),  # noqa: S704
        ranked=ranked,
        usual=usual,
        bars=_bars(ranked.scores),
        choices=_choices(ranked.jobs),
        cards=cards,
        good=GOOD_SCORE,
        fair=FAIR_SCORE,
    ):
        out.write(part)


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=_printable,
        loader=FunctionLoader(_read_asset),
        undefined=StrictUndefined,
        # A line that holds only a block leaves no empty line in the page.
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "csp_hash": _csp_hash,
        "facts": _facts,
        "file_uri": _file_uri,
        "grade": _grade,
        "image_uri": _image_uri,
        "job_class": _job_class,
        "mask_uri": _mask_uri,
        "parameter_text": _parameter_text,
        "thousands": "{:,}".format,
    }
    return environment


def _read_asset(name: str) -> str:
    return resources.files("producer.contact_sheet").joinpath(name).read_text("utf-8")


def _printable(value: object) -> object:
    """Cut long text, and write control characters as ``\\x1b``: none takes effect in a browser.

    Right-to-left overrides, which could disguise a file name, are among them.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = value if len(value) <= MAX_CHARACTERS else value[:MAX_CHARACTERS] + "..."
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _csp_hash(source: str) -> str:
    """The source expression by which a Content-Security-Policy allows an inline element."""
    return f"sha256-{b64encode(sha256(source.encode()).digest()).decode()}"


# --- the top of the page ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of the histogram, in the units of its viewBox."""

    grade: str
    x: int
    y: str
    height: str
    label: str


def _bars(counts: list[int]) -> list[Bar]:
    """Return a bar per score bin; none if no result has a score."""
    highest = max(counts)
    if not highest:
        return []
    return [_bar(number, count, highest, len(counts)) for number, count in enumerate(counts)]


def _bar(number: int, count: int, highest: int, bins: int) -> Bar:
    # On a square-root scale, on which a single bad result among thousands is still seen.
    height = BAR_PX * (count / highest) ** 0.5
    return Bar(
        grade=_grade((number + 0.5) / bins),
        x=number * 10 + 1,
        y=f"{46 - height:.1f}",
        height=f"{height:.1f}",
        label=f"{number / bins:.2f} to {(number + 1) / bins:.2f}: {count:,}",
    )


def _grade(score: float) -> str:
    return "good" if score >= GOOD_SCORE else "fair" if score >= FAIR_SCORE else "poor"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A radio button that shows only some of the cards. ``page.css`` knows its name."""

    name: str
    count: int


def _choices(jobs: list[RankedJob]) -> list[Choice]:
    classes = [_job_class(job) for job in jobs]
    return [
        Choice(name="all", count=len(jobs)),
        *(Choice(name=name, count=classes.count(name)) for name in ("failed", "review")),
    ]


# --- a card ----------------------------------------------------------------------------------


def _job_class(job: RankedJob) -> str:
    if job.state == "failed":
        return "failed"
    return "review" if job.review else "done"


def _facts(job: RankedJob) -> dict[str, object]:
    """Return what is listed under the images, by name."""
    facts: dict[str, object] = {"job": job.job, "line": job.line, "seed": job.seed}
    if job.attempt > 1:
        facts["attempts"] = job.attempt
    scores = json.loads(job.scores) if job.scores else {}
    return facts | {
        name.replace("_", " "): f"{float(value):.2f}"
        for name, value in scores.items()
        # The score is shown above, and a metric of 0 found nothing.
        if name not in ("score", "finite") and value
    }


def _parameter_text(value: object) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value, ensure_ascii=False)


def _image_uri(image: Image.Image) -> Markup:
    stream = io.BytesIO()
    profile = image.info.get("icc_profile") or b""
    image.save(stream, "WEBP", quality=WEBP_QUALITY, method=3, icc_profile=profile)
    return _data_uri("image/webp", stream.getvalue())


def _mask_uri(mask: Image.Image | None) -> Markup | None:
    """Return the mask as a magenta overlay, or None if it is empty or unknown."""
    if mask is None or not mask.getbbox():
        return None
    overlay = mask.point(lambda value: 1 if value else 0).convert("P")
    overlay.putpalette((0, 0, 0, 255, 0, 140))
    stream = io.BytesIO()
    overlay.save(stream, "PNG", transparency=bytes((0, 130)), bits=1)
    return _data_uri("image/png", stream.getvalue())


def _data_uri(media_type: str, data: bytes) -> Markup:
    return Markup(f"data:{media_type};base64,{b64encode(data).decode()}")  # noqa: S704 - base64


def _file_uri(location: str) -> Markup | None:
    """Return a link's target, or None for what a browser cannot open: S3, ``alpha``, boxes."""
    if is_s3(location) or not location.startswith("/"):
        return None
    return escape(Path(location).as_uri())
