"""The command inpaint-jobs: look, retry, cancel, export, check."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.text import Text

from producer import doctor, reports
from producer.cli import console
from producer.cli.command import (
    ID,
    explain_broker_error,
    open_database,
    parse_set_options,
    reporting_errors,
    require_submission,
)
from producer.cli.prune import prune
from producer.replay import replay
from shared import embedded_redis, jobs, settings
from shared import presets as named
from shared.db import Database, schema
from shared.db.models import FINAL_STATES, STATES
from shared.errors import BrokerUnavailable, InputError
from shared.jobs import Selection
from shared.jobs.queue import Queue
from shared.settings import Settings

ROUNDING_LEVELS = 3
WATCH_SECONDS = 2.0
# What a spreadsheet would run as a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def jobs_command() -> None:
    """Look at submissions and jobs, retry, cancel and export them."""


jobs_command.add_command(prune)


@jobs_command.command()
@click.argument("submission", type=ID, required=False)
@click.option("--watch", is_flag=True, help="Refresh until nothing is left.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def status(submission: int | None, watch: bool, as_json: bool) -> None:
    """Counts, rate and time left; of one submission, or of all."""
    with open_database() as (_, db):
        require_submission(db, submission)
        if as_json:
            found = reports.measure_progress(db, submission)
            rate = {"rate": round(found.rate, 3), "seconds_left": found.seconds_left}
            click.echo(json.dumps({**found.counts, "review": found.review, **rate}))
            return
        if submission is None and not watch:
            console.out().print(console.submissions_table(reports.list_submissions(db)))
        if watch:
            _watch(db, submission)
        else:
            click.echo(console.progress_line(reports.measure_progress(db, submission)))


def _watch(db: Database, submission: int | None) -> None:
    with Live(console=console.out(), auto_refresh=False) as live:
        while True:
            found = reports.measure_progress(db, submission)
            live.update(Text(console.progress_line(found)), refresh=True)
            if not found.left:
                return
            time.sleep(WATCH_SECONDS)


@jobs_command.command("list")
@click.option("--state", type=click.Choice(STATES))
@click.option("--error", help="An error code.")
@click.option("--submission", type=ID)
@click.option("--review", is_flag=True, help="Results that a gate wants a person to see.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def list_command(
    state: str | None,
    error: str | None,
    submission: int | None,
    review: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Jobs, oldest first."""
    chosen = replace(
        _selection((), submission, error, states=(state,) if state else None),
        review=review or None,
    )
    with open_database() as (_, db):
        require_submission(db, submission)
        rows = reports.list_jobs(db, chosen, limit=limit + 1)
        if as_json:
            for row in rows[:limit]:
                click.echo(_json(_plain(row)))
            return
        console.out().print(console.jobs_table(rows[:limit]))
        if len(rows) > limit:
            click.echo("and more; --limit shows them, inpaint-jobs export has all", err=True)


@jobs_command.command()
@click.argument("job", type=ID)
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def show(job: int, as_json: bool) -> None:
    """One job: every parameter and every attempt."""
    with open_database() as (_, db):
        job_history = reports.job_history(db, job)
        if job_history is None:
            raise InputError(f"job {job} does not exist; see inpaint-jobs list")
        if as_json:
            attempts = [_plain(attempt) for attempt in job_history.attempts]
            click.echo(_json(_plain(job_history.job) | {"attempts": attempts}))
            return
        for table in console.history_tables(job_history):
            console.out().print(table)


@jobs_command.command("replay")
@click.argument("job", type=ID)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--root", "roots", multiple=True, type=click.Path(exists=True, file_okay=False),
              help="Folder that local files may lie under. Repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def replay_command(job: int, device: str, roots: tuple[str, ...], as_json: bool) -> None:
    """Run a finished job again from its record, here; exit 1 unless the result is the same.

    Nothing is published and the record stays as it is.
    """
    with open_database() as (configured, _):
        found = replay(configured, job, device=device, roots=[Path(root) for root in roots])
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(f"job {job}: {_verdict(found)}")
    sys.exit(0 if found["same"] else 1)


def _verdict(found: dict[str, Any]) -> str:
    text = "the same result" if found["same"] else "another result"
    if found["largest_difference"]:
        text += f", by at most {found['largest_difference']} of 255 levels"
        if not found["differs"] and found["largest_difference"] <= ROUNDING_LEVELS:
            text += " (rounding beside other jobs; INPAINT_DETERMINISTIC=true has none)"
    return f"{text} (changed: {', '.join(found['differs'])})" if found["differs"] else text


@jobs_command.command()
@click.argument("job_ids", metavar="[JOB]...", type=ID, nargs=-1)
@click.option("--submission", type=ID, help="Its failed jobs.")
@click.option("--error", help="Failed jobs with this error code.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Change a parameter.")
def retry(
    job_ids: tuple[int, ...], submission: int | None, error: str | None, sets: tuple[str, ...]
) -> None:
    """Run jobs again: those named in any final state, else the failed ones."""
    with open_database() as (configured, db):
        if not job_ids and submission is None and error is None:
            raise InputError("name jobs, --submission or --error")
        require_submission(db, submission)
        _require_jobs(db, job_ids)
        _require_final(db, job_ids)
        states = FINAL_STATES if job_ids else ("failed",)
        chosen = _selection(job_ids, submission, error, states=states)
        reopened = jobs.retry(db, chosen, changes=parse_set_options(sets))
        click.echo(f"{reopened.count:,} job{'s' * (reopened.count != 1)} to run again")
        if reopened.replaced:
            click.echo(
                f"{reopened.replaced:,} left alone: a later submission writes their output "
                "(inpaint-submit --force takes it back)",
                err=True,
            )
        _dispatch(configured, db, reopened.engines)


