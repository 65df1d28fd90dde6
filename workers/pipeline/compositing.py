"""Cutting regions out of an image for the engine, and compositing its results into the image.

Float arrays exist for one tile at a time, so that a large image costs two copies of its pixels
and little more.
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
Weight = NDArray[np.float32]  # (H, W), 1 = the engine's pixel, 0 = the image's

# ceil(sqrt(2) * (3 + 1/2 + 1/2)): Lanczos reaches 3 px on each axis, and half a pixel each for
# the one that rings and the one that causes it.
RINGING_PX = 6


def cut(rgb: Pixels, mask: Mask, region: Region) -> tuple[Pixels, Pixels]:
    """Cut a region for the engine: (h, w, 3) uint8 and its mask (h, w) uint8 of 0 and 255.

    rgb: (H, W, 3). mask: (H, W). Past the image's edge both repeat their last row and column.
    An engine pixel is masked if any image pixel in it is; unmasked engine pixels contain
    nothing of the masked image pixels.
    """
    image, masked = _crop(rgb, region.box), _crop(mask, region.box)
    if region.size != region.box.size:
        image = _scale_for_engine(image, masked, region.size)
        masked = _scale_mask(masked, region.size)
    return np.ascontiguousarray(image), np.ascontiguousarray(masked) * np.uint8(255)


def composite(
    image: DecodedImage,
    mask: Mask,
    regions: Sequence[Region],
    results: Sequence[Pixels],
    params: Params,
    *,
    fill_alpha: bool = False,
) -> DecodedImage:
    """Paste each result into its region, in the image's own mode and depth.

    mask: (H, W) True = repaint, already dilated: the one that was planned and cut.
    results: (h, w, 3) uint8, each of its region's size.
    fill_alpha: repainted pixels become opaque, for masks that are the image's transparent
    parts; otherwise alpha is unchanged. Raises FidelityError if a pixel outside the feather
    would change.
    """
    pixels = image.pixels.copy()
    for region, result in zip(regions, results, strict=True):
        paste(
            pixels,
            image,
            mask,
            region,
            result,
            feather_px=params.mask_feather,
            colour_fit=params.colour_fit,
            fill_alpha=fill_alpha,
        )
    touched = _find_changed(image, pixels, mask, params.mask_feather)
    if image.has_alpha and not fill_alpha and _differs(pixels, image.pixels, alpha=True).any():
        raise FidelityError("the alpha channel would have changed; report this")
    return image.replace(pixels, touched=touched)


def paste(
    pixels: Array,
    image: DecodedImage,
    mask: Mask,
    region: Region,
    result: Pixels,
    *,
    feather_px: int = 0,
    colour_fit: ColourFit = "membrane",
    fill_alpha: bool = False,
) -> None:
    """Blend one result into ``pixels``, a copy of the image's pixels.

    The result is scaled to the region's box, and its colours are fitted to the image around
    the mask. The feather also falls to 0 at those edges of the box that lie inside the image.
    """
    box = region.box.clipped(image.size)
    scaled = _resize(result, region.box.size, _SMOOTH)[: box.height, : box.width]
    known = as_rgb(image.pixels[slices(box)], image.mode, profile=image.metadata.icc)
    masked, scale = mask[slices(box)], max(region.scale, 1.0)
    correction = fit_colour(scaled, known, masked, method=colour_fit, scale=scale)
    for tile in tiles(box):
        weight = _feather_weights(mask, tile, feather_px, within=box)
        if weight.any():
            local = tile.moved(-box.left, -box.top)
            painted = correction.apply(scaled[slices(local)], (local.left, local.top))
            blend(
                pixels[slices(tile)],
                painted,
                weight,
                image.mode,
                profile=image.metadata.icc,
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
    """Blend into ``target``, a view of the image's pixels: target += weight * (painted - target).

    painted: (h, w, 3) RGB of 0 to 255. fill_alpha: alpha moves towards opaque by the same weight.
    """
    index = weight > 0
    colours = target[..., :-1] if has_alpha(mode) else target.reshape(*weight.shape, -1)
    share = weight[index][:, None]
    old = colours[index].astype(np.float32)
    # The target's own mode and depth: rounding to 8-bit RGB first would lose 16-bit levels.
    blended = old + share * (from_rgb(painted[index], mode, profile=profile) - old)
    rounded = blended >= 0.5 if mode == "1" else np.rint(blended)
    colours[index] = rounded.astype(target.dtype)
    if has_alpha(mode) and fill_alpha:
        alpha, opaque = target[..., -1], full_scale(mode)
        old_alpha = alpha[index].astype(np.float32)
        filled = old_alpha + share[:, 0] * (opaque - old_alpha)
        alpha[index] = np.rint(filled).astype(target.dtype)


def _find_changed(image: DecodedImage, pixels: Array, mask: Mask, feather_px: int) -> Mask:
    """(H, W) the pixels that differ; raises FidelityError if one lies outside the feather."""
    changed = np.zeros(mask.shape, np.bool_)
    for tile in tiles(Box(0, 0, *image.size)):
        index = slices(tile)
        if np.array_equal(pixels[index], image.pixels[index]):
            continue
        changed[index] = _differs(pixels[index], image.pixels[index])
        allowed = squared_distances(mask, tile, feather_px) <= feather_px * feather_px
        count = int(np.count_nonzero(changed[index] & ~allowed))
        if count:
            raise FidelityError(f"{count} pixels outside the mask would have changed; report this")
    return changed


def _differs(first: Array, second: Array, *, alpha: bool = False) -> Mask:
    """(h, w) the pixels that differ in any channel; with ``alpha``, in the last one."""
    if alpha:
        return np.not_equal(first[..., -1], second[..., -1])
    differs: Mask = first != second
    return differs if differs.ndim == 2 else np.logical_or.reduce(differs, axis=-1)


# --- feather ---------------------------------------------------------------------------------


def _feather_weights(mask: Mask, tile: Box, px: int, *, within: Box | None = None) -> Weight:
    """(h, w) weights of one tile of the image: 1 in the mask, 0 past the feather.

    weight = d_end / (d_mask + d_end), where d_mask and d_end are the distances to the mask and
    to the feather's outer end. With ``within``, d_end is at most the distance to that box's
    edges, except to those on the image's own edge.
    """
    if px == 0:
        return mask[slices(tile)].astype(np.float32)
    squares = squared_distances(mask, tile, px)
    to_mask: Weight = np.sqrt(squares, dtype=np.float32)
    to_end: Weight = np.maximum(px + 1 - to_mask, 0)
    to_end[squares > px * px] = 0
    if within is not None:
        height, width = mask.shape
        rows = _edge_distance((tile.top, tile.bottom), (within.top, within.bottom), height)
        columns = _edge_distance((tile.left, tile.right), (within.left, within.right), width)
        np.minimum(to_end, np.minimum(rows[:, None], columns), out=to_end)
    weight: Weight = to_end / np.maximum(to_mask + to_end, np.float32(1e-6))
    return weight


def _edge_distance(span: tuple[int, int], within: tuple[int, int], length: int) -> Weight:
    """(n,) distance of each pixel of the span to the nearer end of ``within``.

    An end on the image's own edge counts as infinitely far: nothing outside needs blending.
    """
    centre: Weight = np.arange(*span, dtype=np.float32) + np.float32(0.5)
    low = centre - within[0] if within[0] > 0 else np.full_like(centre, np.inf)
    high = within[1] - centre if within[1] < length else np.full_like(centre, np.inf)
    distance: Weight = np.minimum(low, high)
    return distance


# --- scaling ---------------------------------------------------------------------------------


def _crop(array: Array, box: Box) -> Array:
    """The box of an (H, W) or (H, W, C) array; past its edge the last row and column repeat."""
    rows = np.minimum(np.arange(box.top, box.bottom), array.shape[0] - 1)
    columns = np.minimum(np.arange(box.left, box.right), array.shape[1] - 1)
    if rows[-1] == box.bottom - 1 and columns[-1] == box.right - 1:
        return array[slices(box)]
    cropped: Array = array[rows[:, None], columns]
    return cropped


def _scale_for_engine(image: Pixels, masked: Mask, size: tuple[int, int]) -> Pixels:
    """Scale without ringing, which would carry the mark's colour into unmasked pixels.

    Shrinking uses a box filter, which does not ring. Enlarging uses Lanczos, and nearest
    neighbour within its reach of the mask.
    """
    if size[0] < image.shape[1]:
        return _resize(image, size, Image.Resampling.BOX)
    smooth = _resize(image, size, _SMOOTH)
    ringing = _scale_mask(dilate(masked, RINGING_PX), size)
    if not ringing.any():
        return smooth
    return np.where(ringing[..., None], _resize(image, size, Image.Resampling.NEAREST), smooth)


def _scale_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Scale to (width, height): a pixel is masked if any pixel that it overlaps is."""
    return _any_in_bands(_any_in_bands(mask, size[1]).T, size[0]).T


def _any_in_bands(mask: Mask, count: int) -> Mask:
    """(count, w) from (h, w): whether any row that overlaps each of ``count`` bands is masked."""
    height = mask.shape[0]
    edges = np.arange(count + 1) * height
    first, last = edges[:-1] // count, -(-edges[1:] // count) - 1
    # reduceat stops before the next band's first row, which both bands may overlap.
    masked: Mask = np.logical_or.reduceat(mask, first, axis=0) | mask[last]
    return masked


def _resize(rgb: Pixels, size: tuple[int, int], filter: Image.Resampling) -> Pixels:
    if (rgb.shape[1], rgb.shape[0]) == size:
        return rgb
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize(size, filter))


_SMOOTH = Image.Resampling.LANCZOS
