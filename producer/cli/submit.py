"""The command inpaint-submit: parse, construct, call, print."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from producer.cli import console
from producer.cli.command import explain_broker_error, parse_set_options, reporting_errors
from producer.local_run import LocalWorkers, require_engines, running_redis, running_workers
from producer.manifest import Problem, stem
from producer.reports import Progress, count_errors, measure_progress
from producer.resolve import RowDefaults
from producer.submit import RerunOptions, SubmitResult
from producer.submit import submit as submit_rows
from producer.validate import (
    MANY_FOLDERS,
    ValidatedManifest,
    check_output_owners,
    validate_manifest,
)
from shared import embedded_redis, masks, settings
from shared.command_errors import exit_with_error
from shared.db import Database, schema
from shared.engines import engine_name
from shared.image_formats import FORMAT_PARAMETERS, join_with_or
from shared.jobs.queue import Queue
from shared.params import PRIORITY, find_parameter, is_file
from shared.presets import find_presets, placeholders
from shared.settings import Settings
from shared.storage import Storage
from shared.storage.locations import absolute, is_s3, parent

INTERRUPTED = "interrupted; the same command goes on where it stopped"
POLL_SECONDS = 0.1
NO_WORKER_SECONDS = 10.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("manifest")
@click.option("--output", metavar="URI", help="Folder or s3://bucket/prefix for the results.")
@click.option("--mask", help="One mask for all rows: a file, alpha, or box:left,top,right,bottom.")
@click.option("--engine", help="sd2, opencv or diffusers:FOLDER_OR_HUB_ID[@REVISION].")
@click.option("--preset", help="See inpaint-jobs presets; combine as ecommerce+preview.")
@click.option("--prompt", help="Prompt template; {placeholders} are filled from columns.")
@click.option("--style", help="Added to every prompt: artist, medium, palette.")
@click.option("--format", help=f"{join_with_or(FORMAT_PARAMETERS)}; else each image's own.")
@click.option("--quality", help="1 to 100, JPEG and WebP; else as the image was stored.")
@click.option("--gate", help="What becomes of a bad result: fail, review or off.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="A parameter. Repeatable.")
@click.option("--priority", default="0", help="-1000 to 1000; higher runs first.")
@click.option(
    "--dry-run", is_flag=True, help="Open masks and heads of images too, say what would run."
)
@click.option(
    "--skip-invalid", is_flag=True, help="Submit the good rows of a manifest with bad ones."
)
@click.option("--root", "roots", multiple=True, type=click.Path(exists=True, file_okay=False),
              help="Folder that local files may lie under. Repeatable.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Until every job is final; exit 1 if one failed.")
@click.option("--local", is_flag=True, help="Start what is missing here, workers too, and wait.")
@click.option(
    "--devices", default="all", show_default=True, help="For --local: all, cpu or 0,1,..."
)
@click.option("--force", is_flag=True, help="Run every row again, whatever is recorded.")
@click.option("--changed", is_flag=True, help="Run rows again whose image or mask has changed.")
@click.option("--json", "as_json", is_flag=True, help="One summary object on stdout.")
def submit(
    manifest: str, wait: bool, local: bool, dry_run: bool, as_json: bool, **given: Any
) -> None:
    """Record every row of MANIFEST as a job and enqueue it.

    MANIFEST is a path or s3://bucket/key: CSV, TSV or JSONL, optionally gzipped.
    """
    with reporting_errors("inpaint-submit", interrupted=INTERRUPTED), ExitStack() as stack:
        configured = settings.load()
        options = _options(configured, manifest, given)
        roots = _roots(configured, options, given)
        storage = Storage(roots=roots, buckets=configured.buckets)
        checked = validate_manifest(options, storage, report=_report)
        stack.callback(checked.spool.close)
        if dry_run:
            sys.exit(_dry_run(checked, storage, configured, as_json))
        _refuse_invalid(checked, skip=given["skip_invalid"])
        if local:
            require_engines(checked.engines)
            stack.enter_context(running_redis(configured))
        db = Database(configured.database)
        stack.callback(db.close)
        schema.ensure(db)
        if not given["force"]:
            check_output_owners(checked, db, report=_report)
            _refuse_invalid(checked, skip=given["skip_invalid"])
        started = time.monotonic()
        summary = _record(
            checked, options=options, configured=configured, db=db, storage=storage, given=given
        )
        _print_summary(configured, summary, checked, as_json=as_json, waits=wait or local)
        if not (wait or local):
            return
        workers = _local_workers(stack, configured, checked, roots, given) if local else None
        ended = _wait(db, summary, workers, checked)
        _print_end(
            db,
            summary=summary,
            ended=ended,
            seconds=time.monotonic() - started,
            checked=checked,
            as_json=as_json,
        )
        sys.exit(1 if ended.counts["failed"] else 0)


def _options(configured: Settings, manifest: str, given: dict[str, Any]) -> RowDefaults:
    uri = absolute(manifest, base=str(Path.cwd()))
    here = str(Path.cwd())
    output = given["output"] and _folder(given["output"], base=here)
    mask = given["mask"]
    if mask and is_file(mask):
        mask = absolute(mask, base=here)
    elif mask and mask != "alpha":
        masks.parse_boxes(mask)
    if given["preset"]:
        find_presets(given["preset"])
    if given["prompt"]:
        placeholders(given["prompt"])
    return RowDefaults(
        manifest=uri,
        output=output or f"{parent(uri).rstrip('/')}/{stem(uri)}-out",
        has_output=bool(output),
        engine=engine_name(given["engine"] or configured.engine),
        mask=mask,
        preset=given["preset"],
        prompt=given["prompt"],
        style=str(find_parameter("prompt").read(given["style"] or "")),
        values=_values(given),
        priority=PRIORITY.read(given["priority"]),
    )


def _values(given: dict[str, Any]) -> dict[str, object]:
    short = {name: given[name] for name in ("gate", "format", "quality") if given[name] is not None}
    read = {name: find_parameter(name).read(value) for name, value in short.items()}
    return parse_set_options(given["sets"]) | read


def _folder(reference: str, *, base: str) -> str:
    """An absolute folder or prefix; unlike an object's, its key may be empty."""
    return parent(absolute(f"{reference.rstrip('/')}/file", base=base))