@jobs_command.command()
@click.argument("job_ids", metavar="[JOB]...", type=ID, nargs=-1)
@click.option("--submission", type=ID)
def cancel(job_ids: tuple[int, ...], submission: int | None) -> None:
    """Cancel jobs that are not final; running ones stop at their next step."""
    with open_database() as (_, db):
        if not job_ids and submission is None:
            raise InputError("name jobs or --submission")
        require_submission(db, submission)
        _require_jobs(db, job_ids)
        done = jobs.cancel(db, _selection(job_ids, submission, None, states=None))
        click.echo(f"{done.cancelled:,} cancelled, {done.requested:,} running ones asked to stop")


@jobs_command.command()
@click.option("--format", "kind", type=click.Choice(("csv", "jsonl")), default="csv")
@click.option("--submission", type=ID)
@click.option("--state", type=click.Choice(STATES))
def export(kind: str, submission: int | None, state: str | None) -> None:
    """The audit: one record per job, on stdout."""
    with open_database() as (_, db):
        require_submission(db, submission)
        chosen = _selection((), submission, None, states=(state,) if state else None)
        records = reports.export_jobs(db, chosen)
        if kind == "jsonl":
            for record in records:
                click.echo(_json(record))
        else:
            _write_csv(records)


def _write_csv(records: Iterable[dict[str, Any]]) -> None:
    # All text is quoted: before Python 3.13 a carriage return alone would not be.
    writer = csv.writer(sys.stdout, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(reports.EXPORTED)
    for record in records:
        writer.writerow([_cell(value) for value in record.values()])


def _cell(value: object) -> object:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return value


@jobs_command.command()
@click.argument("submission", type=ID)
@click.option("--output", type=FILE, help="The page; else sheet-SUBMISSION.html here.")
@click.option("--png", type=FILE, help="A picture of the worst results, too.")
@click.option("--limit", default=200, show_default=True, type=click.IntRange(1, 5000))
@click.option("--root", "roots", multiple=True, type=FOLDER, help="A folder to read from, too.")
def sheet(
    submission: int, output: Path | None, png: Path | None, limit: int, roots: tuple[Path, ...]
) -> None:
    """A contact sheet: results before and after, the worst first, as one HTML page."""
    from producer.contact_sheet import build

    page = output or Path(f"sheet-{submission}.html")
    with open_database() as (configured, db):
        shown = build.write(
            db, configured, submission, output=page, png=png, limit=limit, roots=roots
        )
        click.echo(f"{len(shown.jobs):,} jobs in {page}; {shown.left_out:,} left out (--limit)")
        if png:
            click.echo(f"the worst of them in {png}")


@jobs_command.command()
@click.option("--json", "as_json", is_flag=True, help="Templates and placeholders too.")
def presets(as_json: bool) -> None:
    """The named sets of parameters."""
    known = named.presets()
    if as_json:
        rows = {
            one.name: {**one.values, "use": one.use, "prompt": one.prompt} for one in known.values()
        }
        click.echo(json.dumps(rows, indent=2))
        return
    console.out().print(console.presets_table(known.values()))


@jobs_command.command()
def upgrade() -> None:
    """Create or upgrade the tables."""
    with reporting_errors("inpaint-jobs"):
        db = Database(settings.load().database)
        try:
            schema.upgrade(db)
            click.echo(f"{db} is at revision {schema.current_revision(db)}")
        finally:
            db.close()


@jobs_command.command("doctor")
@click.option("--engine", help="The engine to try; else INPAINT_ENGINE.")
@click.option("--devices", default="all", show_default=True, help="all, cpu or 0,1,...")
def doctor_command(engine: str | None, devices: str) -> None:
    """Database, broker, storage, engine and device: a verdict and a remedy for each."""
    with reporting_errors("inpaint-jobs"):
        configured = settings.load()
        verdicts = list(doctor.run_checks(configured, engine=engine, devices=devices))
        for verdict in verdicts:
            click.echo(str(verdict))
        sys.exit(1 if any(verdict.bad for verdict in verdicts) else 0)


def _dispatch(configured: Settings, db: Database, engines: set[str]) -> None:
    queue = Queue(embedded_redis.broker_url(configured))
    try:
        for engine in sorted(engines):
            jobs.dispatch(db, queue, engine, bound=configured.queue_bound)
    except BrokerUnavailable as error:
        click.echo(explain_broker_error(configured, str(error)), err=True)
    finally:
        queue.close()


def _selection(
    job_ids: tuple[int, ...],
    submission: int | None,
    error: str | None,
    *,
    states: tuple[str, ...] | None,
) -> Selection:
    return Selection(jobs=job_ids or None, submission=submission, states=states, error_code=error)


def _require_jobs(db: Database, job_ids: tuple[int, ...]) -> None:
    known = {row["id"] for row in reports.list_jobs(db, Selection(jobs=job_ids), limit=None)}
    unknown = sorted(set(job_ids) - known)
    if unknown:
        raise InputError(f"job {unknown[0]} does not exist; see inpaint-jobs list")


def _require_final(db: Database, job_ids: tuple[int, ...]) -> None:
    open_states = tuple(state for state in STATES if state not in FINAL_STATES)
    busy = reports.list_jobs(db, Selection(jobs=job_ids, states=open_states), limit=1)
    if busy:
        raise InputError(f"job {busy[0]['id']} is {busy[0]['state']}; only final jobs run again")


def _plain(row: Any) -> dict[str, Any]:
    """A row of the tables as JSON holds it."""
    plain = {name: value for name, value in row.items() if not isinstance(value, bytes)}
    for name in reports.JSON_COLUMNS:
        if plain.get(name):
            plain[name] = json.loads(plain[name])
    return plain


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=lambda value: value.isoformat())
