"""Masks: read from a picture, its own alpha or a box in the manifest; thresholded and grown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shared.errors import ImageError, MaskError
from shared.images import Picture, as_rgb, decode
from shared.regions import Box

Grey = NDArray[np.uint8]  # (H, W), 255 = repaint
Mask = NDArray[np.bool_]  # (H, W), True = repaint

TILE_PX = 512

_COLOURFUL = 64  # between the strongest and the weakest channel
_COLOURFUL_SHARE = 0.001


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """(H, W) uint8 grey, upright, 255 = repaint, from any picture that ``decode`` reads.

    Transparent parts of a mask count as black, that is as kept. Raises ObjectTooLarge as
    ``decode`` does, and MaskError for what it cannot read and for a mask in colours, which nobody
    could tell to be light or dark.
    """
    try:
        picture = decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise MaskError(f"the mask: {error}") from error
    if picture.mode in ("L", "LA", "1", "I;16"):
        grey = as_rgb(picture.pixels, picture.mode)[..., 0]
    else:
        grey = _grey(picture.rgb())
    alpha = picture.alpha()
    if alpha is not None and not (alpha == 255).all():
        grey = (grey.astype(np.uint16) * alpha // 255).astype(np.uint8)
    return np.ascontiguousarray(grey)


def _grey(rgb: Grey) -> Grey:
    """(H, W) from (H, W, 3); the greatest channel, which for grey is any of them."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    high = np.maximum(np.maximum(red, green), blue)
    spread = high - np.minimum(np.minimum(red, green), blue)
    if np.count_nonzero(spread > _COLOURFUL) > _COLOURFUL_SHARE * spread.size:
        raise MaskError("the mask has colours; save it in grey: white is repainted, black kept")
    return high


def alpha_mask(picture: Picture) -> Grey:
    """The mask in a picture's own alpha: the more transparent, the whiter.

    With the usual threshold of 128, alpha below 128 is repainted. Raises MaskError where the
    picture has no alpha channel.
    """
    alpha = picture.alpha()
    if alpha is None:
        raise MaskError(
            f"the mask is 'alpha', but the {picture.format} has no alpha channel; give a mask"
        )
    return np.uint8(255) - alpha


def parse_box(text: str) -> Box:
    """``box:left,top,right,bottom`` or without ``box:``; whole pixels, half open.

    Raises MaskError. Coordinates past an edge are allowed here: only the picture knows them.
    """
    try:
        left, top, right, bottom = (int(part) for part in text.removeprefix("box:").split(","))
    except ValueError:
        raise MaskError(f"{text!r} is no box; write box:left,top,right,bottom in pixels") from None
    if left >= right or top >= bottom:
        raise MaskError(f"{text!r} is empty; right must exceed left, and bottom exceed top")
    return Box(left, top, right, bottom)


def box_mask(box: Box, size: tuple[int, int]) -> Grey:
    """(H, W) mask of the part of the box inside the (width, height) picture.

    Raises MaskError where the box lies wholly outside.
    """
    inside = box.clipped(size)
    if inside.width <= 0 or inside.height <= 0:
        raise MaskError(
            f"the box {','.join(map(str, box))} lies outside the {size[0]}x{size[1]} picture"
        )
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[inside.top : inside.bottom, inside.left : inside.right] = 255
    return mask


def check_size(mask: Grey, size: tuple[int, int]) -> None:
    """Raises MaskError unless the mask has the picture's (width, height)."""
    found = (mask.shape[1], mask.shape[0])
    if found != size:
        raise MaskError(
            f"the mask is {found[0]}x{found[1]}, the picture {size[0]}x{size[1]}; "
            "make the mask the picture's size",
            code="mask_size",
        )


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
            grown[where] = squared_distances(mask, tile, px) <= px * px
    return grown


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
