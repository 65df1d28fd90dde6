"""How things look on a terminal: tables, progress, durations. Knows no SQL and no queue."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import RowMapping

from producer.reports import JobHistory, SubmissionProgress
from producer.reports import Progress as Counts

_NUMBERS = frozenset(
    [
        "submission",
        "rows",
        "done",
        "failed",
        "cancelled",
        "left",
        "job",
        "line",
        "attempts",
        "guidance",
        "steps",
        "strength",
    ]
)
_STATE_STYLES = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "yellow"}

WIDTH_OF_A_PIPE = 240


def out() -> Console:
    """Stdout; in a pipe nothing is folded to a terminal's width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)


def err() -> Console:
    return Console(
        stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDTH_OF_A_PIPE
    )


def escape(text: str) -> str:
    """Text from outside, for a terminal: no markup, and no control character takes effect."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escape_markup(shown)


def job_progress(console: Console) -> Progress:
    """A bar that counts finished jobs; on something that is no terminal it stays silent."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def duration(seconds: float | None) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``4.2 s``, or a dash."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def progress_line(counts: Counts) -> str:
    """One line: how many in each state, the rate and the time left."""
    states = "  ".join(f"{state} {number:,}" for state, number in counts.counts.items() if number)
    line = states or "no jobs"
    if counts.review:
        line += f"  ({counts.review:,} to review)"
    if counts.left:
        line += f"  |  {counts.rate:.2f} jobs/s  |  {duration(counts.seconds_left)} left"
    for trouble in counts.blocked:
        line += f"  |  {trouble.summary}: {escape(trouble.message)}"
    return line


def note(counts: Counts) -> str:
    """Beside a progress bar: what failed, and what keeps jobs waiting."""
    failed = [f"{counts.counts['failed']:,} failed"] if counts.counts["failed"] else []
    return ", ".join(failed + [f"{one.summary} ({one.code})" for one in counts.blocked])


def submissions_table(listed: Iterable[SubmissionProgress]) -> Table:
    table = _table(
        *("submission", "manifest", "submitted (UTC)", "rows"),
        *("done", "failed", "cancelled", "left"),
    )
    for one in listed:
        counts = one.counts
        left = sum(counts.get(state, 0) for state in ("pending", "queued", "running"))
        table.add_row(
            str(one.id),
            escape(one.manifest),
            f"{one.created_at:%Y-%m-%d %H:%M}",
            f"{one.rows:,}",
            f"{counts.get('succeeded', 0):,}",
            f"{counts.get('failed', 0):,}",
            f"{counts.get('cancelled', 0):,}",
            f"{left:,}",
        )
    return table


def jobs_table(rows: Iterable[RowMapping]) -> Table:
    table = _table("job", "submission", "line", "id", "state", "attempts", "code", "image")
    for row in rows:
        table.add_row(
            str(row["id"]),
            str(row["submission_id"]),
            str(row["line"]),
            escape(row["key"] or ""),
            _state(row["state"]),
            str(row["attempt"]),
            row["error_code"] or row["review"] or "",
            escape(row["image"]),
        )
    return table


def history_tables(job_history: JobHistory) -> Iterable[Table]:
    """The job's own facts, its parameters, then a table per attempt."""
    job = dict(job_history.job)
    params = json.loads(job.pop("params"))
    job.pop("content_key")
    yield _facts(f"job {job['id']}", job)
    yield _facts("parameters", params | {"seed": job["seed"]})
    for attempt in job_history.attempts:
        facts = dict(attempt)
        same = facts.pop("params") == job_history.job["params"] and facts["seed"] == job["seed"]
        facts["parameters"] = "as above" if same else attempt["params"]
        timings = json.loads(facts.pop("timings") or "{}")
        facts["timings"] = "  ".join(f"{name} {duration_ms(s)}" for name, s in timings.items())
        yield _facts(f"attempt {facts.pop('attempt')}", facts)


def duration_ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _facts(title: str, facts: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, _state(value) if name in ("state", "outcome") else _plain(value))
    return table


def _plain(value: object) -> str:
    text = value.isoformat(sep=" ", timespec="milliseconds") if hasattr(value, "isoformat") else ""
    return escape(text or str(value))


def _state(state: str) -> str:
    style = _STATE_STYLES.get(state)
    return f"[{style}]{state}[/{style}]" if style else state


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in _NUMBERS else "left",
            overflow="fold",
        )
    return table


def presets_table(presets: Iterable[Any]) -> Table:
    table = _table("preset", "guidance", "steps", "strength", "size", "use")
    for preset in presets:
        values = preset.values
        size = f"{values['width']}x{values['height']}" if "width" in values else ""
        table.add_row(
            preset.name,
            f"{values['guidance_scale']:g}",
            str(values["num_inference_steps"]),
            f"{values['strength']:g}",
            size,
            preset.use,
        )
    return table
