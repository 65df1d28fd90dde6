"""What the product does with a file, and which outcomes are defects."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from shared import images, masks
from shared.errors import FidelityError, ImageError, InputError
from shared.image_formats import FORMATS

MAX_PIXELS = 1_000_000
TARGETS = (None, *FORMATS)


class Defect(Exception):
    """Nothing was raised, but the result is wrong."""


def attempt(data: bytes, random: Random) -> bool:
    """Probes, decodes, repaints and encodes the file; returns whether it was an image.

    Raises Defect, and whatever the product must not raise.
    """
    shown = _probed(data, random)
    _as_mask(data)
    try:
        image = images.decode(data, max_pixels=MAX_PIXELS)
    except InputError:
        return False
    if image.size != shown:
        raise Defect(f"probe says {shown}, decode {image.size}")
    _repaint(image, random)
    return True


def _probed(data: bytes, random: Random) -> tuple[int, int] | None:
    try:
        images.probe(data[: random.randrange(len(data) + 1)], max_pixels=MAX_PIXELS)
    except InputError:
        pass
    try:
        return images.probe(data, max_pixels=MAX_PIXELS)
    except InputError:
        return None


def _as_mask(data: bytes) -> None:
    try:
        masks.decode_mask(data, max_pixels=MAX_PIXELS)
    except InputError:
        pass


def _repaint(image: images.DecodedImage, random: Random) -> None:
    """Writes a box of other pixels in the image's own format, or in another one."""
    width, height = image.size
    left, top = random.randrange(width), random.randrange(height)
    box = (slice(top, top + 1 + random.randrange(20)), slice(left, left + 1 + random.randrange(20)))
    pixels, touched = image.pixels.copy(), np.zeros((height, width), np.bool_)
    pixels[box] = pixels[box] ^ 1
    touched[box] = True
    changed = image.replace(pixels, touched=touched)
    format = random.choice(TARGETS) if random.random() < 0.3 else None
    try:
        written = images.encode(changed, format=format)
    except (ImageError, FidelityError):
        # A damaged JPEG may decode and yet be refused; its job then fails with that error.
        if format is None and image.format != "JPEG":
            raise Defect(f"what came as {image.format} cannot be written again") from None
        return
    again = images.decode(written, max_pixels=MAX_PIXELS)
    if again.size != image.size:
        raise Defect(f"{image.size} comes back as {again.size}")
    if format in (None, image.format) and image.encoding.lossless:
        _compare(image, again, touched)


def _compare(
    before: images.DecodedImage, after: images.DecodedImage, touched: NDArray[np.bool_]
) -> None:
    """Touched pixels may differ a little: a palette has no more than 256 colours.

    A palette of greys may come back as plain grey.
    """
    same_kind = before.pixels.shape == after.pixels.shape
    old, new = (before.pixels, after.pixels) if same_kind else (before.rgb(), after.rgb())
    if before.has_alpha != after.has_alpha or not np.array_equal(old[~touched], new[~touched]):
        raise Defect(f"the {before.format} comes back with other pixels outside the box")
