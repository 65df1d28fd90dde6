"""The whole product on one machine, without a GPU: ``python -m tests.demo --folder demo``.

Writes a watermarked catalog and an archive of damaged scans, repairs both with OpenCV by
``inpaint-submit --local``, and shows the results: a table here, and ``contact-sheet.png``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from tests import sample_images

Pixels = npt.NDArray[np.uint8]

RUNS = (("catalog", ""), ("archive", "photo-restoration"))
SHEET = "contact-sheet.png"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One image: damaged, repaired, and how far from the clean original.

    psnr_before, psnr_after: dB, inside the mask, against the clean original.
    changed_outside: changed pixels outside the mask (in a JPEG: outside the blocks that the
    mask touches). record: the job as ``inpaint-jobs export`` prints it.
    """

    file: str
    before: Image.Image
    mask: Image.Image
    after: Image.Image
    psnr_before: float
    psnr_after: float
    changed_outside: int
    record: Mapping[str, Any]


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--engine", default="opencv", show_default=True)
def demo(folder: Path, engine: str) -> None:
    """Repair a catalog and an archive, and show the results."""
    folder = folder.resolve()
    if (folder.parent / ".env").exists():
        raise click.UsageError(f"{folder.parent}/.env may name a real installation; move it away")
    _clear(folder)
    manifests = [
        sample_images.write_catalog(folder / "catalog"),
        sample_images.write_archive(folder / "archive"),
    ]
    for manifest, (_, preset) in zip(manifests, RUNS, strict=True):
        _submit(manifest, preset=preset, engine=engine, folder=folder)
    records = _records(folder)
    outcomes = [outcome for manifest in manifests for outcome in _outcomes(manifest, records)]
    sample_images.contact_sheet([_row(outcome) for outcome in outcomes], folder / SHEET)
    _report(outcomes, manifests, folder)


def _clear(folder: Path) -> None:
    """Removes what an earlier demo wrote, and nothing else."""
    for name in (*(run for run, _ in RUNS), ".inpaint"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / SHEET).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _submit(manifest: Path, *, preset: str, engine: str, folder: Path) -> None:
    command = ["inpaint-submit", str(manifest.relative_to(folder.parent)), "--local"]
    command += ["--engine", engine]
    if preset:
        command += ["--preset", preset]
    click.echo(f"$ {' '.join(command)}")
    _run(command, folder)


def _run(command: Sequence[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs one of the product's commands in the parent of ``folder``; exits if it fails."""
    program = Path(sysconfig.get_path("scripts")) / command[0]
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder.parent,
        env=_environment(folder),
        text=True,
        check=False,
        **options,
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment without INPAINT_*: the demo must not use a real installation."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("INPAINT_")}
    return {**others, "INPAINT_HOME": str(folder / ".inpaint"), "INPAINT_ROOTS": str(folder)}


def _records(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The exported record of each job, by the image's path relative to ``folder``."""
    export = _run(["inpaint-jobs", "export", "--format", "jsonl"], folder, stdout=subprocess.PIPE)
    jobs = [json.loads(line) for line in export.stdout.splitlines()]
    return {str(_path(job["image"], folder).relative_to(folder)): job for job in jobs}


def _path(location: str, folder: Path) -> Path:
    return (folder / location.removeprefix("file://")).resolve()


def _outcomes(manifest: Path, records: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    with manifest.open(newline="", encoding="utf-8") as file:
        return [_outcome(manifest, row, records) for row in csv.DictReader(file)]


def _outcome(
    manifest: Path, row: Mapping[str, str], records: Mapping[str, Mapping[str, Any]]
) -> Outcome:
    folder, name = manifest.parent, Path(row["image"]).name
    before, mask = _open(folder / row["image"]), _open(folder / row["mask"])
    clean, after = _open(folder / "originals" / name), _open(_results(manifest) / name)
    inside = np.asarray(mask) > 0
    changed = np.asarray(sample_images.changed(before, after)) > 0
    may_change = _may_change(mask, jpeg=name.endswith(".jpg"))
    return Outcome(
        file=f"{folder.name}/{name}",
        before=before,
        mask=mask,
        after=after,
        psnr_before=_psnr(clean, before, inside),
        psnr_after=_psnr(clean, after, inside),
        changed_outside=int(np.sum(changed & ~may_change)),
        record=records.get(f"{folder.name}/{row['image']}", {}),
    )


def _results(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}-out")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def _psnr(clean: Image.Image, other: Image.Image, inside: npt.NDArray[np.bool_]) -> float:
    """10 log10(255**2 / MSE) in dB over the pixels ``inside``; infinite if they are equal."""
    difference = np.asarray(clean, dtype=float)[inside] - np.asarray(other, dtype=float)[inside]
    error = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _may_change(mask: Image.Image, *, jpeg: bool) -> npt.NDArray[np.bool_]:
    """True where a change is allowed: in the mask; in a JPEG in the 16 px blocks it touches."""
    if not jpeg:
        return np.asarray(mask) > 0
    height, width = mask.height, mask.width
    padded = np.pad(np.asarray(mask) > 0, ((0, -height % 16), (0, -width % 16)))
    blocks = padded.reshape(padded.shape[0] // 16, 16, -1, 16).any(axis=(1, 3))
    whole = blocks.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    # Two more pixels: decoders interpolate subsampled colour across a block's edge.
    grown = Image.fromarray(whole.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5))
    return np.asarray(grown) > 0


def _row(outcome: Outcome) -> sample_images.Row:
    note = f"{outcome.psnr_before:.1f} to {outcome.psnr_after:.1f} dB inside the mask"
    return sample_images.Row(
        name=outcome.file,
        note=note,
        before=outcome.before,
        mask=outcome.mask,
        after=outcome.after,
    )


def _report(outcomes: Sequence[Outcome], manifests: Sequence[Path], folder: Path) -> None:
    console = Console()
    console.print(_table(outcomes))
    console.print("PSNR: inside the mask, against the clean original. Changed outside: pixels")
    console.print("outside the mask; in a JPEG, outside the 16-pixel blocks that it touches.")
    for manifest in manifests:
        click.echo(f"results        {_results(manifest)}")
    click.echo(f"contact sheet  {folder / SHEET}")


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("file", box=None, pad_edge=False)
    for name in ("regions", "windows", "seconds", "PSNR dB", "changed outside"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.file,
            str(outcome.record.get("regions", "-")),
            str(outcome.record.get("windows", "-")),
            _seconds(outcome.record),
            f"{outcome.psnr_before:.1f} -> {outcome.psnr_after:.1f}",
            str(outcome.changed_outside),
        )
    return table


def _seconds(record: Mapping[str, Any]) -> str:
    """The sum of the stages' seconds."""
    timings = record.get("timings") or {}
    stages = json.loads(timings) if isinstance(timings, str) else timings
    return f"{sum(stages.values()):.2f}" if stages else "-"


if __name__ == "__main__":
    demo()
