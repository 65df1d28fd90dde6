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
@click.option("--submission", type=ID, help="This one only.")
@click.option("--dry-run", is_flag=True, help="Say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(age: str, submission: int | None, dry_run: bool, yes: bool) -> None:
    """Forget submissions whose every job was finished longer ago than AGE.

    Their jobs and attempts are deleted from the tables; pictures stay where they are. The
    same manifest submitted again is then a new submission, and every row of it runs again.
    Export the audit first, if it is to be kept. On SQLite the newest job stays.
    """
    seconds = _age_seconds(age)
    with open_database() as (_, db):
        require_submission(db, submission)
        chosen = jobs.find_prunable(db, older_than_seconds=seconds, submission=submission)
        if not chosen:
            click.echo(f"no submission was finished longer ago than {age}")
            return
        for one in chosen:
            text = console.escape(one.manifest)
            console.out().print(f"submission {one.submission}: {one.jobs:,} jobs, {text}")
        if dry_run or not _agreed(yes):
            return
        total = sum(one.jobs for one in chosen)
        with console.job_progress(console.err()) as bar:
            task = bar.add_task("pruning", total=total, note="jobs")
            deleted = jobs.prune(
                db,
                chosen,
                older_than_seconds=seconds,
                progress=lambda count: bar.advance(task, count),
            )
        click.echo(f"{deleted:,} jobs pruned")


def _age_seconds(age: str) -> float:
    found = AGE.fullmatch(age)
    if not found or int(found[1]) == 0:
        raise click.BadParameter(f"{age!r} is not an age; write 90d or 12h")
    return float(int(found[1]) * HOURS[found[2]] * 3600)


def _agreed(yes: bool) -> bool:
    if not yes and not sys.stdin.isatty():
        raise InputError("prune asks before it deletes; give --yes, or --dry-run to look")
    return yes or click.confirm("Delete them?")
