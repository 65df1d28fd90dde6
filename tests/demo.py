"""The whole product on one machine, without a GPU: ``python -m tests.demo --folder demo``.

Writes a watermarked catalog and an archive of damaged scans, has ``inpaint-submit --local``
mend both with OpenCV, and shows what came out: a table here, and ``contact-sheet.png``.
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
    """One mended picture beside its damaged and clean versions.

    ``outside`` counts changed pixels outside the mask (in a JPEG: outside the blocks that
    hold some of it). PSNR is in dB, inside the mask, against the clean original.
    """

    file: str
    before: Image.Image
    mask: Image.Image
    after: Image.Image
    psnr_before: float
    psnr_after: float
    outside: int
    record: Mapping[str, Any]


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
@click.option("--engine", default="opencv", show_default=True)
def demo(folder: Path, engine: str) -> None:
    """Mend a catalog and an archive, and show the results."""
    folder = folder.resolve()
    if (folder.parent / ".env").exists():
        raise click.UsageError(f"{folder.parent}/.env may lead to a real installation; move it")
    _clear(folder)
    manifests = [
        sample_images.write_catalog(folder / "catalog"),
        sample_images.write_archive(folder / "archive"),
    ]
    for manifest, (_, preset) in zip(manifests, RUNS, strict=True):
        _submit(manifest, preset=preset, engine=engine, folder=folder)
    records = _records(folder)
    outcomes = [one for manifest in manifests for one in _outcomes(manifest, records)]
    sample_images.contact_sheet([_row(one) for one in outcomes], folder / SHEET)
    _report(outcomes, manifests, folder)


def _clear(folder: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
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
    """Run one of our commands beside ``folder``; exit as it did when it fails."""
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
    """Ours without the settings of a real installation: the demo must not submit to that."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INPAINT_")}
    return {**kept, "INPAINT_HOME": str(folder / ".inpaint"), "INPAINT_ROOTS": str(folder)}


def _records(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What the product recorded about each job, by the image's path in ``folder``."""
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
    guarded = ~_touched(mask, jpeg=name.endswith(".jpg"))
    return Outcome(
        file=f"{folder.name}/{name}",
        before=before,
        mask=mask,
        after=after,
        psnr_before=_psnr(clean, before, inside),
        psnr_after=_psnr(clean, after, inside),
        outside=int(np.sum(guarded & (np.asarray(sample_images.changed(before, after)) > 0))),
        record=records.get(f"{folder.name}/{row['image']}", {}),
    )


def _results(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}-out")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def _psnr(clean: Image.Image, other: Image.Image, inside: npt.NDArray[np.bool_]) -> float:
    """dB over the pixels that are ``inside``; infinite where nothing differs."""
    difference = np.asarray(clean, dtype=float)[inside] - np.asarray(other, dtype=float)[inside]
    error = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _touched(mask: Image.Image, *, jpeg: bool) -> npt.NDArray[np.bool_]:
    """Where a change is allowed: the mask; in a JPEG the 16 px blocks that hold some of it.

    Two pixels more there, because decoders interpolate colour across a block's edge.
    """
    if not jpeg:
        return np.asarray(mask) > 0
    height, width = mask.height, mask.width
    padded = np.pad(np.asarray(mask) > 0, ((0, -height % 16), (0, -width % 16)))
    blocks = padded.reshape(padded.shape[0] // 16, 16, -1, 16).any(axis=(1, 3))
    whole = blocks.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    grown = Image.fromarray(whole.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5))
    return np.asarray(grown) > 0


def _row(one: Outcome) -> sample_images.Row:
    note = f"{one.psnr_before:.1f} to {one.psnr_after:.1f} dB inside the mask"
    return sample_images.Row(
        name=one.file, note=note, before=one.before, mask=one.mask, after=one.after
    )


def _report(outcomes: Sequence[Outcome], manifests: Sequence[Path], folder: Path) -> None:
    console = Console()
    console.print(_table(outcomes))
    console.print("PSNR inside the mask, against the clean original; in a JPEG, 'outside' leaves")
    console.print("out the 16-pixel blocks that hold some of the mask.")
    for manifest in manifests:
        click.echo(f"results        {_results(manifest)}")
    click.echo(f"contact sheet  {folder / SHEET}")


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("file", box=None, pad_edge=False)
    for name in ("regions", "windows", "seconds", "PSNR dB", "changed outside"):
        table.add_column(name, justify="right")
    for one in outcomes:
        table.add_row(
            one.file,
            str(one.record.get("regions", "-")),
            str(one.record.get("windows", "-")),
            _seconds(one.record),
            f"{one.psnr_before:.1f} -> {one.psnr_after:.1f}",
            str(one.outside),
        )
    return table


def _seconds(record: Mapping[str, Any]) -> str:
    """The stages' seconds added up."""
    timings = record.get("timings") or {}
    stages = json.loads(timings) if isinstance(timings, str) else timings
    return f"{sum(stages.values()):.2f}" if stages else "-"


if __name__ == "__main__":
    demo()
