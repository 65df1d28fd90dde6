"""A user's working folder: images, masks, manifests, and the commands to run there."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from PIL import Image

from producer.cli.jobs import jobs_command
from producer.cli.submit import submit
from shared import settings
from shared.db import Database, schema
from tests.job_table import JobTable

SIZE = (64, 48)


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Workspace:
    """``folder`` is the current folder, and where relative names lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- files ---

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def image(self, name: str, *, size: tuple[int, int] = SIZE, colour: int = 90) -> Path:
        return self.write(name, png(Image.new("RGB", size, (colour, 120, 150))))

    def mask(
        self,
        name: str,
        *boxes: tuple[int, int, int, int],
        size: tuple[int, int] = SIZE,
    ) -> Path:
        grey = Image.new("L", size)
        for box in boxes:
            grey.paste(255, box)
        return self.write(name, png(grey))

    def manifest(
        self,
        rows: Iterable[Sequence[object]],
        *,
        columns: Sequence[str] = ("image", "mask"),
        name: str = "m.csv",
    ) -> Path:
        lines = [",".join(map(str, row)) for row in (columns, *rows)]
        return self.write(name, "\n".join(lines) + "\n")

    def catalog(self, count: int = 3, *, name: str = "m.csv") -> Path:
        """Write a manifest of ``count`` rows, and their images and masks."""
        for n in range(1, count + 1):
            self.image(f"in/{n}.png", colour=n)
            self.mask(f"masks/{n}.png", (10, 10, 20, 20))
        return self.manifest(
            [(f"in/{n}.png", f"masks/{n}.png") for n in range(1, count + 1)], name=name
        )

    # --- commands ---

    def submit(self, *args: object) -> CommandResult:
        return _run(submit, args)

    def jobs(self, *args: object) -> CommandResult:
        return _run(jobs_command, args)

    def table(self) -> JobTable:
        """Open the tables that the commands use; the caller closes ``table.db``."""
        db = Database(settings.load().database)
        schema.ensure(db)
        return JobTable(db)


def _run(command: click.Command, args: Sequence[object]) -> CommandResult:
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback for {args}") from result.exception
    return CommandResult(status=result.exit_code, out=result.stdout, err=result.stderr)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
