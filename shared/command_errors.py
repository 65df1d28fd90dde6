"""How a command ends on an error: one line on stderr, then an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from shared.errors import EngineUnavailable, InpaintError

EXIT_FAILED = 1
EXIT_USAGE = 2


def print_error(command: str, message: object) -> None:
    """Print ``COMMAND: MESSAGE`` to stderr."""
    click.echo(f"{command}: {message}", err=True)


def exit_with_error(command: str, message: object, *, status: int = EXIT_USAGE) -> NoReturn:
    """Print ``COMMAND: MESSAGE`` to stderr and exit."""
    print_error(command, message)
    sys.exit(status)


@contextmanager
def exit_on_error(
    command: str, *, status: int = EXIT_USAGE, engine_unavailable: int | None = None
) -> Iterator[None]:
    """Print an InpaintError as one line on stderr and exit with ``status``.

    engine_unavailable: the exit status if the engine cannot be loaded; None for ``status``.
    """
    try:
        yield
    except EngineUnavailable as error:
        unavailable = status if engine_unavailable is None else engine_unavailable
        exit_with_error(command, error, status=unavailable)
    except InpaintError as error:
        exit_with_error(command, error, status=status)


def last_error(stderr: str, command: str, *, default: str) -> str:
    """Return the message that a child process printed last with ``print_error``.

    Without such a line (a traceback, say) the last line of ``stderr`` is returned; if there is
    none either, ``default``.
    """
    prefix = f"{command}: "
    lines = stderr.splitlines()
    messages = [line for line in lines if line.startswith(prefix)]
    return (messages or lines or [default])[-1].removeprefix(prefix)
