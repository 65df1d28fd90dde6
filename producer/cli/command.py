"""What inpaint-submit and inpaint-jobs have in common as commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from producer import reports
from shared import settings
from shared.command_errors import exit_with_error
from shared.db import Database, schema
from shared.errors import InpaintError, InputError, ParameterError
from shared.params import find_parameter
from shared.settings import Settings
from shared.storage.locations import absolute

# What the tables' keys can hold.
ID = click.IntRange(1, 2**63 - 1)


EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: what was started is stopped in order, as after Ctrl-C."""


@contextmanager
def reporting_errors(command: str, *, interrupted: str = "interrupted") -> Iterator[None]:
    """A user's mistake, or a service that is down, is one line on stderr and exit 2.

    Ctrl-C is the line ``interrupted`` and exit 130, SIGTERM the same and exit 143.
    """
    try:
        with _raising_terminated():
            yield
    except KeyboardInterrupt as error:
        status = EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
        exit_with_error(command, interrupted, status=status)
    except InpaintError as error:
        exit_with_error(command, error)


@contextmanager
def _raising_terminated() -> Iterator[None]:
    """On SIGTERM, once: a second one must not stop the stopping. Only the main thread may ask."""
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
def opened() -> Iterator[tuple[Settings, Database]]:
    """The settings and the tables, for a command of inpaint-jobs."""
    with reporting_errors("inpaint-jobs"):
        configured = settings.load()
        db = Database(configured.database)
        try:
            schema.ensure(db)
            yield configured, db
        finally:
            db.close()


def require_submission(db: Database, submission: int | None) -> None:
    """Raises InputError where it was named and does not exist."""
    if submission is not None and not reports.submission_exists(db, submission):
        raise InputError(f"submission {submission} does not exist; see inpaint-jobs status")


def parse_sets(pairs: tuple[str, ...]) -> dict[str, object]:
    """``NAME=VALUE`` options as checked values. Raises ParameterError."""
    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ParameterError(f"--set {pair!r}: write NAME=VALUE")
        values[name.strip()] = find_parameter(name.strip()).read(value)
    if values.get("text_font"):
        values["text_font"] = absolute(str(values["text_font"]), base=str(Path.cwd()))
    return values


def broker_note(configured: Settings, error: str) -> str:
    """What it means for the jobs that no broker answers."""
    if configured.broker_url is None:
        return "the jobs wait for a worker: inpaint-worker starts a Redis and enqueues them"
    return f"{error}; workers enqueue the jobs when it is back"
