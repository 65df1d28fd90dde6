"""The command inpaint-jobs: show, retry, cancel and export jobs, and check the installation."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.text import Text
from sqlalchemy import RowMapping

from producer import doctor, reports
from producer.cli import console
from producer.cli.command import (
    HELP_OPTIONS,
    ID,
    explain_broker_error,
    open_database,
    parse_set_options,
    reporting_errors,
    require_submission,
    version_option,
)
from producer.cli.prune import prune
from producer.replay import ReplayResult, replay
from producer.reports import UNFINISHED_STATES, ExportRecord
from shared import embedded_redis, jobs
from shared import presets as shared_presets
from shared.db import Database, schema
from shared.db.models import FINAL_STATES, STATES
from shared.errors import BrokerUnavailable, InputError
from shared.jobs import Selection
from shared.jobs.queue import Queue
from shared.settings import Settings
from shared.settings import load as load_settings

# Batches of another size round differently; a real change of the result is larger than this.
ROUNDING_LEVELS = 3
WATCH_SECONDS = 2.0
# A spreadsheet runs a cell as a formula if it begins so, some after removing the whitespace.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
# All but tab and line feed: a terminal or an editor would act on them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(context_settings=HELP_OPTIONS)
@version_option()
def jobs_command() -> None:
    """Show submissions and jobs; retry, cancel and export them."""


jobs_command.add_command(prune)


@jobs_command.command()
@click.argument("submission", type=ID, required=False)
@click.option("--watch", is_flag=True, help="Refresh until no job is left.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def status(submission: int | None, watch: bool, as_json: bool) -> None:
    """Jobs per state, rate and time left; of one submission, or of all."""
    with open_database() as (_, db):
        require_submission(db, submission)
        if as_json:
            click.echo(json.dumps(_progress_json(reports.measure_progress(db, submission))))
            return
        if watch:
            _watch(db, submission)
            return
        if submission is None:
            submissions = reports.list_submissions(db)
            console.stdout_console().print(console.submissions_table(submissions))
        click.echo(console.progress_line(reports.measure_progress(db, submission)))


def _progress_json(progress: reports.Progress) -> dict[str, object]:
    return {
        **progress.counts,
        "review": progress.review,
        "rate": round(progress.rate, 3),
        "seconds_left": progress.seconds_left,
    }


def _watch(db: Database, submission: int | None) -> None:
    with Live(console=console.stdout_console(), auto_refresh=False) as live:
        while True:
            progress = reports.measure_progress(db, submission)
            live.update(Text(console.progress_line(progress)), refresh=True)
            if not progress.left:
                return
            time.sleep(WATCH_SECONDS)


@jobs_command.command("list")
@click.option("--state", type=click.Choice(STATES))
@click.option("--error", help="An error code.")
@click.option("--submission", type=ID)
@click.option("--review", is_flag=True, help="Results that a quality gate marked for review.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="One object per line.")
def list_command(
    state: str | None,
    error: str | None,
    submission: int | None,
    review: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Jobs in the order of their numbers."""
    selection = Selection(
        submission=submission,
        states=(state,) if state else None,
        error_code=error,
        review=review or None,
    )
    with open_database() as (_, db):
        require_submission(db, submission)
        # One more than is shown tells whether there are more.
        rows = reports.list_jobs(db, selection, limit=limit + 1)
        if as_json:
            for row in rows[:limit]:
                click.echo(_to_json(_json_values(row)))
            return
        console.stdout_console().print(console.jobs_table(rows[:limit]))
        if len(rows) > limit:
            click.echo("more jobs: raise --limit, or use inpaint-jobs export", err=True)


@jobs_command.command()
@click.argument("job", type=ID)
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def show(job: int, as_json: bool) -> None:
    """One job: every parameter and every attempt."""
    with open_database() as (_, db):
        history = reports.job_history(db, job)
        if history is None:
            raise InputError(f"job {job} does not exist; see inpaint-jobs list")
        if as_json:
            attempts = [_json_values(attempt) for attempt in history.attempts]
            click.echo(_to_json(_json_values(history.job) | {"attempts": attempts}))
            return
        for table in console.history_tables(history):
            console.stdout_console().print(table)


