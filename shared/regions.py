"""Where to inpaint: boxes and windows from a mask; integers only, no images, no I/O.

Two kinds of engine ask for two kinds of plan. One with a window (a diffusion model) gets
regions whose windows all have its size; one without (``native``) gets the box it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.params import Mode

OVERLAP_PX = 64
CONTEXT_PX = 32
SIZE_STEP = 64
LATENT_STEP = 8

Mask = NDArray[np.bool_] | NDArray[np.uint8]
Boxes = NDArray[np.int64]  # (n, 4): left, top, right, bottom


class Box(NamedTuple):
    """Half open, in pixels of whatever frame the owner names."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def clipped(self, size: tuple[int, int]) -> Box:
        """The part inside a picture of that (width, height)."""
        return Box(
            max(self.left, 0), max(self.top, 0), min(self.right, size[0]), min(self.bottom, size[1])
        )

    def moved(self, dx: int, dy: int) -> Box:
        return Box(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of the image to be filled, with its context.

    box: original-image pixels; past the image's right or bottom edge only where the image is
    smaller than a window, or where its side is no multiple of 8 and a canvas needs all of it.
    size: (width, height) in engine pixels the box is scaled to, of the box's aspect.
    windows: engine pixels in the region's frame; together they cover every masked pixel.
    """

    box: Box
    size: tuple[int, int]
    windows: tuple[Box, ...]


def plan(
    mask: Mask, *, mode: Mode, window: tuple[int, int], native: bool = False
) -> tuple[Region, ...]:
    """The regions that together hold every nonzero pixel of the mask, top to bottom.

    mask: (H, W), nonzero = repaint. window: the engine's (width, height), multiples of 64.
    native: the engine takes any size, so a region is one window at 1:1; ``window`` then only
    sets the tiles of mode ``tile``. An empty mask gives no region.
    """
    marked = mask.astype(np.bool_, copy=False)
    if not marked.any():
        return ()
    if mode == "full":
        regions = [_whole(marked, window, native=native)]
    elif mode == "tile":
        regions = _tiles(marked, window, native=native)
    elif native:
        regions = _contexts(marked)
    else:
        regions = _placed(marked, window)
    return tuple(sorted(regions, key=lambda region: (region.box.top, region.box.left)))


def _whole(mask: NDArray[np.bool_], window: tuple[int, int], *, native: bool) -> Region:
    """The image fitted into the window; the box grows to the size's exact aspect."""
    size = (mask.shape[1], mask.shape[0])
    if native:
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


def _tiles(mask: NDArray[np.bool_], window: tuple[int, int], *, native: bool) -> list[Region]:
    """Dirty tiles of a regular grid; tiles that overlap form one region."""
    height, width = mask.shape
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _tile_starts(height, window[1])
        for left in _tile_starts(width, window[0])
    ]
    dirty = [tile for tile in grid if _is_dirty(mask, tile)]
    groups = _merged(np.array(dirty, np.int64), reach=lambda boxes: boxes)
    if native:
        return [_one_window(_box(group).clipped((width, height))) for group in groups]
    return [_canvas(_box(group), dirty) for group in groups]


def _tile_starts(length: int, window: int) -> list[int]:
    """Tiles 64 px short of a window apart; the last one is shifted inward."""
    last = _round_up(max(length - window, 0), LATENT_STEP)
    return [*range(0, last, window - OVERLAP_PX), last]


def _contexts(mask: NDArray[np.bool_]) -> list[Region]:
    """One region for each group of marks whose context boxes overlap, clipped to the image."""
    size = (mask.shape[1], mask.shape[0])
    return [_one_window(_box(box).clipped(size)) for box in _grown(_marks(mask), CONTEXT_PX)]


def _placed(mask: NDArray[np.bool_], window: tuple[int, int]) -> list[Region]:
    """Windows around groups of marks at 1:1, and canvases where a group outgrows a window."""
    size = (mask.shape[1], mask.shape[0])

    def place(boxes: Boxes) -> Boxes:
        return _placements(boxes, size, window)

    marks = _share_windows(_marks(mask), size, window)
    # A mark that lies in two regions would be painted twice, differently.
    marks = _merged(marks, reach=place)
    return [_dirty_canvas(mask, _box(box), window) for box in place(marks)]


def _marks(mask: NDArray[np.bool_]) -> Boxes:
    """Tight boxes of the connected components, joined where their context boxes overlap.

    Two pixels in touching cells of a grid as fine as the context always have overlapping
    contexts. So components of cells stand in for components of pixels: the same groups,
    found in a grid a thousand times smaller.
    """
    boxes, occupied = _cell_boxes(mask, CONTEXT_PX)
    number = np.full(occupied.shape, -1, np.int64)
    number[occupied] = np.arange(len(boxes))
    labels = _connected(len(boxes), *_neighbours(number))
    return _merged(_bounds(boxes, labels), reach=lambda found: _grown(found, 2 * CONTEXT_PX))


