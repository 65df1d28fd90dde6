"""How things look on a terminal: tables, progress bars, durations. No SQL and no queue."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import RowMapping

from producer.reports import JobHistory, SubmissionProgress
from producer.reports import Progress as JobProgress
from shared.presets import Preset

_RIGHT_ALIGNED = frozenset(
    (
        *("submission", "rows", "done", "failed", "cancelled", "left"),
        *("job", "line", "attempts", "guidance", "steps", "strength"),
    )
)
_STATE_STYLES = {"succeeded": "green", "failed": "red", "running": "cyan", "cancelled": "yellow"}

# rich takes 80 columns for a pipe, and would fold the paths that a script looks for.
PIPE_WIDTH = 240


def stdout_console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)


def escape(text: str) -> str:
    """Escape text from outside: markup is printed as it is, control characters as ``\\x1b``."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escape_markup(printable)


def progress_bar(console: Console) -> Progress:
    """Return a progress bar that counts jobs; it prints nothing unless on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def format_duration(seconds: float | None) -> str:
    """Return ``2 h 05 min``, ``3 min 20 s``, ``4.2 s``, or ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_milliseconds(seconds: float) -> str:
    """Return ``12.3 ms``, or ``2.50 s`` from one second on."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def progress_line(progress: JobProgress) -> str:
    """Return one line: jobs per state, the rate, the time left, and what blocks jobs."""
    states = "  ".join(f"{state} {count:,}" for state, count in progress.counts.items() if count)
    line = states or "no jobs"
    if progress.review:
        line += f"  ({progress.review:,} to review)"
    if progress.left:
        time_left = format_duration(progress.seconds_left)
        line += f"  |  {progress.rate:.2f} jobs/s  |  {time_left} left"
    for blocked in progress.blocked:
        line += f"  |  {blocked.summary}: {escape(blocked.message)}"
    return line


def progress_note(progress: JobProgress) -> str:
    """Return the text next to a progress bar: failed and blocked jobs."""
    failed = progress.counts["failed"]
    notes = [f"{failed:,} failed"] if failed else []
    notes += [f"{blocked.summary} ({blocked.code})" for blocked in progress.blocked]
    return ", ".join(notes)


def submissions_table(submissions: Iterable[SubmissionProgress]) -> Table:
    table = _table(
        *("submission", "manifest", "submitted (UTC)", "rows"),
        *("done", "failed", "cancelled", "left"),
    )
    for submission in submissions:
        counts = submission.counts
        table.add_row(
            str(submission.submission),
            escape(submission.manifest),
            f"{submission.created_at:%Y-%m-%d %H:%M}",
            f"{submission.rows:,}",
            f"{counts.get('succeeded', 0):,}",
            f"{counts.get('failed', 0):,}",
            f"{counts.get('cancelled', 0):,}",
            f"{submission.left:,}",
        )
    return table


def jobs_table(jobs: Iterable[RowMapping]) -> Table:
    table = _table("job", "submission", "line", "key", "state", "attempts", "code", "image")
    for job in jobs:
        table.add_row(
            str(job["job"]),
            str(job["submission"]),
            str(job["line"]),
            escape(job["key"] or ""),
            _coloured_state(job["state"]),
            str(job["attempt"]),
            job["error_code"] or job["review"] or "",
            escape(job["image"]),
        )
    return table


def history_tables(history: JobHistory) -> Iterable[Table]:
    """Yield a table of the job's columns, one of its parameters, and one per attempt."""
    job = dict(history.job)
    params = json.loads(job.pop("params"))
    del job["content_key"]
    yield _details(f"job {job.pop('job')}", job)
    yield _details("parameters", params | {"seed": job["seed"]})
    for attempt in history.attempts:
        yield _attempt_table(attempt, history.job)


def _attempt_table(attempt: RowMapping, job: RowMapping) -> Table:
    details = dict(attempt)
    del details["job"]
    # "retry --set" changes the job's parameters; the attempt's are shown where they differ.
    is_same = details.pop("params") == job["params"] and details["seed"] == job["seed"]
    details["parameters"] = "as above" if is_same else attempt["params"]
    timings = json.loads(details.pop("timings") or "{}")
    details["timings"] = "  ".join(
        f"{stage} {format_milliseconds(seconds)}" for stage, seconds in timings.items()
    )
    return _details(f"attempt {details.pop('attempt')}", details)


def _details(title: str, values: Mapping[str, object]) -> Table:
    """A table of names and values; values that are None are left out."""
    table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if name in ("state", "outcome") and value is not None:
            table.add_row(name, _coloured_state(str(value)))
        elif value is not None:
            table.add_row(name, _value_text(value))
    return table


def _value_text(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(sep=" ", timespec="milliseconds")
    return escape(str(value))


def _coloured_state(state: str) -> str:
    style = _STATE_STYLES.get(state)
    return f"[{style}]{state}[/{style}]" if style else state


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in _RIGHT_ALIGNED else "left",
            overflow="fold",
        )
    return table


def presets_table(presets: Iterable[Preset]) -> Table:
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
