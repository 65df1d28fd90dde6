"""What inpaint-submit and inpaint-jobs have in common as commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from producer import reports
from shared.command_errors import exit_on_error, exit_with_error
from shared.db import Database, schema
from shared.errors import InputError, ParameterError
from shared.params import find_parameter
from shared.settings import Settings
from shared.settings import load as load_settings
from shared.storage.locations import absolute

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}

# 128 + the signal's number, as a shell reports a process that the signal ended.
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# The range of a signed 64-bit primary key: a larger number would be a database error.
ID = click.IntRange(1, 2**63 - 1)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; cleanup runs as after Ctrl-C."""


def version_option() -> Callable[[Any], Any]:
    """``--version``; the number is that of the installed package, set in pyproject.toml."""
    return click.version_option(package_name="inpaint-batch")


@contextmanager
def reporting_errors(command: str, *, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn an InpaintError into one line on stderr and exit status 2.

    Ctrl-C prints ``interrupted`` and exits with 130, SIGTERM with 143.
    """
    try:
        with exit_on_error(command), _raising_terminated():
            yield
    except KeyboardInterrupt as error:
        status = EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
        exit_with_error(command, interrupted, status=status)


@contextmanager
def _raising_terminated() -> Iterator[None]:
    """Raise Terminated on the first SIGTERM and ignore later ones, so that cleanup completes."""
    # Python runs signal handlers in the main thread only, and refuses to set them elsewhere.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def open_database() -> Iterator[tuple[Settings, Database]]:
    """Load the settings and open the database, for a command of inpaint-jobs."""
    with reporting_errors("inpaint-jobs"):
        settings = load_settings()
        db = Database(settings.database)
        try:
            schema.ensure(db)
            yield settings, db
        finally:
            db.close()


def require_submission(db: Database, submission: int | None) -> None:
    """Raise InputError if the submission does not exist; None stands for all of them."""
    if submission is not None and not reports.submission_exists(db, submission):
        raise InputError(f"submission {submission} does not exist; see inpaint-jobs status")


def parse_set_options(pairs: tuple[str, ...]) -> dict[str, object]:
    """Parse ``--set NAME=VALUE`` options into checked values. Raises ParameterError."""
    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ParameterError(f"--set {pair!r}: write NAME=VALUE")
        values[name.strip()] = find_parameter(name.strip()).read(value)
    if values.get("text_font"):
        values["text_font"] = absolute(str(values["text_font"]), base=str(Path.cwd()))
    return values


def explain_broker_error(settings: Settings, error: str) -> str:
    """Return what an unreachable broker means for jobs that are recorded already."""
    if settings.broker_url is None:
        return (
            "the jobs wait for a worker: start inpaint-worker --engine NAME, "
            "or submit again with --local"
        )
    return f"{error}; workers dispatch the jobs when it is back"