@jobs_command.command("replay")
@click.argument("job", type=ID)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N.")
@click.option("--root", "roots", multiple=True, type=FOLDER,
              help="Folder that local files may lie under. Repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def replay_command(job: int, device: str, roots: tuple[Path, ...], as_json: bool) -> None:
    """Run a finished job again from its record; exit 1 unless the result is the same.

    It runs on this machine. Nothing is published and the record is not changed.
    """
    with open_database() as (settings, _):
        result = replay(settings, job, device=device, roots=roots)
    if as_json:
        click.echo(json.dumps(vars(result)))
    else:
        click.echo(f"job {job}: {_describe_replay(result)}")
    sys.exit(0 if result.same else 1)


def _describe_replay(result: ReplayResult) -> str:
    text = "the same result" if result.same else "another result"
    if result.largest_difference:
        text += f", by at most {result.largest_difference} of 255 levels"
        if not result.differs and result.largest_difference <= ROUNDING_LEVELS:
            text += " (rounding; INPAINT_DETERMINISTIC=true gives bit-identical results)"
    return f"{text} (changed: {', '.join(result.differs)})" if result.differs else text


@jobs_command.command()
@click.argument("job_ids", metavar="[JOB]...", type=ID, nargs=-1)
@click.option("--submission", type=ID, help="Its failed jobs.")
@click.option("--error", help="Failed jobs with this error code.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="Change a parameter.")
def retry(
    job_ids: tuple[int, ...], submission: int | None, error: str | None, sets: tuple[str, ...]
) -> None:
    """Run jobs again: named jobs in any final state, else only failed ones."""
    with open_database() as (settings, db):
        if not job_ids and submission is None and error is None:
            raise InputError("name jobs, --submission or --error")
        require_submission(db, submission)
        _require_jobs(db, job_ids)
        _require_final(db, job_ids)
        selection = Selection(
            jobs=job_ids or None,
            submission=submission,
            states=FINAL_STATES if job_ids else ("failed",),
            error_code=error,
        )
        result = jobs.retry(db, selection, changes=parse_set_options(sets))
        click.echo(f"{result.count:,} job{'s' * (result.count != 1)} to run again")
        if result.replaced:
            click.echo(
                f"{result.replaced:,} skipped: a later submission writes their output "
                "(inpaint-submit --force takes it back)",
                err=True,
            )
        _dispatch(settings, db, result.engines)


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
        result = jobs.cancel(db, Selection(jobs=job_ids or None, submission=submission))
        click.echo(
            f"{result.cancelled:,} cancelled, {result.requested:,} running ones asked to stop"
        )


@jobs_command.command()
@click.option("--format", "file_format", type=click.Choice(("csv", "jsonl")), default="csv")
@click.option("--submission", type=ID)
@click.option("--state", type=click.Choice(STATES))
def export(file_format: str, submission: int | None, state: str | None) -> None:
    """Print one record per job with its last attempt, for audits."""
    with open_database() as (_, db):
        require_submission(db, submission)
        selection = Selection(submission=submission, states=(state,) if state else None)
        records = reports.export_jobs(db, selection)
        if file_format == "jsonl":
            for record in records:
                click.echo(_to_json(vars(record)))
        else:
            _write_csv(records)


def _write_csv(records: Iterable[ExportRecord]) -> None:
    # All text is quoted: before Python 3.13 csv did not quote a lone carriage return.
    writer = csv.writer(sys.stdout, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(reports.EXPORT_COLUMNS)
    for record in records:
        writer.writerow([_csv_cell(value) for value in vars(record).values()])


def _csv_cell(value: object) -> object:
    if isinstance(value, dict):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    # A leading apostrophe makes a spreadsheet show the cell as text.
    text = "'" + value if value.startswith(FORMULA_STARTS) else value
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@jobs_command.command()
@click.argument("submission", type=ID)
@click.option("--output", type=FILE, help="The page; else sheet-SUBMISSION.html here.")
@click.option("--png", type=FILE, help="Also write an image of the worst results.")
@click.option("--limit", default=200, show_default=True, type=click.IntRange(1, 5000))
@click.option("--root", "roots", multiple=True, type=FOLDER,
              help="Folder that images may be read from. Repeatable.")  # fmt: skip
def sheet(
    submission: int, output: Path | None, png: Path | None, limit: int, roots: tuple[Path, ...]
) -> None:
    """A contact sheet: results before and after, the worst first, as one HTML page."""
    from producer.contact_sheet import build  # other commands start without Jinja2

    page = output or Path(f"sheet-{submission}.html")
    with open_database() as (settings, db):
        ranked = build.write(
            db, settings, submission, output=page, png=png, limit=limit, roots=roots
        )
        click.echo(f"{len(ranked.jobs):,} jobs in {page}; {ranked.left_out:,} left out (--limit)")
        if png:
            click.echo(f"the worst of them in {png}")


@jobs_command.command()
@click.option("--json", "as_json", is_flag=True, help="With prompt templates and placeholders.")
def presets(as_json: bool) -> None:
    """The named sets of parameters."""
    named = shared_presets.presets()
    if as_json:
        objects = {
            preset.name: {**preset.values, "use": preset.use, "prompt": preset.prompt}
            for preset in named.values()
        }
        click.echo(json.dumps(objects, indent=2))
        return
    console.stdout_console().print(console.presets_table(named.values()))


@jobs_command.command()
def upgrade() -> None:
    """Create or upgrade the tables."""
    # Not open_database: it refuses tables of an older revision.
    with reporting_errors("inpaint-jobs"):
        db = Database(load_settings().database)
        try:
            schema.upgrade(db)
            click.echo(f"{db} is at revision {schema.current_revision(db)}")
        finally:
            db.close()


@jobs_command.command("doctor")
@click.option("--engine", help="The engine to check; else INPAINT_ENGINE.")
@click.option("--devices", default="all", show_default=True, help="all, cpu or 0,1,...")
def doctor_command(engine: str | None, devices: str) -> None:
    """Check database, broker, storage, engine and device; name a remedy for each fault."""
    with reporting_errors("inpaint-jobs"):
        checks = list(doctor.run_checks(load_settings(), engine=engine, devices=devices))
        for check in checks:
            click.echo(str(check))
        sys.exit(1 if any(check.is_bad for check in checks) else 0)


def _dispatch(settings: Settings, db: Database, engines: set[str]) -> None:
    queue = Queue(embedded_redis.broker_url(settings))
    try:
        for engine in sorted(engines):
            jobs.dispatch(db, queue, engine, bound=settings.queue_bound)
    except BrokerUnavailable as error:
        click.echo(explain_broker_error(settings, str(error)), err=True)
    finally:
        queue.close()


def _require_jobs(db: Database, job_ids: tuple[int, ...]) -> None:
    existing = {row["job"] for row in reports.list_jobs(db, Selection(jobs=job_ids), limit=None)}
    unknown = sorted(set(job_ids) - existing)
    if unknown:
        raise InputError(f"job {unknown[0]} does not exist; see inpaint-jobs list")


def _require_final(db: Database, job_ids: tuple[int, ...]) -> None:
    unfinished = Selection(jobs=job_ids, states=UNFINISHED_STATES)
    for row in reports.list_jobs(db, unfinished, limit=1):
        raise InputError(f"job {row['job']} is {row['state']}; only final jobs run again")


def _json_values(row: RowMapping) -> dict[str, Any]:
    """Return a table's row with JSON columns decoded and binary columns left out."""
    values = {name: value for name, value in row.items() if not isinstance(value, bytes)}
    for name in reports.JSON_COLUMNS:
        if values.get(name):
            values[name] = json.loads(values[name])
    return values


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=lambda value: value.isoformat())
