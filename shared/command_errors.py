"""How a command ends on an error: one line on stderr, then an exit status."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

EXIT_FAILED = 1
EXIT_USAGE = 2


def print_error(command: str, message: object) -> None:
    """Print ``COMMAND: MESSAGE`` to stderr."""
    click.echo(f"{command}: {message}", err=True)


def exit_with_error(command: str, message: object, *, status: int = EXIT_USAGE) -> NoReturn:
    """Print ``COMMAND: MESSAGE`` to stderr and exit."""
    print_error(command, message)
    sys.exit(status)


def last_error(stderr: str, command: str, *, default: str) -> str:
    """Return the message that a child process printed last with ``print_error``.

    Without such a line (a traceback, say) the last line of ``stderr`` is returned; if there is
    none either, ``default``.
    """
    prefix = f"{command}: "
    lines = stderr.splitlines()
    messages = [line for line in lines if line.startswith(prefix)]
    return (messages or lines or [default])[-1].removeprefix(prefix)