def _cell_boxes(mask: NDArray[np.bool_], cell: int) -> tuple[Boxes, NDArray[np.bool_]]:
    """(n, 4) tight boxes of the masked pixels in each occupied cell, row by row; (h, w) cells.

    cell: a multiple of 8, so that eight pixels can be tested at once as one 64-bit word.
    """
    high, wide = (-(-side // cell) for side in mask.shape)
    padded = np.zeros((high * cell, wide * cell), np.bool_)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    words = padded.view(np.uint64).reshape(high * cell, wide, cell // 8)
    by_row = np.bitwise_or.reduce(words, axis=2) != 0  # (high * cell, wide)
    by_column = np.logical_or.reduce(padded.reshape(high, cell, wide * cell), axis=1)
    in_row = by_row.reshape(high, cell, wide).transpose(0, 2, 1)  # (high, wide, cell)
    in_column = by_column.reshape(high, wide, cell)
    occupied = in_row.any(axis=2)
    top, left = np.nonzero(occupied)
    rows, columns = in_row[occupied], in_column[occupied]  # (n, cell)
    first = [left * cell + columns.argmax(1), top * cell + rows.argmax(1)]
    last = [
        (left + 1) * cell - columns[:, ::-1].argmax(1),
        (top + 1) * cell - rows[:, ::-1].argmax(1),
    ]
    return np.stack(first + last, axis=1), occupied


def _neighbours(number: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of cells side by side or one above the other; ``_merged`` finds the diagonal ones.

    number: (h, w), the cell's number or -1 where it is clean.
    """
    pairs = [(number[:, :-1], number[:, 1:]), (number[:-1], number[1:])]
    both = [(one >= 0) & (other >= 0) for one, other in pairs]
    ones = [one[where] for (one, _), where in zip(pairs, both, strict=True)]
    others = [other[where] for (_, other), where in zip(pairs, both, strict=True)]
    return np.concatenate(ones), np.concatenate(others)


def _connected(count: int, ones: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """(count,) the lowest node that each node is joined to by the edges (ones, others).

    Minimum-label hooking with pointer jumping (Shiloach and Vishkin, 1982).
    """
    labels = np.arange(count)
    while True:
        low = np.minimum(labels[ones], labels[others])
        if np.array_equal(labels[ones], labels[others]):
            return labels
        np.minimum.at(labels, labels[ones], low)
        np.minimum.at(labels, labels[others], low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]


def _merged(boxes: Boxes, *, reach: Callable[[Boxes], Boxes]) -> Boxes:
    """Joins boxes until none touches what another reaches; sorted by top, then left."""
    while True:
        boxes = boxes[np.lexsort((boxes[:, 0], boxes[:, 1]))]
        reached = reach(boxes)
        pairs = [
            (np.full(len(touched), index), touched)
            for index, box in enumerate(reached)
            if len(touched := np.flatnonzero(_overlap(box, boxes))) > 1
        ]
        if not pairs:
            return boxes
        ones, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
        boxes = _bounds(boxes, _connected(len(boxes), ones, others))


def _overlap(box: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
    across = (box[0] < boxes[:, 2]) & (boxes[:, 0] < box[2])
    down = (box[1] < boxes[:, 3]) & (boxes[:, 1] < box[3])
    both: NDArray[np.bool_] = across & down
    return both


def _bounds(boxes: Boxes, labels: NDArray[np.int64]) -> Boxes:
    """One box around all the boxes of each label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    low = np.minimum.reduceat(boxes[order, :2], starts, axis=0)
    high = np.maximum.reduceat(boxes[order, 2:], starts, axis=0)
    return np.hstack([low, high])


def _grown(boxes: Boxes, px: int) -> Boxes:
    return boxes + np.array([-px, -px, px, px], np.int64)


def _share_windows(boxes: Boxes, size: tuple[int, int], window: tuple[int, int]) -> Boxes:
    """Joins groups that one window still holds with their context, the tightest pairs first.

    boxes: sorted by top, so that only the first few can share the topmost one's window.
    """
    waiting, joined = boxes, []
    while len(waiting):
        box, waiting = waiting[0], waiting[1:]
        while True:
            others = waiting[: np.searchsorted(waiting[:, 1], box[1] + window[1])]
            unions = np.hstack(
                [np.minimum(box[:2], others[:, :2]), np.maximum(box[2:], others[:, 2:])]
            )
            sides = _context_sides(unions, size)
            fits = (sides <= window).all(axis=1)
            if not fits.any():
                break
            nearest = int(np.where(fits, sides.prod(axis=1), np.iinfo(np.int64).max).argmin())
            box, waiting = unions[nearest], np.delete(waiting, nearest, axis=0)
        joined.append(box)
    return np.stack(joined)


def _context_sides(boxes: Boxes, size: tuple[int, int]) -> NDArray[np.int64]:
    """(n, 2) width and height of the boxes with their context, as far as the image goes."""
    grown = _grown(boxes, CONTEXT_PX)
    return np.minimum(grown[:, 2:], size) - np.maximum(grown[:, :2], 0)


def _placements(boxes: Boxes, size: tuple[int, int], window: tuple[int, int]) -> Boxes:
    """Boxes of engine-sized regions: centred on their marks, shifted inward at borders."""
    needed = np.maximum(_context_sides(boxes, size), window)
    sides = np.where(needed > window, _round_up(needed, SIZE_STEP), needed)
    beyond = (sides > size) & (needed > window)
    sides = np.where(beyond, _round_up(np.array(size), LATENT_STEP), sides)
    starts = (boxes[:, :2] + boxes[:, 2:]) // 2 - sides // 2
    starts = np.clip(starts, 0, np.maximum(np.array(size) - sides, 0))
    return np.concatenate([starts, starts + sides], axis=1)


def _dirty_canvas(mask: NDArray[np.bool_], box: Box, window: tuple[int, int]) -> Region:
    """A region of evenly spread windows at 1:1, without the clean ones."""
    grid = [
        Box(left, top, left + window[0], top + window[1])
        for top in _spread_starts(box.height, window[1])
        for left in _spread_starts(box.width, window[0])
    ]
    dirty = tuple(one for one in grid if _is_dirty(mask, one.moved(box.left, box.top)))
    return Region(box=box, size=box.size, windows=dirty)


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
        if _overlap(np.array(tile, np.int64), frame)[0]
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
