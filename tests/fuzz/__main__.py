"""Tries hostile files for some minutes; prints their number and the findings."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import click

from tests.fuzz.runner import fuzz


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--seed", type=int, help="Printed, so that a run can be repeated.")
@click.option("--keep", default=".fuzz", show_default=True, help="Folder for files with findings.")
def main(minutes: float, seed: int | None, keep: str) -> None:
    chosen = secrets.randbits(31) if seed is None else seed
    print(f"seed {chosen}", flush=True)
    started = time.monotonic()
    report = fuzz(
        seed=chosen, folder=Path(keep), minutes=minutes, log=lambda line: print(line, flush=True)
    )
    seconds = time.monotonic() - started
    print(
        f"{report.tried:,} files in {seconds:.0f} s, {report.images:,} of them images; "
        f"{len(report.findings)} findings"
    )
    sys.exit(1 if report.findings else 0)


if __name__ == "__main__":
    main()
