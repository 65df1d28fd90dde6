"""Masks, colour and pasting: what an engine painted goes back into the picture, and only that.

``cut`` gives the engine its regions, ``composite`` takes its results. Float arrays exist for
one tile at a time, so a large picture costs two copies of its pixels and little more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import FidelityError
from shared.geometry.box import Box
from shared.geometry.regions import Region
from shared.images import Array, DecodedImage, as_rgb, from_rgb, full_scale, has_alpha
from shared.masks import Mask, dilate, slices, squared_distances, tiles
from shared.params import ColourFit, Params
from workers.pipeline.colour_match import fit_colour

Pixels = NDArray[np.uint8]
Weight = NDArray[np.float32]  # (H, W), 1 = the engine's pixel, 0 = the picture's

RINGING_PX = 6  # Lanczos reaches 3 pixels along each axis, and a pixel on either side half of one


def cut(rgb: Pixels, mask: Mask, region: Region) -> tuple[Pixels, Pixels]:
    """The region for the engine: (h, w, 3) uint8 and its mask (h, w) uint8 of 0 and 255.

    rgb: (H, W, 3); mask: (H, W). Past the picture's edge both repeat their last pixels. An
    engine pixel is masked if any picture pixel in it is; unmasked ones hold nothing of the
    mark.
    """
    image, marked = _reach(rgb, region.box), _reach(mask, region.box)
    if region.size != region.box.size:
        image = _scaled_for_engine(image, marked, region.size)
        marked = _scaled_mask(marked, region.size)
    return np.ascontiguousarray(image), np.ascontiguousarray(marked) * np.uint8(255)


def composite(
    picture: DecodedImage,
    mask: Mask,
    regions: Sequence[Region],
    results: Sequence[Pixels],
    params: Params,
    *,
    fill_alpha: bool = False,
) -> DecodedImage:
    """The picture with each result pasted into its region, in the picture's own mode.

    mask: (H, W) True = repaint, already dilated: the same that was planned and cut.
    results: (h, w, 3) uint8, one of each region's size.
    fill_alpha: repainted pixels become opaque, for masks that are the picture's own holes;
    otherwise alpha stays as it is. Raises FidelityError if a pixel outside the feather
    would change.
    """
    pixels = picture.pixels.copy()
    for region, result in zip(regions, results, strict=True):
        paste(
            pixels,
            picture,
            mask,
            region,
            result,
            feather_px=params.mask_feather,
            colour_fit=params.colour_fit,
            fill_alpha=fill_alpha,
        )
    touched = _touched(picture, pixels, mask, params.mask_feather)
    if picture.has_alpha and not fill_alpha and _differs(pixels, picture.pixels, alpha=True).any():
        raise FidelityError("the alpha channel would have changed; report this")
    return picture.replace(pixels, touched=touched)


def paste(
    pixels: Array,
    picture: DecodedImage,
    mask: Mask,
    region: Region,
    result: Pixels,
    *,
    feather_px: int = 0,
    colour_fit: ColourFit = "membrane",
    fill_alpha: bool = False,
) -> None:
    """Blends one result into ``pixels``, which is of the picture's shape and mode.

    The result is scaled to the region's box and its colour fitted to the picture around the
    mask. The feather also falls to 0 at the box's edges, where they lie inside the picture.
    """
    box = region.box.clipped(picture.size)
    scaled = _resized(result, region.box.size, _SMOOTH)[: box.height, : box.width]
    known = as_rgb(picture.pixels[slices(box)], picture.mode, profile=picture.metadata.icc)
    marked, scale = mask[slices(box)], max(region.scale, 1.0)
    fit = fit_colour(scaled, known, marked, method=colour_fit, scale=scale)
    for tile in tiles(box):
        weight = _ramp(mask, tile, feather_px, within=box)
        if weight.any():
            local = tile.moved(-box.left, -box.top)
            painted = fit.apply(scaled[slices(local)], (local.left, local.top))
            blend(
                pixels[slices(tile)],
                painted,
                weight,
                picture.mode,
                profile=picture.metadata.icc,
                fill_alpha=fill_alpha,
            )


def blend(
    target: Array,
    painted: NDArray[np.float32],
    weight: Weight,
    mode: str,
    *,
    profile: bytes = b"",
    fill_alpha: bool,
) -> None:
    """Moves the target, a view of the picture's pixels, towards the painted colours."""
    where = weight > 0
    colours = target[..., :-1] if has_alpha(mode) else target.reshape(*weight.shape, -1)
    share = weight[where][:, None]
    old = colours[where].astype(np.float32)
    asked = from_rgb(painted[where], mode, profile=profile)
    new = old + share * (asked - old)
    mixed = new >= 0.5 if mode == "1" else np.rint(new)
    colours[where] = mixed.astype(target.dtype)
    if has_alpha(mode) and fill_alpha:
        alpha, opaque = target[..., -1], full_scale(mode)
        kept = alpha[where].astype(np.float32)
        alpha[where] = np.rint(kept + share[:, 0] * (opaque - kept)).astype(target.dtype)


