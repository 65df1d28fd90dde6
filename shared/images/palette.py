"""Palette images keep their palette: old pixels their entry, new colours get the free entries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.images.image import DecodedImage, Pixels

Indices = NDArray[np.uint8]  # (H, W), into the palette
Colours = NDArray[np.uint8]  # (256, 4), the palette as RGBA

_ALPHA_WEIGHT = 1 << 18  # more than any distance of colours: alpha must match first
_MAX_DISTANCE = 32  # levels of 255 from a colour to the entry that stands for it
_MAX_DISTANT_SHARE = 0.1  # of the new pixels
_CHUNK = 4096


def colours_of(image: Image.Image) -> Colours:
    """The RGBA colour of each index of a palette image."""
    strip = Image.frombytes("P", (256, 1), bytes(range(256)))
    strip.putpalette(image.getpalette("RGB") or [], "RGB")
    strip.info.update(image.info)
    colours: Colours = np.array(strip.convert("RGBA"))[0]
    return colours


def repaint(
    image: DecodedImage, indices: Indices, colours: Colours
) -> tuple[Indices, Colours] | None:
    """The source's indices and palette with the touched pixels in the image's new colours.

    An entry is free if no untouched pixel uses it; in a palette with transparency, if no pixel
    at all uses it, so that every transparency keeps an entry. Where there are more new colours
    than free entries, the free ones get the most frequent or, without transparency, a median
    cut. Returns None if a new pixel's transparency has no entry, or more than
    _MAX_DISTANT_SHARE of the new pixels of a transparent palette are far from their entry.
    """
    touched = image.touched
    assert touched is not None  # noqa: S101 - encode returns the source then
    new = _as_rgba(image.pixels[touched])
    used = np.unique(indices if image.has_alpha else indices[~touched])
    free = np.setdiff1d(np.arange(256, dtype=np.uint8), used)
    unique, inverse, counts = np.unique(new, axis=0, return_inverse=True, return_counts=True)
    added = unique
    if len(unique) > len(free):
        most_frequent = unique[np.argsort(-counts, kind="stable")][: len(free)]
        added = most_frequent if image.has_alpha else _median_cut(new, len(free))
    colours = colours.copy()
    colours[free[: len(added)]] = added
    entries = np.concatenate([used, free[: len(added)]]).astype(np.uint8)
    nearest = entries[_nearest(unique, colours[entries])]
    if not np.array_equal(colours[nearest, 3], unique[:, 3]):
        return None
    if image.has_alpha and _distant_share(unique, counts, colours[nearest]) > _MAX_DISTANT_SHARE:
        return None
    indices = indices.copy()
    indices[touched] = nearest[inverse.ravel()]
    return indices, colours


def _as_rgba(pixels: Pixels) -> Pixels:
    """(n, 4) from (n, 3) or (n, 4)."""
    if pixels.shape[1] == 4:
        return pixels
    return np.concatenate([pixels, np.full_like(pixels[:, :1], 255)], axis=1)


def _distant_share(unique: Pixels, counts: NDArray[np.intp], entries: Colours) -> float:
    """The share of visible pixels whose entry differs too much in any channel."""
    distance = np.abs(entries.astype(np.int16) - unique).max(axis=1)
    is_distant = (distance > _MAX_DISTANCE) & (unique[:, 3] > 0)
    return float(counts[is_distant].sum() / counts.sum())


def _median_cut(opaque: Pixels, count: int) -> Pixels:
    """(n, 4): at most ``count`` colours for the opaque pixels."""
    if count == 0:
        return opaque[:0]
    row = Image.fromarray(np.ascontiguousarray(opaque[None, :, :3]))
    quantised = row.quantize(count, method=Image.Quantize.MEDIANCUT).convert("RGBA")
    return np.unique(np.array(quantised)[0], axis=0)


def _nearest(colours: Pixels, entries: Colours) -> NDArray[np.intp]:
    """(n,) the index of the entry nearest to each colour; equal alpha goes first."""
    weights = np.array([1, 1, 1, _ALPHA_WEIGHT])
    nearest = []
    for start in range(0, len(colours), _CHUNK):
        chunk = colours[start : start + _CHUNK, None].astype(np.int64)
        difference = chunk - entries.astype(np.int64)
        nearest.append(((difference * difference) * weights).sum(axis=-1).argmin(axis=1))
    return np.concatenate(nearest)
