"""The sample images have the damage and the masks that other tests rely on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import sample_images


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


WRITERS = [sample_images.write_catalog, sample_images.write_archive]
writers = pytest.mark.parametrize("write", WRITERS, ids=["catalog", "archive"])


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@writers
def test_the_same_files_are_written_every_time(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    write(tmp_path / "first")
    write(tmp_path / "second")
    assert _files(tmp_path / "first") == _files(tmp_path / "second")


@writers
def test_all_damage_lies_inside_the_mask(write: Callable[[Path], Path], tmp_path: Path) -> None:
    manifest = write(tmp_path)
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        image, mask = _open(tmp_path / row["image"]), _open(tmp_path / row["mask"])
        original = _open(tmp_path / "originals" / Path(row["image"]).name)
        share = np.mean(np.asarray(mask) == 255)
        assert 0.01 < share < 0.25, row
        if not row["image"].endswith(".jpg"):
            differs = np.asarray(sample_images.changed(original, image)) == 255
            assert differs.any()
            assert not (differs & (np.asarray(mask) == 0)).any(), row


def test_a_contact_sheet_has_a_row_for_each_image(tmp_path: Path) -> None:
    image, mask = Image.new("L", (300, 200), 90), Image.new("L", (300, 200))
    mask.paste(255, (10, 10, 40, 40))
    row = sample_images.Row(name="a.png", note="", before=image, mask=mask, after=image)
    sample_images.contact_sheet([row], tmp_path / "short.png")
    sample_images.contact_sheet([row, row], tmp_path / "long.png")
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "long.png") as long:
        assert short.width == long.width <= 1600
        assert long.height > short.height
        assert _magenta(long) == 2 * _magenta(short) > 0


def _magenta(sheet: Image.Image) -> int:
    red, green, _ = np.asarray(sheet.convert("RGB"), dtype=int).transpose(2, 0, 1)
    return int(np.sum(red - green > 150))
