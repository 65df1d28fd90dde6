"""One line on stderr for an error that a user can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from shared.errors import EngineUnavailable, InpaintError


def print_error(program: str, message: object) -> None:
    """``program: message`` on stderr."""
    click.echo(f"{program}: {message}", err=True)


@contextmanager
def exit_on_error(
    program: str, *, status: int = 2, engine_unavailable: int | None = None
) -> Iterator[None]:
    """Print an InpaintError as one line and exit with ``status``.

    engine_unavailable: the exit status if the engine cannot be loaded; None for ``status``.
    """
    try:
        yield
    except EngineUnavailable as error:
        print_error(program, error)
        sys.exit(status if engine_unavailable is None else engine_unavailable)
    except InpaintError as error:
        print_error(program, error)
        sys.exit(status)
