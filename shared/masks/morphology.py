"""Dilation and distances of boolean masks, computed tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared.geometry.box import Box

Grey = NDArray[np.uint8]  # (H, W), 255 = repaint
Mask = NDArray[np.bool_]  # (H, W), True = repaint

TILE_PX = 512


def dilate(mask: Mask, px: int) -> Mask:
    """The mask grown by a disc of that radius, exactly; only tiles near an edge are worked on."""
    if px == 0:
        return mask
    grown = mask.copy()
    for tile in tiles(Box(0, 0, mask.shape[1], mask.shape[0])):
        where = slices(tile)
        if not mask[where].all():
            grown[where] = _disc_reaches(mask, tile, px)
    return grown


def _disc_reaches(mask: Mask, tile: Box, px: int) -> Mask:
    """(h, w) which pixels of the tile lie within px of the mask.

    A disc is a stack of rows, each as wide as its height over the centre allows. From its top
    to its middle they only widen, so one array, grown step by step, serves them all.
    """
    height, width = tile.height, tile.width
    halo = Box(tile.left - px, tile.top - px, tile.right + px, tile.bottom + px)
    inside = halo.clipped((mask.shape[1], mask.shape[0]))
    near = np.zeros((halo.height, halo.width), np.bool_)
    near[slices(inside.moved(-halo.left, -halo.top))] = mask[slices(inside)]
    reached = np.zeros((height, width), np.bool_)
    if not near.any():
        return reached
    widened, half = near[:, px : px + width].copy(), 0
    for rise in range(px, -1, -1):
        while (half + 1) ** 2 + rise**2 <= px**2:
            half += 1
            widened |= near[:, px - half : px - half + width]
            widened |= near[:, px + half : px + half + width]
        reached |= widened[px - rise : px - rise + height]
        reached |= widened[px + rise : px + rise + height]
    return reached


def tiles(box: Box) -> Iterator[Box]:
    for top in range(box.top, box.bottom, TILE_PX):
        for left in range(box.left, box.right, TILE_PX):
            right, bottom = min(left + TILE_PX, box.right), min(top + TILE_PX, box.bottom)
            yield Box(left, top, right, bottom)


def slices(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.bottom), slice(box.left, box.right)


def squared_distances(mask: Mask, tile: Box, reach: int) -> NDArray[np.int32]:
    """(h, w) squared distance from each pixel of the tile to the mask; huge past the reach.

    Exact and separable: distance along the column first, then the lowest parabola along the
    row (Saito and Toriwaki, 1994), stopping as soon as no farther column can be nearer.
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
        if best.max() <= step * step:
            break
        left, right = squares[:, reach - step :], squares[:, reach + step :]
        nearer = np.minimum(left[:, : tile.width], right[:, : tile.width])
        np.minimum(best, nearer + np.int32(step * step), out=best)
    return best


def _column_distances(mask: Mask) -> NDArray[np.int32]:
    """(h, w) rows to the nearest masked pixel in the same column."""
    height = mask.shape[0]
    rows = np.arange(height, dtype=np.int32)[:, None]
    far = np.int32(1 << 14)
    above = np.maximum.accumulate(np.where(mask, rows, -far), axis=0)
    below = np.minimum.accumulate(np.where(mask, rows, height + far)[::-1], axis=0)[::-1]
    return np.minimum(rows - above, below - rows)