def _roots(configured: Settings, options: RowDefaults, given: dict[str, Any]) -> list[Path]:
    """What this manifest may name: its folder, the output's, --root, INPAINT_ROOTS."""
    named = [parent(options.manifest), options.output, *given["roots"]]
    if options.mask and options.mask.startswith("/"):
        named.append(options.mask)
    local = [Path(os.path.realpath(place)) for place in named if not is_s3(place)]
    return local + (list(configured.roots) if "roots" in configured.model_fields_set else [])


def _report(problem: Problem) -> None:
    click.echo(str(problem), err=True)


def _refuse_invalid(checked: ValidatedManifest, *, skip: bool) -> None:
    if not checked.invalid or (skip and checked.invalid < checked.rows):
        return
    exit_with_error(
        "inpaint-submit",
        f"{checked.invalid:,} of {checked.rows:,} rows are not valid; nothing was enqueued. "
        f"Fix them{'' if skip else ', or submit the others with --skip-invalid'}.",
    )


def _dry_run(
    checked: ValidatedManifest, storage: Storage, configured: Settings, as_json: bool
) -> int:
    from producer import dry_run  # only this option decodes pictures

    found = dry_run.simulate(checked, storage, configured, report=_report)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        click.echo(
            f"dry run: {found.rows:,} rows, {found.invalid:,} invalid; would run "
            f"{found.regions:,} regions in {found.windows:,} windows; {found.empty:,} rows have "
            f"an empty mask; {found.overwritten:,} results would be overwritten"
        )
    return 2 if found.invalid else 0


def _record(
    checked: ValidatedManifest,
    *,
    options: RowDefaults,
    configured: Settings,
    db: Database,
    storage: Storage,
    given: dict[str, Any],
) -> SubmitResult:
    queue = Queue(embedded_redis.broker_url(configured))
    screen = console.err()
    with console.job_progress(screen) as bar:
        rows = checked.rows - checked.invalid
        task = bar.add_task("recording", total=rows, note="rows", visible=rows > 5000)
        try:
            return submit_rows(
                checked,
                options,
                db=db,
                queue=queue,
                storage=storage,
                bound=configured.queue_bound,
                again=RerunOptions(all_rows=given["force"], changed=given["changed"]),
                progress=lambda count: bar.advance(task, count),
            )
        finally:
            queue.close()


def _print_summary(
    configured: Settings,
    summary: SubmitResult,
    checked: ValidatedManifest,
    *,
    as_json: bool,
    waits: bool,
) -> None:
    if as_json:
        if not waits:
            click.echo(json.dumps(summary.to_json()))
        return
    click.echo(_describe(summary))
    if summary.broker_error:
        click.echo(explain_broker_error(configured, summary.broker_error), err=True)
    if not waits:
        engines = " and ".join(
            f"inpaint-worker --engine {name}" for name in sorted(checked.engines)
        )
        click.echo(f"results: {_places(checked)}\nwork: {engines}")
        click.echo(f"watch: inpaint-jobs status {summary.submission} --watch")


