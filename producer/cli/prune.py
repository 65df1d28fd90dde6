"""The command inpaint-jobs prune."""

from __future__ import annotations

import re
import sys

import click

from producer.cli import console
from producer.cli.command import ID, open_database, require_submission
from shared import jobs
from shared.errors import InputError

AGE = re.compile(r"(\d{1,5})([hd])")
HOURS = {"h": 1, "d": 24}


@click.command()
@click.option("--older-than", "age", required=True, metavar="AGE", help="As 90d or 12h.")
@click.option("--submission", type=ID, help="Only this submission.")
@click.option("--dry-run", is_flag=True, help="Show what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(age: str, submission: int | None, dry_run: bool, yes: bool) -> None:
    """Delete submissions whose jobs all finished longer ago than AGE.

    Their jobs and attempts are deleted from the tables; images and results are kept. The same
    manifest submitted again is then a new submission, and all its rows run again. To keep the
    records, export them first. On SQLite the job with the highest number is kept.
    """
    seconds = _parse_age(age)
    with open_database() as (_, db):
        require_submission(db, submission)
        prunable = jobs.find_prunable(db, older_than_seconds=seconds, submission=submission)
        if not prunable:
            click.echo(f"no submission finished longer ago than {age}")
            return
        for old in prunable:
            manifest = console.escape(old.manifest)
            console.stdout_console().print(
                f"submission {old.submission}: {old.jobs:,} jobs, {manifest}"
            )
        if dry_run or not _confirm(yes):
            return
        total = sum(old.jobs for old in prunable)
        with console.progress_bar(console.stderr_console()) as bar:
            task = bar.add_task("pruning", total=total, note="jobs")
            deleted = jobs.prune(
                db,
                prunable,
                older_than_seconds=seconds,
                progress=lambda count: bar.advance(task, count),
            )
        click.echo(f"{deleted:,} jobs pruned")


def _parse_age(age: str) -> float:
    """Return seconds. Raises BadParameter."""
    match = AGE.fullmatch(age)
    if not match or int(match[1]) == 0:
        raise click.BadParameter(f"{age!r} is not an age; write 90d or 12h")
    return float(int(match[1]) * HOURS[match[2]] * 3600)


def _confirm(yes: bool) -> bool:
    # In a pipe or from cron nobody can answer: fail at once and do not wait.
    if not yes and not sys.stdin.isatty():
        raise InputError("prune asks before it deletes; give --yes, or --dry-run to look")
    return yes or click.confirm("Delete them?")
