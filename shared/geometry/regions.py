"""Where to inpaint: boxes and windows from a mask; integers only, no images, no I/O.

Two kinds of engine ask for two kinds of plan. One with a window (a diffusion model) gets
regions whose windows all have its size; one without (``any_size``) gets the box it needs.

How many picture pixels go to an engine pixel (the scale) depends on how thick the marks are:
strokes, however long, are painted 1:1; a solid area that no window holds with its context is
painted just coarsely enough that one does, because a model that sees only hole invents a
different picture in each window. A picture smaller than a window is enlarged to it.
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

OVERLAP_PX = 64
CONTEXT_PX = 32
SIZE_STEP = 64
LATENT_STEP = 8
UNIT = 64  # engine pixels; a scale counts the picture pixels that go to so many
FINEST = 16  # a quarter: enlarged more, a picture has nothing more to show

Mask = NDArray[np.bool_] | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of the image to be filled, with its context.

    box: original-image pixels; past the image's right or bottom edge only by less than 64
    engine pixels, or where even at the finest scale the image is smaller than a window.
    size: (width, height) in engine pixels the box is scaled to, of the box's aspect.
    windows: engine pixels in the region's frame; together they cover every masked pixel.
    """

    box: Box
    size: tuple[int, int]
    windows: tuple[Box, ...]

    @property
    def scale(self) -> float:
        """Image pixels to an engine pixel."""
        return self.box.width / self.size[0]


def plan(
    mask: Mask,
    *,
    mode: Mode,
    window: tuple[int, int],
    any_size: bool = False,
    scale: float | None = None,
) -> tuple[Region, ...]:
    """The regions that together hold every nonzero pixel of the mask, top to bottom.

    mask: (H, W), nonzero = repaint. window: the engine's (width, height), multiples of 64.
    any_size: the engine takes any size, so a region is one window at 1:1; ``window`` then only
    sets the tiles of mode ``tile``. scale: picture pixels to an engine pixel for mode ``auto``,
    in steps of 1/64, from 1/4 to what lets a window span the picture; None chooses by the
    thickness of the marks. An empty mask gives no region.
    """
    marked = mask.astype(np.bool_, copy=False)
    if not marked.any():
        return ()
    if mode == "full":
        regions = [_whole(marked, window, any_size=any_size)]
    elif mode == "tile":
        regions = _tiles(marked, window, any_size=any_size)
    elif any_size:
        regions = _contexts(marked)
    else:
        regions = _placed(marked, _frame((mask.shape[1], mask.shape[0]), window, scale))
    return tuple(sorted(regions, key=lambda region: (region.box.top, region.box.left)))


def plan_pass(mask: Mask, params: Params, *, any_size: bool) -> tuple[Region, ...]:
    """The plan that a job's parameters ask for."""
    return plan(
        mask,
        mode=params.mode,
        window=(params.width, params.height),
        any_size=any_size,
        scale=params.scale or None,
    )


def _whole(mask: NDArray[np.bool_], window: tuple[int, int], *, any_size: bool) -> Region:
    """The image fitted into the window; the box grows to the size's exact aspect."""
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


def _tiles(mask: NDArray[np.bool_], window: tuple[int, int], *, any_size: bool) -> list[Region]:
    """Dirty tiles of a regular grid; tiles that overlap form one region."""
    height, width = mask.shape
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _tile_starts(height, window[1])
        for left in _tile_starts(width, window[0])
    ]
    dirty = [tile for tile in grid if _is_dirty(mask, tile)]
    joined = components.merged(np.array(dirty, np.int64), reach=lambda boxes: boxes)
    if any_size:
        return [_one_window(_box(group).clipped((width, height))) for group in joined]
    return [_canvas(_box(group), dirty) for group in joined]


def _tile_starts(length: int, window: int) -> list[int]:
    """Tiles 64 px short of a window apart; the last one is shifted inward."""
    last = _round_up(max(length - window, 0), LATENT_STEP)
    return [*range(0, last, window - OVERLAP_PX), last]


