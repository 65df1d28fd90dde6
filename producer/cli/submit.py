"""The command inpaint-submit."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from producer.cli import console
from producer.cli.command import (
    HELP_OPTIONS,
    explain_broker_error,
    parse_set_options,
    reporting_errors,
    version_option,
)
from producer.local_run import LocalWorkers, require_engines, running_redis, running_workers
from producer.manifest import stem
from producer.problem_report import ProblemReport
from producer.reports import Progress, count_errors, measure_progress
from producer.resolve import RowDefaults
from producer.submit import RerunOptions, SubmitResult, submit_manifest
from producer.validate import (
    MAX_FOLDERS,
    ValidatedManifest,
    check_output_owners,
    validate_manifest,
)
from shared import embedded_redis, masks
from shared.command_errors import exit_with_error
from shared.db import Database, schema
from shared.engines import engine_name
from shared.image_formats import FORMAT_PARAMETERS, join_with_or
from shared.jobs.queue import Queue
from shared.params import PRIORITY, find_parameter, is_file
from shared.presets import find_presets, placeholders
from shared.settings import Settings
from shared.settings import load as load_settings
from shared.storage import Storage
from shared.storage.locations import absolute, is_s3, parent

INTERRUPTED = "interrupted; run the same command again to continue"
POLL_SECONDS = 0.1
NO_WORKER_SECONDS = 10.0
PROGRESS_BAR_ROWS = 5000


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """The command line as click read it: text is not checked yet."""

    manifest: str
    output: str | None
    mask: str | None
    engine: str | None
    preset: str | None
    prompt: str | None
    style: str | None
    format: str | None
    quality: str | None
    gate: str | None
    sets: tuple[str, ...]
    priority: str
    dry_run: bool
    skip_invalid: bool
    roots: tuple[str, ...]
    wait: bool
    local: bool
    devices: str
    force: bool
    changed: bool
    as_json: bool

    @property
    def waits(self) -> bool:
        return self.wait or self.local


@click.command(context_settings=HELP_OPTIONS)
@version_option()
@click.argument("manifest")
@click.option("--output", metavar="URI", help="Folder or s3://bucket/prefix for the results.")
@click.option("--mask", help="One mask for all rows: a file, alpha, or box:left,top,right,bottom.")
@click.option("--engine", help="sd2, opencv or diffusers:FOLDER_OR_HUB_ID[@REVISION].")
@click.option("--preset", help="See inpaint-jobs presets; combine as ecommerce+preview.")
@click.option("--prompt", help="Prompt template; {placeholders} are filled from columns.")
@click.option("--style", help="Added to every prompt: artist, medium, palette.")
@click.option("--format", help=f"{join_with_or(FORMAT_PARAMETERS)}; else each image's own.")
@click.option("--quality", help="1 to 100, for JPEG and WebP; else as the image was stored.")
@click.option("--gate", help="What happens to a result that fails its checks: fail, review or off.")
@click.option("--set", "sets", multiple=True, metavar="NAME=VALUE", help="A parameter. Repeatable.")
@click.option("--priority", default="0", help="-1000 to 1000; higher runs first.")
@click.option(
    "--dry-run", is_flag=True, help="Read all masks and image headers; show what would run."
)
@click.option(
    "--skip-invalid", is_flag=True, help="Submit the valid rows of a manifest with invalid ones."
)
@click.option("--root", "roots", multiple=True, type=click.Path(exists=True, file_okay=False),
              help="Folder that local files may lie under. Repeatable.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait until every job is final; exit 1 if one failed.")
@click.option("--local", is_flag=True, help="Start Redis and workers here if needed, and wait.")
@click.option(
    "--devices", default="all", show_default=True, help="For --local: all, cpu or 0,1,..."
)
@click.option("--force", is_flag=True, help="Run every row again; take outputs from other jobs.")
@click.option("--changed", is_flag=True, help="Run rows again whose image, mask or result changed.")
@click.option("--json", "as_json", is_flag=True, help="One summary object on stdout.")
def submit(**values: Any) -> None:
    """Record every row of MANIFEST as a job and dispatch it to the workers.

    MANIFEST is a path or s3://bucket/key: CSV, TSV or JSONL, optionally gzipped.
    """
    with reporting_errors("inpaint-submit", interrupted=INTERRUPTED), ExitStack() as stack:
        sys.exit(_submit(SubmitOptions(**values), stack))


def _submit(options: SubmitOptions, stack: ExitStack) -> int:
    """Validate, record, dispatch and wait, as the options say; return the exit status."""
    settings = load_settings()
    defaults = _row_defaults(options, settings)
    roots = _roots(options, settings, defaults)
    storage = Storage(roots=roots, buckets=settings.buckets)
    problems = ProblemReport(lambda line: click.echo(line, err=True))
    manifest = validate_manifest(defaults, storage, report=problems)
    stack.callback(manifest.close)
    if options.dry_run:
        return _dry_run(manifest, storage, settings, problems, as_json=options.as_json)
    problems.summarize()
    _exit_if_invalid(manifest, skip_invalid=options.skip_invalid)
    if options.local:
        require_engines(manifest.engines)
        stack.enter_context(running_redis(settings))
    db = Database(settings.database)
    stack.callback(db.close)
    schema.ensure(db)
    if not options.force:
        check_output_owners(manifest, db, report=problems)
        problems.summarize()
        _exit_if_invalid(manifest, skip_invalid=options.skip_invalid)
    started = time.monotonic()
    result = _record(manifest, defaults, options, settings, db, storage)
    _print_result(settings, result, manifest, options)
    if not options.waits:
        return 0
    workers = _start_workers(stack, settings, manifest, roots, options) if options.local else None
    progress = _wait(db, result, workers, manifest)
    _print_summary(
        db, result, progress, manifest, time.monotonic() - started, as_json=options.as_json
    )
    return 1 if progress.counts["failed"] else 0


# --- options ---------------------------------------------------------------------------------


def _row_defaults(options: SubmitOptions, settings: Settings) -> RowDefaults:
    """Check the options that apply to every row. Raises InputError."""
    here = str(Path.cwd())
    manifest = absolute(options.manifest, base=here)
    output = _absolute_folder(options.output, base=here) if options.output else None
    # Checked here too, so that a mistake in an option is reported once and not for each row.
    if options.preset:
        find_presets(options.preset)
    if options.prompt:
        placeholders(options.prompt)
    return RowDefaults(
        manifest=manifest,
        output=output or f"{parent(manifest).rstrip('/')}/{stem(manifest)}-out",
        has_output=bool(output),
        engine=engine_name(options.engine or settings.engine),
        mask=_check_mask(options.mask, base=here),
        preset=options.preset,
        prompt=options.prompt,
        style=str(find_parameter("prompt").read(options.style or "")),
        values=_parameter_values(options),
        priority=PRIORITY.read(options.priority),
    )


def _check_mask(mask: str | None, *, base: str) -> str | None:
    if mask and is_file(mask):
        return absolute(mask, base=base)
    if mask and mask != "alpha":
        masks.parse_boxes(mask)
    return mask


def _parameter_values(options: SubmitOptions) -> dict[str, object]:
    """``--set``, and the parameters that have an option of their own, which win."""
    named = {"gate": options.gate, "format": options.format, "quality": options.quality}
    return parse_set_options(options.sets) | {
        name: find_parameter(name).read(text) for name, text in named.items() if text is not None
    }


def _absolute_folder(reference: str, *, base: str) -> str:
    # An object's key may not be empty, a prefix may: "s3://bucket" is checked as a file in it.
    return parent(absolute(f"{reference.rstrip('/')}/file", base=base))


def _roots(options: SubmitOptions, settings: Settings, defaults: RowDefaults) -> list[Path]:
    """Folders that rows may name: the manifest's, the output's, --root and INPAINT_ROOTS."""
    locations = [parent(defaults.manifest), defaults.output, *options.roots]
    if defaults.mask and defaults.mask.startswith("/"):
        locations.append(defaults.mask)
    local = [Path(os.path.realpath(location)) for location in locations if not is_s3(location)]
    # Its default, the current folder, would allow more than the user named here.
    return local + (list(settings.roots) if "roots" in settings.model_fields_set else [])


# --- the steps -------------------------------------------------------------------------------


def _exit_if_invalid(manifest: ValidatedManifest, *, skip_invalid: bool) -> None:
    if not manifest.invalid or (skip_invalid and manifest.invalid < manifest.rows):
        return
    or_skip = "" if skip_invalid else ", or submit the others with --skip-invalid"
    exit_with_error(
        "inpaint-submit",
        f"{manifest.invalid:,} of {manifest.rows:,} rows are not valid; nothing was recorded. "
        f"Fix them{or_skip}.",
    )


def _dry_run(
    manifest: ValidatedManifest,
    storage: Storage,
    settings: Settings,
    problems: ProblemReport,
    *,
    as_json: bool,
) -> int:
    from producer import dry_run  # only this option reads images

    report = dry_run.simulate(manifest, storage, settings, report=problems)
    problems.summarize()
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo(
            f"dry run: {report.rows:,} rows, {report.invalid:,} invalid; would run "
            f"{report.regions:,} regions in {report.windows:,} windows; {report.empty:,} rows have "
            f"an empty mask; {report.overwritten:,} results would be overwritten"
        )
    return 2 if report.invalid else 0


def _record(
    manifest: ValidatedManifest,
    defaults: RowDefaults,
    options: SubmitOptions,
    settings: Settings,
    db: Database,
    storage: Storage,
) -> SubmitResult:
    queue = Queue(embedded_redis.broker_url(settings))
    rows = manifest.rows - manifest.invalid
    with console.progress_bar(console.stderr_console()) as bar:
        task = bar.add_task("recording", total=rows, note="rows", visible=rows > PROGRESS_BAR_ROWS)
        try:
            return submit_manifest(
                manifest,
                defaults,
                db=db,
                queue=queue,
                storage=storage,
                bound=settings.queue_bound,
                rerun=RerunOptions(all_rows=options.force, changed_rows=options.changed),
                progress=lambda count: bar.advance(task, count),
            )
        finally:
            queue.close()


def _start_workers(
    stack: ExitStack,
    settings: Settings,
    manifest: ValidatedManifest,
    roots: list[Path],
    options: SubmitOptions,
) -> LocalWorkers:
    running = running_workers(
        settings, engines=manifest.engines, devices=options.devices, roots=roots
    )
    return stack.enter_context(running)


# --- waiting ---------------------------------------------------------------------------------


def _wait(
    db: Database, result: SubmitResult, workers: LocalWorkers | None, manifest: ValidatedManifest
) -> Progress:
    """Show progress until no job is left. Raises EngineUnavailable if a local worker exits.

    What blocks jobs is printed once per error, and once that no worker has taken a job yet.
    """
    terminal = console.stderr_console()
    started = time.monotonic()
    warned = False
    explained: set[tuple[str, bool]] = set()
    with console.progress_bar(terminal) as bar:
        task = bar.add_task("inpainting", total=None, note="")
        while True:
            query_started = time.monotonic()
            progress = measure_progress(db, result.submission, extra_jobs=result.earlier_jobs)
            # Counting a million rows takes seconds; at most a tenth of the time goes to it.
            pause = max(POLL_SECONDS, 10 * (time.monotonic() - query_started))
            done = progress.total - progress.left
            note = console.progress_note(progress)
            bar.update(task, total=progress.total, completed=done, note=note)
            _explain_blocked(terminal, progress, explained)
            if not progress.left:
                return progress
            if workers is not None:
                workers.check()
            is_idle = progress.left == progress.total and not progress.counts["running"]
            if is_idle and not warned and time.monotonic() - started > NO_WORKER_SECONDS:
                terminal.print(console.escape(_explain_no_worker(manifest, workers)))
                warned = True
            time.sleep(pause)


def _explain_blocked(
    terminal: Console, progress: Progress, explained: set[tuple[str, bool]]
) -> None:
    """Print each kind of blocked jobs that is not in ``explained`` yet, and add it there."""
    for blocked in progress.blocked:
        kind = (blocked.code, blocked.is_write_blocked)
        if kind not in explained:
            terminal.print(f"{blocked.summary}: {console.escape(blocked.message)}")
        explained.add(kind)


def _explain_no_worker(manifest: ValidatedManifest, workers: LocalWorkers | None) -> str:
    if workers is not None:
        return f"the worker is starting; loading a model can take minutes: see {workers.log}"
    engine = sorted(manifest.engines)[0]
    return f"no worker has taken a job yet; start: inpaint-worker --engine {engine}"


# --- printing --------------------------------------------------------------------------------


def _print_result(
    settings: Settings, result: SubmitResult, manifest: ValidatedManifest, options: SubmitOptions
) -> None:
    if options.as_json:
        if not options.waits:
            click.echo(json.dumps(result.to_json()))
        return
    click.echo(_describe(result))
    if result.broker_error:
        click.echo(explain_broker_error(settings, result.broker_error), err=True)
    if not options.waits:
        workers = (f"inpaint-worker --engine {engine}" for engine in sorted(manifest.engines))
        click.echo(f"results: {_describe_folders(manifest)}\nwork: {' and '.join(workers)}")
        click.echo(f"watch: inpaint-jobs status {result.submission} --watch")


def _describe(result: SubmitResult) -> str:
    line = f"submission {result.submission}: {result.rows:,} rows, {result.accepted:,} accepted"
    if result.duplicates:
        line += f", {result.duplicates:,} already recorded"
    if result.invalid:
        line += f", {result.invalid:,} invalid and skipped"
    is_repeated = result.resumed and not result.accepted
    if result.was_interrupted:
        line += "; it had been interrupted and is complete now"
    elif is_repeated:
        line += "; nothing added"
    left = result.left + len(result.earlier_jobs)
    if left > result.accepted:
        line += f"; {left:,} still to run"
    elif is_repeated and not result.is_rerun:
        line += " (--force or --changed run rows again)"
    return line


def _print_summary(
    db: Database,
    result: SubmitResult,
    progress: Progress,
    manifest: ValidatedManifest,
    seconds: float,
    *,
    as_json: bool,
) -> None:
    succeeded, failed = progress.counts["succeeded"], progress.counts["failed"]
    cancelled = progress.counts["cancelled"]
    if as_json:
        counts = {"succeeded": succeeded, "failed": failed, "review": progress.review}
        click.echo(json.dumps({**result.to_json(), **counts, "seconds": round(seconds, 3)}))
        return
    and_cancelled = f", {cancelled:,} cancelled" if cancelled else ""
    duration = console.format_duration(seconds)
    click.echo(f"{succeeded:,} succeeded, {failed:,} failed{and_cancelled} in {duration}")
    for error in count_errors(db, result.submission, extra_jobs=result.earlier_jobs):
        console.stdout_console().print(
            f"  {error.count:,} x [red]{error.code}[/red]: {console.escape(error.message)}"
        )
    if progress.review:
        command = f"inpaint-jobs list --review --submission {result.submission}"
        click.echo(f"{progress.review:,} of them to review: {command}")
    if failed:
        click.echo(f"after fixing the causes: inpaint-jobs retry --submission {result.submission}")
    click.echo(f"results: {_describe_folders(manifest)}")


def _describe_folders(manifest: ValidatedManifest) -> str:
    folders = list(manifest.folders)
    shown = ", ".join(folders[: MAX_FOLDERS - 1])
    return shown + (" and elsewhere" if len(folders) == MAX_FOLDERS else "")