def _touched(picture: DecodedImage, pixels: Array, mask: Mask, feather_px: int) -> Mask:
    """(H, W) which pixels differ; raises FidelityError if one is farther from the mask."""
    touched = np.zeros(mask.shape, np.bool_)
    for tile in tiles(Box(0, 0, *picture.size)):
        where = slices(tile)
        if np.array_equal(pixels[where], picture.pixels[where]):
            continue
        touched[where] = _differs(pixels[where], picture.pixels[where])
        allowed = squared_distances(mask, tile, feather_px) <= feather_px * feather_px
        wrong = int(np.count_nonzero(touched[where] & ~allowed))
        if wrong:
            raise FidelityError(f"{wrong} pixels outside the mask would have changed; report this")
    return touched


def _differs(one: Array, other: Array, *, alpha: bool = False) -> Mask:
    """(h, w) which pixels differ, or which differ in their last channel."""
    if alpha:
        return np.not_equal(one[..., -1], other[..., -1])
    found: Mask = one != other
    return found if found.ndim == 2 else np.logical_or.reduce(found, axis=-1)


def _ramp(mask: Mask, tile: Box, px: int, *, within: Box | None = None) -> Weight:
    """(h, w) feather weights of one tile of the picture.

    The weight falls from the mask to the feather's end; with ``within``, a box, to its edges
    too, unless they are the picture's. It is the share that the way to the end has in the way
    from the mask to the end: one slope, and no kink where the one end gives way to the other.
    """
    if px == 0:
        return mask[slices(tile)].astype(np.float32)
    squares = squared_distances(mask, tile, px)
    distance: Weight = np.sqrt(squares, dtype=np.float32)
    rest: Weight = np.maximum(px + 1 - distance, 0)
    rest[squares > px * px] = 0
    if within is not None:
        height, width = mask.shape
        rows = _edge_distance((tile.top, tile.bottom), (within.top, within.bottom), height)
        columns = _edge_distance((tile.left, tile.right), (within.left, within.right), width)
        np.minimum(rest, np.minimum(rows[:, None], columns), out=rest)
    weight: Weight = rest / np.maximum(distance + rest, np.float32(1e-6))
    return weight


def _edge_distance(span: tuple[int, int], within: tuple[int, int], length: int) -> Weight:
    """(n,) pixels from each place to the ends of ``within`` that are no ends of the picture."""
    place: Weight = np.arange(*span, dtype=np.float32) + np.float32(0.5)
    low = place - within[0] if within[0] > 0 else np.full_like(place, np.inf)
    high = within[1] - place if within[1] < length else np.full_like(place, np.inf)
    distance: Weight = np.minimum(low, high)
    return distance


def _reach(array: Array, box: Box) -> Array:
    """The box of an (H, W) or (H, W, C) array, repeating its last row and column past the edge."""
    rows = np.minimum(np.arange(box.top, box.bottom), array.shape[0] - 1)
    columns = np.minimum(np.arange(box.left, box.right), array.shape[1] - 1)
    if rows[-1] == box.bottom - 1 and columns[-1] == box.right - 1:
        return array[slices(box)]
    reached: Array = array[rows[:, None], columns]
    return reached


def _scaled_for_engine(image: Pixels, marked: Mask, size: tuple[int, int]) -> Pixels:
    """Shrinking averages boxes, which does not ring; nor does what is enlarged near the mark."""
    if size[0] < image.shape[1]:
        return _resized(image, size, Image.Resampling.BOX)
    smooth = _resized(image, size, _SMOOTH)
    rung = _scaled_mask(dilate(marked, RINGING_PX), size)
    if not rung.any():
        return smooth
    return np.where(rung[..., None], _resized(image, size, Image.Resampling.NEAREST), smooth)


def _scaled_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """(h, w) of that (width, height): whether any pixel that reaches into each one is masked."""
    return _any_in_each(_any_in_each(mask, size[1]).T, size[0]).T


def _any_in_each(mask: Mask, count: int) -> Mask:
    """(count, w) from (h, w): whether any row that reaches into each of count bands is masked."""
    height = mask.shape[0]
    edges = np.arange(count + 1) * height
    first, last = edges[:-1] // count, -(-edges[1:] // count) - 1
    found: Mask = np.logical_or.reduceat(mask, first, axis=0) | mask[last]
    return found


def _resized(rgb: Pixels, size: tuple[int, int], filter: Image.Resampling) -> Pixels:
    if (rgb.shape[1], rgb.shape[0]) == size:
        return rgb
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize(size, filter))


_SMOOTH = Image.Resampling.LANCZOS
