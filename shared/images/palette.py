"""Palette pictures stay such: old pixels keep their entry, new colours get the free ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.images.image import DecodedImage, Pixels

Indices = NDArray[np.uint8]  # (H, W), into the palette
Colours = NDArray[np.uint8]  # (256, 4), the palette as RGBA

_ALPHA_WEIGHT = 1 << 18  # a wrong transparency is worse than any wrong colour
_FAR = 32  # levels of 255 between a colour and the entry that stands for it
_MOST_WRONG = 0.1  # of the new pixels may be that far
_CHUNK = 4096


def colours_of(image: Image.Image) -> Colours:
    """What each index of a palette image stands for."""
    strip = Image.frombytes("P", (256, 1), bytes(range(256)))
    strip.putpalette(image.getpalette("RGB") or [], "RGB")
    strip.info.update(image.info)
    colours: Colours = np.array(strip.convert("RGBA"))[0]
    return colours


def repainted(
    picture: DecodedImage, indices: Indices, colours: Colours
) -> tuple[Indices, Colours] | None:
    """The source's indices and palette with the touched pixels in the picture's new colours.

    An entry that no untouched pixel uses is free, or, in a palette with transparency, that no
    pixel uses: so every transparency keeps an entry. Where there are more new colours than free
    entries, the free ones go to what stands for most of them. None where a new pixel's
    transparency finds no entry, or too many have only entries of quite other colours.
    """
    touched = picture.touched
    assert touched is not None  # noqa: S101 - encode returns the source then
    new = picture.pixels[touched]
    if new.shape[1] == 3:
        new = np.concatenate([new, np.full_like(new[:, :1], 255)], axis=1)
    used = np.unique(indices if picture.has_alpha else indices[~touched])
    free = np.setdiff1d(np.arange(256, dtype=np.uint8), used)
    wanted, inverse, counts = np.unique(new, axis=0, return_inverse=True, return_counts=True)
    added = wanted
    if len(wanted) > len(free):
        common = wanted[np.argsort(-counts, kind="stable")][: len(free)]
        added = common if picture.has_alpha else _quantised(new, len(free))
    colours = colours.copy()
    colours[free[: len(added)]] = added
    choices = np.concatenate([used, free[: len(added)]]).astype(np.uint8)
    nearest = choices[_nearest(wanted, colours[choices])]
    if not np.array_equal(colours[nearest, 3], wanted[:, 3]):
        return None
    ahead = np.abs(colours[nearest].astype(np.int16) - wanted).max(axis=1)
    wrong = counts[(ahead > _FAR) & (wanted[:, 3] > 0)].sum()
    if picture.has_alpha and wrong > _MOST_WRONG * len(new):
        return None
    indices = indices.copy()
    indices[touched] = nearest[inverse.ravel()]
    return indices, colours


def _quantised(opaque: Pixels, most: int) -> Pixels:
    """(n, 4) at most that many colours for the opaque pixels, by median cut."""
    if most == 0:
        return opaque[:0]
    row = Image.fromarray(np.ascontiguousarray(opaque[None, :, :3]))
    found = np.array(row.quantize(most, method=Image.Quantize.MEDIANCUT).convert("RGBA"))[0]
    return np.unique(found, axis=0)


def _nearest(wanted: Pixels, choices: Colours) -> NDArray[np.intp]:
    """(n,) the choice that is nearest to each wanted colour."""
    weights = np.array([1, 1, 1, _ALPHA_WEIGHT])
    found = []
    for start in range(0, len(wanted), _CHUNK):
        ahead = wanted[start : start + _CHUNK, None].astype(np.int64) - choices.astype(np.int64)
        found.append(((ahead * ahead) * weights).sum(axis=-1).argmin(axis=1))
    return np.concatenate(found)