def _contexts(mask: NDArray[np.bool_]) -> list[Region]:
    """One region for each group of marks whose context boxes overlap, clipped to the image."""
    size = (mask.shape[1], mask.shape[0])
    marks = components.find(mask, CONTEXT_PX)
    return [_one_window(_box(box).clipped(size)) for box in components.grown(marks, CONTEXT_PX)]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What windows are placed in. base: the scale of thin marks. coarsest: that of thick ones."""

    size: tuple[int, int]
    window: tuple[int, int]
    base: int
    coarsest: int

    @property
    def span(self) -> tuple[int, int]:
        """(width, height) of a window in picture pixels, at the base scale."""
        return self.base * self.window[0] // UNIT, self.base * self.window[1] // UNIT

    @property
    def held(self) -> int:
        """The side, in engine pixels, of the largest square a window holds with its context."""
        return min(self.window) - 2 * CONTEXT_PX

    @property
    def thin(self) -> int:
        """The same in picture pixels, at the base scale."""
        return self.base * self.held // UNIT


def _frame(size: tuple[int, int], window: tuple[int, int], scale: float | None) -> _Frame:
    """A window of the coarsest scale just spans the picture's shorter side."""
    spanning = min(-(-UNIT * length // side) for length, side in zip(size, window, strict=True))
    coarsest = max(spanning, FINEST)
    base = min(UNIT if scale is None else max(round(scale * UNIT), FINEST), coarsest)
    return _Frame(size=size, window=window, base=base, coarsest=coarsest if scale is None else base)


def _placed(mask: NDArray[np.bool_], frame: _Frame) -> list[Region]:
    """Windows around groups of marks, and canvases where a group outgrows a window."""

    def place(boxes: Boxes) -> Boxes:
        return _placements(boxes, frame)

    marks = _with_thickness(components.find(mask, _context(frame.base)), mask, frame)
    thick = marks[:, 4] > frame.thin
    marks = np.concatenate([marks[thick], _share_windows(marks[~thick], frame)])
    # A mark that lies in two regions would be painted twice, differently.
    marks = components.merged(marks, reach=place)
    return [_dirty_canvas(mask, placement, frame.window) for placement in place(marks)]


def _context(scale: Any) -> Any:
    """Context in picture pixels, for one scale or an array of them."""
    return -(-CONTEXT_PX * scale // UNIT)


def _share_windows(boxes: Boxes, frame: _Frame) -> Boxes:
    """Joins groups that need fewer windows together than apart, the tightest pairs first.

    boxes: sorted by top, so that only the first few can share the topmost one's windows.
    """
    waiting, joined = boxes, []
    while len(waiting):
        box, waiting = waiting[0], waiting[1:]
        while True:
            reach = max(box[1] + frame.span[1], box[3])
            others = waiting[: np.searchsorted(waiting[:, 1], reach)]
            unions = np.hstack(
                [np.minimum(box[:2], others[:, :2]), np.maximum(box[2:], others[:, 2:])]
            )
            apart = _window_counts(box[None], frame) + _window_counts(others, frame)
            fewer = _window_counts(unions, frame) < apart
            if not fewer.any():
                break
            areas = (unions[:, 2:4] - unions[:, :2]).prod(axis=1)
            nearest = int(np.where(fewer, areas, np.iinfo(np.int64).max).argmin())
            box, waiting = unions[nearest], np.delete(waiting, nearest, axis=0)
        joined.append(box)
    return np.stack(joined) if joined else boxes


def _window_counts(boxes: Boxes, frame: _Frame) -> NDArray[np.int64]:
    """(n,) windows over each box with its context, at the base scale."""
    sides = _context_sides(boxes, frame.size, _context(frame.base))
    steps = np.array(frame.window) - OVERLAP_PX
    lengths = _round_up(-(-UNIT * sides // frame.base), SIZE_STEP) - OVERLAP_PX
    counts: NDArray[np.int64] = np.maximum(-(-lengths // steps), 1).prod(axis=1)
    return counts


def _context_sides(boxes: Boxes, size: tuple[int, int], context: Any) -> NDArray[np.int64]:
    """(n, 2) width and height of the boxes with their context, as far as the image goes.

    context: picture pixels, for all boxes or (n, 1).
    """
    ends: NDArray[np.int64] = np.minimum(boxes[:, 2:4] + context, size)
    ends -= np.maximum(boxes[:, :2] - context, 0)
    return ends


def _with_thickness(boxes: Boxes, mask: NDArray[np.bool_], frame: _Frame) -> Boxes:
    """(n, 5) the boxes, and the side of the largest square of masked pixels in each.

    What a window of the base scale holds is not measured: it counts as just held.
    """
    sides = _context_sides(boxes, frame.size, _context(frame.base))
    outgrown: NDArray[np.bool_] = np.any(sides > frame.span, axis=1)
    found = [
        components.thickness(mask[top:bottom, left:right], frame.thin)
        if outgrown[index] and frame.coarsest > frame.base
        else frame.thin
        for index, (left, top, right, bottom) in enumerate(boxes)
    ]
    return np.column_stack([boxes, np.array(found, np.int64)])


def _placements(boxes: Boxes, frame: _Frame) -> Boxes:
    """(n, 5) boxes of regions, and their scales: centred on their marks, shifted inward at borders.

    boxes: (n, 5) with their thickness. Scales above 1 go in eighths, so that sides in multiples
    of 8 engine pixels are whole picture pixels; others need sides in greater multiples.
    """
    size, window = np.array(frame.size), np.array(frame.window)
    scales = -(-UNIT * boxes[:, 4:] // frame.held)
    scales = np.minimum(np.where(scales > UNIT, _round_up(scales, 8), scales), frame.coarsest)
    needed = -(-UNIT * _context_sides(boxes, frame.size, _context(scales)) // scales)
    sides = np.where(needed > window, _round_up(needed, SIZE_STEP), window)
    step = np.maximum(UNIT // np.gcd(scales, UNIT), LATENT_STEP)
    whole = _round_up(-(-UNIT * size // scales), step)
    sides = np.where((sides * scales > UNIT * size) & (needed > window), whole, sides)
    covered = sides * scales // UNIT
    starts = (boxes[:, :2] + boxes[:, 2:4]) // 2 - covered // 2
    starts = np.clip(starts, 0, np.maximum(size - covered, 0))
    return np.hstack([starts, starts + covered, scales])


def _dirty_canvas(
    mask: NDArray[np.bool_], placement: NDArray[np.int64], window: tuple[int, int]
) -> Region:
    """A region of evenly spread windows, without the clean ones."""
    box, scale = _box(placement[:4]), int(placement[4])
    size = (box.width * UNIT // scale, box.height * UNIT // scale)
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _spread_starts(size[1], window[1])
        for left in _spread_starts(size[0], window[0])
    ]
    dirty = tuple(one for one in grid if _is_dirty(mask, _in_picture(one, box, scale)))
    return Region(box=box, size=size, windows=dirty)


def _in_picture(window: Box, box: Box, scale: int) -> Box:
    """The picture pixels that a window of a region reaches into."""
    left, top = (edge * scale // UNIT for edge in window[:2])
    right, bottom = (-(-edge * scale // UNIT) for edge in window[2:])
    return Box(left, top, right, bottom).moved(box.left, box.top)


def _spread_starts(length: int, window: int) -> list[int]:
    """Starts in multiples of 8 whose windows cover the length and overlap by 64 px or more."""
    gaps = max(-(-(length - OVERLAP_PX) // (window - OVERLAP_PX)) - 1, 0)
    spare = (length - window) // LATENT_STEP
    return [0] + [LATENT_STEP * (index * spare // gaps) for index in range(1, gaps + 1)]


def _canvas(box: Box, tiles: list[Box]) -> Region:
    """The tiles that lie in the box, as windows of one region at 1:1."""
    frame = np.array([box], np.int64)
    windows = tuple(
        tile.moved(-box.left, -box.top)
        for tile in tiles
        if components.overlap(np.array(tile, np.int64), frame)[0]
    )
    return Region(box=box, size=box.size, windows=windows)


def _one_window(box: Box) -> Region:
    return Region(box=box, size=box.size, windows=(Box(0, 0, *box.size),))


def _is_dirty(mask: NDArray[np.bool_], box: Box) -> bool:
    return bool(mask[box.top : box.bottom, box.left : box.right].any())


def _box(row: NDArray[np.int64]) -> Box:
    left, top, right, bottom = (int(side) for side in row)
    return Box(left, top, right, bottom)


def _round_up(value: Any, step: int) -> Any:
    return -(-value // step) * step
