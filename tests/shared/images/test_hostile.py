"""Damaged files of every kind: an image or an ImageError, nothing else."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from shared import images
from shared.errors import ImageError, ObjectTooLarge
from tests import sample_images
from tests.benchmarks import fidelity

SMALL = sample_images.read_photograph("coffee.png").crop((100, 50, 187, 121))


def damaged(file: bytes, random: np.random.Generator) -> bytes:
    """Cut short, with a few wrong bytes, wrong bits in its head, or a run of bytes gone."""
    copy, kind = bytearray(file), random.integers(4)
    if kind == 0:
        return file[: random.integers(1, len(file))]
    if kind == 3:
        start = random.integers(len(file))
        del copy[start : start + random.integers(1, 60)]
        return bytes(copy)
    for place in random.integers(0, len(file) if kind == 1 else min(len(file), 600), 4):
        copy[place] ^= 1 << random.integers(8)
    return bytes(copy)


@pytest.mark.parametrize("kind", fidelity.KINDS)
def test_a_damaged_file_is_an_image_or_an_image_error(kind: str) -> None:
    file, random = fidelity.KINDS[kind](SMALL), np.random.default_rng(5)
    for _ in range(12):
        with contextlib.suppress(ImageError, ObjectTooLarge):
            images.decode(damaged(file, random), max_pixels=10**7)


@pytest.mark.parametrize("missing", [3, 40, 400])
@pytest.mark.parametrize("kind", ["JPEG 4:2:0 baseline", "JPEG 4:4:4 progressive", "JPEG grey"])
def test_a_jpeg_that_lacks_more_than_its_end_is_refused(kind: str, missing: int) -> None:
    file = fidelity.KINDS[kind](SMALL)
    assert images.decode(file[:-2], max_pixels=10**7).size == SMALL.size
    with pytest.raises(ImageError, match="ends too early"):
        images.decode(file[: -2 - missing], max_pixels=10**7)
