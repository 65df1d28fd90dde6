"""Where to inpaint: boxes and windows from a mask; integers only, no images, no I/O.

An engine with windows (a diffusion model) gets regions made of windows of one size; an engine
for any size (``any_size``) gets regions of one window, as large as needed.

The scale, image pixels per engine pixel, depends on how thick the marks are. Strokes of any
length are filled at 1:1. A solid area that does not fit into a window with its context is
scaled down until it does, because a model that sees nothing but hole invents unrelated content
in each window. An image smaller than a window is enlarged to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.geometry import components
from shared.geometry.box import Box
from shared.geometry.components import Boxes
from shared.params import Mode, Params

# In engine pixels:
OVERLAP_PX = 64  # between windows
CONTEXT_PX = 32  # around marks
SIZE_STEP = 64  # region sizes are multiples, so that every level of the UNet is exact
LATENT_STEP = 8  # windows start on the latents' grid

# Scales are integers in 1/64, so that boxes are exact.
SCALE_UNIT = 64
MIN_SCALE = 16  # 1/4; enlarging an image further shows no more detail

Mask = NDArray[np.bool_] | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of the image to be filled, with its context.

    box: original-image pixels. It exceeds the image's right or bottom edge by less than 64
    engine pixels, or by more if the image is smaller than a window even at the smallest scale.
    size: (width, height) in engine pixels that the box is scaled to, with the box's aspect.
    windows: engine pixels, relative to the region; together they cover every masked pixel.
    """

    box: Box
    size: tuple[int, int]
    windows: tuple[Box, ...]

    @property
    def scale(self) -> float:
        """Image pixels per engine pixel."""
        return self.box.width / self.size[0]


def plan(
    mask: Mask,
    *,
    mode: Mode,
    window: tuple[int, int],
    any_size: bool = False,
    scale: float | None = None,
) -> tuple[Region, ...]:
    """Plan the regions that together hold every nonzero pixel of the mask, top to bottom.

    mask: (H, W), nonzero = repaint. window: the engine's (width, height), multiples of 64.
    any_size: the engine takes any size, so a region is one window at 1:1; ``window`` is then
    used for the tiles of mode ``tile`` only. scale: image pixels per engine pixel for mode
    ``auto``, rounded to 1/64, from 1/4 to that at which a window spans the image's shorter
    side; None chooses by the thickness of the marks. An empty mask gives no regions.
    """
    masked = mask.astype(np.bool_, copy=False)
    if not masked.any():
        return ()
    if mode == "full":
        regions = [_plan_full(masked, window, any_size=any_size)]
    elif mode == "tile":
        regions = _plan_tiles(masked, window, any_size=any_size)
    elif any_size:
        regions = _plan_context_boxes(masked)
    else:
        scales = _choose_scales((mask.shape[1], mask.shape[0]), window, scale)
        regions = _plan_windows(masked, scales)
    return tuple(sorted(regions, key=lambda region: (region.box.top, region.box.left)))


def plan_pass(mask: Mask, params: Params, *, any_size: bool) -> tuple[Region, ...]:
    """Plan one pass by its parameters."""
    return plan(
        mask,
        mode=params.mode,
        window=(params.width, params.height),
        any_size=any_size,
        scale=params.scale or None,
    )


