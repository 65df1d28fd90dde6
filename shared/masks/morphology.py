"""Dilation, distances and extents of boolean masks, computed tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared.geometry.box import Box

Grey = NDArray[np.uint8]  # (H, W), 255 = repaint
Mask = NDArray[np.bool_]  # (H, W), True = repaint

TILE_PX = 512


def bounding_box(mask: Mask) -> Box | None:
    """The smallest box that holds all True pixels; None if there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def tiles(box: Box) -> Iterator[Box]:
    """Split a box into tiles of at most TILE_PX a side, row by row."""
    for top in range(box.top, box.bottom, TILE_PX):
        for left in range(box.left, box.right, TILE_PX):
            right, bottom = min(left + TILE_PX, box.right), min(top + TILE_PX, box.bottom)
            yield Box(left, top, right, bottom)


def slices(box: Box) -> tuple[slice, slice]:
    """The box as an index into an (H, W, ...) array."""
    return slice(box.top, box.bottom), slice(box.left, box.right)


def dilate(mask: Mask, px: int) -> Mask:
    """Dilate by a disc of radius ``px``, exactly (Euclidean distance)."""
    if px == 0:
        return mask
    dilated = mask.copy()
    for tile in tiles(Box(0, 0, mask.shape[1], mask.shape[0])):
        index = slices(tile)
        if not mask[index].all():
            dilated[index] = _dilate_tile(mask, tile, px)
    return dilated


def _dilate_tile(mask: Mask, tile: Box, px: int) -> Mask:
    """(h, w) the pixels of the tile that lie within px of the mask.

    The disc is a stack of rows: the row at height ``rise`` over the centre has the half-width
    floor(sqrt(px^2 - rise^2)). From the top to the centre the rows only widen, so one array,
    widened step by step, serves them all.
    """
    height, width = tile.height, tile.width
    near = _with_border(mask, tile, px)
    dilated = np.zeros((height, width), np.bool_)
    if not near.any():
        return dilated
    widened, half = near[:, px : px + width].copy(), 0
    for rise in range(px, -1, -1):
        while (half + 1) ** 2 + rise**2 <= px**2:
            half += 1
            widened |= near[:, px - half : px - half + width]
            widened |= near[:, px + half : px + half + width]
        dilated |= widened[px - rise : px - rise + height]
        dilated |= widened[px + rise : px + rise + height]
    return dilated


def _with_border(mask: Mask, tile: Box, px: int) -> Mask:
    """The tile and ``px`` pixels on each side, False outside the mask's array."""
    bordered = Box(tile.left - px, tile.top - px, tile.right + px, tile.bottom + px)
    inside = bordered.clipped((mask.shape[1], mask.shape[0]))
    near = np.zeros((bordered.height, bordered.width), np.bool_)
    near[slices(inside.moved(-bordered.left, -bordered.top))] = mask[slices(inside)]
    return near


def squared_distances(mask: Mask, tile: Box, reach: int) -> NDArray[np.int32]:
    """(h, w) squared Euclidean distance in pixels from each pixel of the tile to the mask.

    Exact up to ``reach``; farther pixels get some value above ``reach ** 2``. Separable:
    distances along the columns first, then the lower envelope of parabolas along the rows
    (Saito and Toriwaki, 1994).
    """
    far = 2 * (reach + 1) ** 2
    height, width = mask.shape
    halo = Box(
        max(tile.left - reach, 0),
        max(tile.top - reach, 0),
        min(tile.right + reach, width),
        min(tile.bottom + reach, height),
    )
    near = mask[slices(halo)]
    if not near.any():
        return np.full((tile.height, tile.width), far, np.int32)
    down = _column_distances(near)[tile.top - halo.top :][: tile.height]
    squares = np.full((tile.height, tile.width + 2 * reach), far, np.int32)
    first = halo.left - (tile.left - reach)
    squares[:, first : first + halo.width] = np.minimum(down, reach + 1) ** 2
    best = squares[:, reach : reach + tile.width].copy()
    for step in range(1, reach + 1):
        # A column this far away or farther cannot be nearer than the best so far.
        if best.max() <= step * step:
            break
        left, right = squares[:, reach - step :], squares[:, reach + step :]
        nearer = np.minimum(left[:, : tile.width], right[:, : tile.width])
        np.minimum(best, nearer + np.int32(step * step), out=best)
    return best


def _column_distances(mask: Mask) -> NDArray[np.int32]:
    """(h, w) distance in rows to the nearest True pixel of the same column."""
    height = mask.shape[0]
    rows = np.arange(height, dtype=np.int32)[:, None]
    far = np.int32(1 << 14)  # beyond any reach, and small enough not to overflow
    above = np.maximum.accumulate(np.where(mask, rows, -far), axis=0)
    below = np.minimum.accumulate(np.where(mask, rows, height + far)[::-1], axis=0)[::-1]
    return np.minimum(rows - above, below - rows)
