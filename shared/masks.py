"""Masks: from a picture, its own alpha or boxes in the manifest, to the pixels repainted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared import drawings
from shared.errors import ImageError, MaskError
from shared.geometry.regions import Box
from shared.images import DecodedImage, decode
from shared.params import MaskFit

Grey = NDArray[np.uint8]  # (H, W), 255 = repaint
Mask = NDArray[np.bool_]  # (H, W), True = repaint

TILE_PX = 512

_EDGE = re.compile(r"\s*(?:([+-]?\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%)\s*")


def repainted(
    grey: Grey,
    size: tuple[int, int],
    *,
    threshold: int,
    dilation: int = 0,
    invert: bool = False,
    fit: MaskFit = "exact",
) -> Mask:
    """Which pixels of a (width, height) picture a mask repaints, (H, W) bool.

    In this order: inverted; laid over the picture as ``fitted`` says, so that what lies beside
    a small mask is kept either way; thresholded, so that a lower threshold always repaints
    more; grown by ``dilation`` pixels. Raises MaskError.
    """
    turned = np.uint8(255) - grey if invert else grey
    return dilate(binary(fitted(turned, size, fit), threshold=threshold), dilation)


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """(H, W) uint8 grey, upright, 255 = repaint, from any picture that ``decode`` reads.

    White is repainted, black and transparent are kept; ``drawings`` says what else is read.
    Raises ObjectTooLarge as ``decode`` does, and MaskError for what it cannot read or what can
    be read in two ways.
    """
    try:
        picture = decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise MaskError(f"the mask: {error}") from error
    return drawings.read(picture)


def alpha_mask(picture: DecodedImage) -> Grey:
    """The mask in a picture's own alpha: the more transparent, the whiter.

    With the default threshold of 48, alpha below 208 is repainted. Raises MaskError where the
    picture has no alpha channel.
    """
    alpha = picture.alpha()
    if alpha is None:
        raise MaskError(
            f"the mask is 'alpha', but the {picture.format} has no alpha channel; give a mask"
        )
    return np.uint8(255) - alpha


class Edge(NamedTuple):
    """A side of a box: pixels from the picture's left or top, or hundredths of its length."""

    value: Fraction
    is_percent: bool

    def px(self, length: int) -> Fraction:
        return self.value * length / 100 if self.is_percent else self.value


Edges = tuple[Edge, Edge, Edge, Edge]  # left, top, right, bottom


def parse_box(text: str) -> tuple[Edges, ...]:
    """``box:left,top,right,bottom``, half open, and more of them after semicolons.

    Each is whole pixels, or a percentage of the picture's width or height. Raises MaskError.
    Pixels past an edge are allowed here: only the picture knows them.
    """
    return tuple(_edges(one) for one in text.split(";"))


def _edges(text: str) -> Edges:
    found = [_EDGE.fullmatch(part) for part in text.strip().removeprefix("box:").split(",")]
    if len(found) != 4 or None in found:
        raise MaskError(
            f"{text!r} is no box; write box:left,top,right,bottom in whole pixels or percent"
        )
    left, top, right, bottom = (
        Edge(Fraction(one[1] or one[2]), one[2] is not None) for one in found if one
    )
    for low, high in ((left, right), (top, bottom)):
        if low.is_percent == high.is_percent and low.value >= high.value:
            raise MaskError(f"{text!r} is empty; right must exceed left, and bottom exceed top")
    return left, top, right, bottom


def box_mask(boxes: tuple[Edges, ...], size: tuple[int, int]) -> Grey:
    """(H, W) mask of the parts of the boxes inside the (width, height) picture.

    Percentages are rounded outward. Raises MaskError where a box is empty or lies wholly
    outside.
    """
    mask = np.zeros((size[1], size[0]), np.uint8)
    for left, top, right, bottom in boxes:
        box = Box(
            int(left.px(size[0]) // 1),
            int(top.px(size[1]) // 1),
            int(-(-right.px(size[0]) // 1)),
            int(-(-bottom.px(size[1]) // 1)),
        )
        inside = box.clipped(size)
        if inside.width <= 0 or inside.height <= 0:
            where = "is empty in" if box.width <= 0 or box.height <= 0 else "lies outside"
            raise MaskError(
                f"the box {','.join(map(str, box))} {where} the {size[0]}x{size[1]} picture; "
                "pixels count from the left and the top"
            )
        mask[slices(inside)] = 255
    return mask


def fitted(mask: Grey, size: tuple[int, int], fit: MaskFit) -> Grey:
    """The mask laid over a (width, height) picture, (H, W).

    exact: it must have that size. scale: it must have that shape, to a pixel; each pixel takes
    the brightest of those it stands for, so that no stroke is lost. An anchor (``top-left`` to
    ``bottom-right``, ``center``): pixel for pixel from there, cut off where the mask is larger
    than the picture, kept where it is smaller. Raises MaskError.
    """
    if fit == "exact":
        _check_size(mask, size)
    found = (mask.shape[1], mask.shape[0])
    if found == size:
        return mask
    if fit != "scale":
        return _anchored(mask, size, fit)
    if abs(found[0] * size[1] - found[1] * size[0]) > max(*found, *size):
        raise MaskError(
            f"the mask is {found[0]}x{found[1]} and cannot be scaled to {size[0]}x{size[1]} "
            "without distortion; use an anchor such as mask_fit=center, or a mask of that shape",
            code="mask_size",
        )
    return _brightest(_brightest(mask, size[1], axis=0), size[0], axis=1)


def _check_size(mask: Grey, size: tuple[int, int]) -> None:
    """Raises MaskError unless the mask has the picture's (width, height)."""
    found = (mask.shape[1], mask.shape[0])
    if found != size:
        raise MaskError(
            f"the mask is {found[0]}x{found[1]}, the picture {size[0]}x{size[1]}; "
            "make the mask the picture's size, or say with mask_fit how to lay it over",
            code="mask_size",
        )


def _anchored(mask: Grey, size: tuple[int, int], anchor: str) -> Grey:
    laid = np.zeros((size[1], size[0]), np.uint8)
    height, width = mask.shape
    left = _start(size[0] - width, anchor, low="left", high="right")
    top = _start(size[1] - height, anchor, low="top", high="bottom")
    inside = Box(left, top, left + width, top + height).clipped(size)
    laid[slices(inside)] = mask[slices(inside.moved(-left, -top))]
    return laid


def _start(room: int, anchor: str, *, low: str, high: str) -> int:
    if low in anchor:
        return 0
    return room if high in anchor else room // 2


def _brightest(mask: Grey, count: int, *, axis: int) -> Grey:
    """The mask with ``count`` pixels along the axis, each the greatest of those it overlaps."""
    length = mask.shape[axis]
    edges = np.arange(count + 1) * length
    first, last = edges[:-1] // count, -(-edges[1:] // count) - 1
    shrinks = count < length
    found: Grey = np.maximum.reduceat(mask, first, axis) if shrinks else mask.take(first, axis)
    np.maximum(found, mask.take(last, axis), out=found)
    return found


def binary(mask_grey: Grey, *, threshold: int) -> Mask:
    """(H, W) True where the grey is at the threshold or above."""
    return mask_grey >= threshold


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