def _plan_full(mask: NDArray[np.bool_], window: tuple[int, int], *, any_size: bool) -> Region:
    """The whole image, scaled into the window in multiples of 64 pixels.

    The box is extended past the image to the size's exact aspect, which is never distorted.
    """
    size = (mask.shape[1], mask.shape[0])
    if any_size:
        return _one_window(Box(0, 0, *size))
    longest = max(size[0] * window[1], size[1] * window[0])
    fitted = tuple(
        _round_up(-(-side * window[0] * window[1] // longest), SIZE_STEP) for side in size
    )
    divisor = gcd(*fitted)
    aspect = (fitted[0] // divisor, fitted[1] // divisor)
    scale = max(-(-size[0] // aspect[0]), -(-size[1] // aspect[1]))
    engine = Box(0, 0, *fitted)
    box = Box(0, 0, scale * aspect[0], scale * aspect[1])
    return Region(box=box, size=engine.size, windows=(engine,))


def _plan_tiles(
    mask: NDArray[np.bool_], window: tuple[int, int], *, any_size: bool
) -> list[Region]:
    """The tiles of a regular grid that hold masked pixels; those that overlap form one region."""
    height, width = mask.shape
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _tile_starts(height, window[1])
        for left in _tile_starts(width, window[0])
    ]
    masked = [tile for tile in grid if _has_masked(mask, tile)]
    joined = components.merge(np.array(masked, np.int64), reach=lambda boxes: boxes)
    if any_size:
        return [_one_window(_to_box(row).clipped((width, height))) for row in joined]
    return [_join_tiles(_to_box(row), masked) for row in joined]


def _tile_starts(length: int, window: int) -> list[int]:
    """Starts at a distance of the window's length minus 64 px; the last one is shifted inward."""
    last = _round_up(max(length - window, 0), LATENT_STEP)
    return [*range(0, last, window - OVERLAP_PX), last]


def _plan_context_boxes(mask: NDArray[np.bool_]) -> list[Region]:
    """One region for each group of marks whose context boxes overlap, clipped to the image."""
    size = (mask.shape[1], mask.shape[0])
    contexts = components.grow(components.find(mask, CONTEXT_PX), CONTEXT_PX)
    return [_one_window(_to_box(row).clipped(size)) for row in contexts]


@dataclass(frozen=True, kw_only=True)
class _Scales:
    """The scales, in 1/64, at which windows are placed in an image.

    size: the image's (width, height). window: the engine's. base: the scale of thin marks.
    coarsest: the limit for thick ones.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    base: int
    coarsest: int

    @property
    def span(self) -> tuple[int, int]:
        """(width, height) of a window in image pixels at the base scale."""
        width, height = self.window
        return self.base * width // SCALE_UNIT, self.base * height // SCALE_UNIT

    @property
    def max_mark_side(self) -> int:
        """The side in engine pixels of the largest square that fits a window with its context."""
        return min(self.window) - 2 * CONTEXT_PX

    @property
    def max_thin(self) -> int:
        """The same in image pixels at the base scale: thicker marks need a coarser scale."""
        return self.base * self.max_mark_side // SCALE_UNIT


def _choose_scales(size: tuple[int, int], window: tuple[int, int], scale: float | None) -> _Scales:
    """A given scale holds for all marks; else 1 for thin and up to ``coarsest`` for thick ones."""
    # At the coarsest scale a window just spans the image's shorter side.
    spanning = min(
        -(-SCALE_UNIT * length // side) for length, side in zip(size, window, strict=True)
    )
    coarsest = max(spanning, MIN_SCALE)
    requested = SCALE_UNIT if scale is None else max(round(scale * SCALE_UNIT), MIN_SCALE)
    base = min(requested, coarsest)
    coarsest = coarsest if scale is None else base
    return _Scales(size=size, window=window, base=base, coarsest=coarsest)


def _plan_windows(mask: NDArray[np.bool_], scales: _Scales) -> list[Region]:
    """A window around each group of marks, or several where a group is larger than a window."""

    def place(boxes: Boxes) -> Boxes:
        return _place_regions(boxes, scales)

    marks = components.find(mask, _context_px(scales.base))
    marks = _append_thickness(marks, mask, scales)
    is_thick = marks[:, 4] > scales.max_thin
    marks = np.concatenate([marks[is_thick], _join_to_save_windows(marks[~is_thick], scales)])
    # A mark that lies in two regions would be filled twice, with different content.
    marks = components.merge(marks, reach=place)
    return [_make_region(mask, placement, scales.window) for placement in place(marks)]


def _context_px(scale: Any) -> Any:
    """The context in image pixels, for one scale or an array of scales."""
    return -(-CONTEXT_PX * scale // SCALE_UNIT)


def _join_to_save_windows(boxes: Boxes, scales: _Scales) -> Boxes:
    """Join groups that need fewer windows together than apart; smallest unions first.

    boxes: sorted by top.
    """
    remaining, joined = boxes, []
    while len(remaining):
        box, remaining = remaining[0], remaining[1:]
        while True:
            # Boxes are sorted by top: those below a window's reach cannot share one.
            reach = max(box[1] + scales.span[1], box[3])
            others = remaining[: np.searchsorted(remaining[:, 1], reach)]
            unions = np.hstack(
                [np.minimum(box[:2], others[:, :2]), np.maximum(box[2:], others[:, 2:])]
            )
            apart = _count_windows(box[None], scales) + _count_windows(others, scales)
            fewer = _count_windows(unions, scales) < apart
            if not fewer.any():
                break
            areas = (unions[:, 2:4] - unions[:, :2]).prod(axis=1)
            smallest = int(np.where(fewer, areas, np.iinfo(np.int64).max).argmin())
            box, remaining = unions[smallest], np.delete(remaining, smallest, axis=0)
        joined.append(box)
    return np.stack(joined) if joined else boxes


def _count_windows(boxes: Boxes, scales: _Scales) -> NDArray[np.int64]:
    """(n,) how many windows cover each box with its context at the base scale."""
    sides = _context_sizes(boxes, scales.size, _context_px(scales.base))
    steps = np.array(scales.window) - OVERLAP_PX
    lengths = _round_up(-(-SCALE_UNIT * sides // scales.base), SIZE_STEP) - OVERLAP_PX
    counts: NDArray[np.int64] = np.maximum(-(-lengths // steps), 1).prod(axis=1)
    return counts


def _context_sizes(boxes: Boxes, size: tuple[int, int], context: Any) -> NDArray[np.int64]:
    """(n, 2) width and height of the boxes with their context, clipped to the image.

    context: image pixels, one value or (n, 1).
    """
    ends: NDArray[np.int64] = np.minimum(boxes[:, 2:4] + context, size)
    ends -= np.maximum(boxes[:, :2] - context, 0)
    return ends


def _append_thickness(boxes: Boxes, mask: NDArray[np.bool_], scales: _Scales) -> Boxes:
    """(n, 5) the boxes, and the side of the largest square of masked pixels in each."""
    sides = _context_sizes(boxes, scales.size, _context_px(scales.base))
    exceeds: NDArray[np.bool_] = np.any(sides > scales.span, axis=1)
    # Marks that fit a window at the base scale are not measured: no thickness changes their scale.
    thickness = [
        components.measure_thickness(mask[top:bottom, left:right], scales.max_thin)
        if exceeds[index] and scales.coarsest > scales.base
        else scales.max_thin
        for index, (left, top, right, bottom) in enumerate(boxes)
    ]
    return np.column_stack([boxes, np.array(thickness, np.int64)])


def _place_regions(boxes: Boxes, limits: _Scales) -> Boxes:
    """(n, 5) boxes of regions and their scales, centred on their marks, moved inward at borders.

    boxes: (n, 5) with their thickness.
    """
    size, window = np.array(limits.size), np.array(limits.window)
    scales = -(-SCALE_UNIT * boxes[:, 4:] // limits.max_mark_side)
    # Above 1 in eighths, so that multiples of 8 engine pixels are whole image pixels.
    scales = np.where(scales > SCALE_UNIT, _round_up(scales, 8), scales)
    scales = np.minimum(scales, limits.coarsest)
    context_sizes = _context_sizes(boxes, limits.size, _context_px(scales))
    needed = -(-SCALE_UNIT * context_sizes // scales)
    sides = np.where(needed > window, _round_up(needed, SIZE_STEP), window)
    # Other scales need greater multiples for the same reason.
    step = np.maximum(SCALE_UNIT // np.gcd(scales, SCALE_UNIT), LATENT_STEP)
    whole = _round_up(-(-SCALE_UNIT * size // scales), step)
    sides = np.where((sides * scales > SCALE_UNIT * size) & (needed > window), whole, sides)
    covered = sides * scales // SCALE_UNIT
    starts = (boxes[:, :2] + boxes[:, 2:4]) // 2 - covered // 2
    starts = np.clip(starts, 0, np.maximum(size - covered, 0))
    return np.hstack([starts, starts + covered, scales])


def _make_region(
    mask: NDArray[np.bool_], placement: NDArray[np.int64], window: tuple[int, int]
) -> Region:
    """A region of evenly spaced windows, without those that hold no masked pixel."""
    box, scale = _to_box(placement[:4]), int(placement[4])
    size = (box.width * SCALE_UNIT // scale, box.height * SCALE_UNIT // scale)
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _space_evenly(size[1], window[1])
        for left in _space_evenly(size[0], window[0])
    ]
    masked = tuple(tile for tile in grid if _has_masked(mask, _to_image_pixels(tile, box, scale)))
    return Region(box=box, size=size, windows=masked)


def _to_image_pixels(window: Box, box: Box, scale: int) -> Box:
    """The image pixels that a window of a region overlaps."""
    left, top = (edge * scale // SCALE_UNIT for edge in window[:2])
    right, bottom = (-(-edge * scale // SCALE_UNIT) for edge in window[2:])
    return Box(left, top, right, bottom).moved(box.left, box.top)


def _space_evenly(length: int, window: int) -> list[int]:
    """Starts in multiples of 8 of windows that cover the length and overlap by at least 64 px."""
    gaps = max(-(-(length - OVERLAP_PX) // (window - OVERLAP_PX)) - 1, 0)
    spare = (length - window) // LATENT_STEP
    return [0] + [LATENT_STEP * (index * spare // gaps) for index in range(1, gaps + 1)]


def _join_tiles(box: Box, tiles: list[Box]) -> Region:
    """One region at 1:1 whose windows are the tiles inside the box."""
    bounds = np.array([box], np.int64)
    windows = tuple(
        tile.moved(-box.left, -box.top)
        for tile in tiles
        if components.find_overlaps(np.array(tile, np.int64), bounds)[0]
    )
    return Region(box=box, size=box.size, windows=windows)


def _one_window(box: Box) -> Region:
    return Region(box=box, size=box.size, windows=(Box(0, 0, *box.size),))


def _has_masked(mask: NDArray[np.bool_], box: Box) -> bool:
    return bool(mask[box.top : box.bottom, box.left : box.right].any())


def _to_box(row: NDArray[np.int64]) -> Box:
    left, top, right, bottom = (int(side) for side in row)
    return Box(left, top, right, bottom)


def _round_up(value: Any, step: int) -> Any:
    return -(-value // step) * step
