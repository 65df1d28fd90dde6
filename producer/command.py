"""What inpaint-submit and inpaint-jobs have in common as commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from shared.errors import InpaintError, ParameterError
from shared.locations import absolute
from shared.params import find_parameter
from shared.settings import Settings


@contextmanager
def friendly(command: str) -> Iterator[None]:
    """A user's mistake, or a service that is down, is one line on stderr and exit 2."""
    try:
        yield
    except InpaintError as error:
        click.echo(f"{command}: {error}", err=True)
        sys.exit(2)


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