def _describe(summary: SubmitResult) -> str:
    line = f"submission {summary.submission}: {summary.rows:,} rows, {summary.accepted:,} accepted"
    if summary.duplicates:
        line += f", {summary.duplicates:,} already there"
    if summary.invalid:
        line += f", {summary.invalid:,} invalid and skipped"
    if summary.cut_off:
        line += "; it had been cut off and is complete now"
    elif summary.resumed and not summary.accepted:
        line += "; nothing added"
    left = summary.left + len(summary.earlier_jobs)
    if left > summary.accepted:
        line += f"; {left:,} still to run"
    elif summary.resumed and not summary.accepted and not summary.again:
        line += " (--force or --changed run rows again)"
    return line


def _local_workers(
    stack: ExitStack,
    configured: Settings,
    checked: ValidatedManifest,
    roots: list[Path],
    given: dict[str, Any],
) -> LocalWorkers:
    running = running_workers(
        configured, engines=checked.engines, devices=given["devices"], roots=roots
    )
    return stack.enter_context(running)


def _wait(
    db: Database, summary: SubmitResult, workers: LocalWorkers | None, checked: ValidatedManifest
) -> Progress:
    """Until nothing is left; says once where no worker seems to be there, or why jobs wait."""
    screen = console.err()
    started = time.monotonic()
    said = False
    explained: set[tuple[str, bool]] = set()
    with console.job_progress(screen) as bar:
        task = bar.add_task("inpainting", total=None, note="")
        while True:
            asked = time.monotonic()
            found = measure_progress(db, summary.submission, extra_jobs=summary.earlier_jobs)
            # Counting a million rows takes a while; the database has better things to do.
            pause = max(POLL_SECONDS, 10 * (time.monotonic() - asked))
            done = found.total - found.left
            bar.update(task, total=found.total, completed=done, note=console.note(found))
            for trouble in found.blocked:
                if (trouble.code, trouble.is_paused) not in explained:
                    screen.print(f"{trouble.summary}: {console.escape(trouble.message)}")
                explained.add((trouble.code, trouble.is_paused))
            if not found.left:
                return found
            if workers is not None:
                workers.check()
            idle = found.left == found.total and not found.counts["running"]
            if idle and not said and time.monotonic() - started > NO_WORKER_SECONDS:
                screen.print(console.escape(_nobody_yet(checked, workers)))
                said = True
            time.sleep(pause)


def _nobody_yet(checked: ValidatedManifest, workers: LocalWorkers | None) -> str:
    if workers is not None:
        return f"the worker is getting ready; a model takes a while to load: see {workers.log}"
    engine = sorted(checked.engines)[0]
    return f"no worker has taken a job yet; start: inpaint-worker --engine {engine}"


def _print_end(
    db: Database,
    *,
    summary: SubmitResult,
    ended: Progress,
    seconds: float,
    checked: ValidatedManifest,
    as_json: bool,
) -> None:
    succeeded, failed = ended.counts["succeeded"], ended.counts["failed"]
    if as_json:
        end = {"succeeded": succeeded, "failed": failed, "review": ended.review}
        click.echo(json.dumps({**summary.to_json(), **end, "seconds": round(seconds, 3)}))
        return
    cancelled = f", {ended.counts['cancelled']:,} cancelled" if ended.counts["cancelled"] else ""
    click.echo(
        f"{succeeded:,} succeeded, {failed:,} failed{cancelled} in {console.duration(seconds)}"
    )
    for code, count, message in count_errors(
        db, summary.submission, extra_jobs=summary.earlier_jobs
    ):
        console.out().print(f"  [red]{code}[/red] {count:,}: {console.escape(message)}")
    if ended.review:
        listed = f"inpaint-jobs list --review --submission {summary.submission}"
        click.echo(f"{ended.review:,} of them to review: {listed}")
    if failed:
        click.echo(f"again: inpaint-jobs retry --submission {summary.submission}")
    click.echo(f"results: {_places(checked)}")


def _places(checked: ValidatedManifest) -> str:
    folders = list(checked.folders)
    shown = ", ".join(folders[: MANY_FOLDERS - 1])
    return shown + (" and elsewhere" if len(folders) == MANY_FOLDERS else "")
