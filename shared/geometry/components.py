"""Connected components of a mask, joined where they are close together; integers only.

Boxes are rows of an array: left, top, right, bottom, half open. Further columns are values of
which a joined box takes the maximum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.int64]  # (n, 4 or more)


def find(mask: NDArray[np.bool_], context_px: int) -> Boxes:
    """(n, 4) tight boxes of the connected components, joined where their context boxes overlap.

    context_px: how far a context box extends past its component; 8 or more.
    """
    # Components of cells replace components of pixels: two pixels in adjacent cells no larger
    # than the context always have overlapping contexts, so the groups are the same. The grid
    # is a thousand times smaller.
    boxes, occupied = _cell_boxes(mask, context_px // 8 * 8)
    number = np.full(occupied.shape, -1, np.int64)
    number[occupied] = np.arange(len(boxes))
    labels = _label_connected(len(boxes), *_adjacent_cells(number))
    joined = _bounds(boxes, labels)
    return merge(joined, reach=lambda unjoined: grow(unjoined, 2 * context_px))


def merge(boxes: Boxes, *, reach: Callable[[Boxes], Boxes]) -> Boxes:
    """Join boxes until none overlaps what another reaches; sorted by top, then left.

    reach(boxes): the area around each box in which no other box may lie.
    """
    while True:
        boxes = boxes[np.lexsort((boxes[:, 0], boxes[:, 1]))]
        reached = reach(boxes)
        pairs = [
            (np.full(len(overlapping), index), overlapping)
            for index, box in enumerate(reached)
            if len(overlapping := np.flatnonzero(find_overlaps(box, boxes))) > 1
        ]
        if not pairs:
            return boxes
        starts, ends = (np.concatenate(side) for side in zip(*pairs, strict=True))
        boxes = _bounds(boxes, _label_connected(len(boxes), starts, ends))


def grow(boxes: Boxes, px: int) -> Boxes:
    return boxes + np.array([-px, -px, px, px], np.int64)


def find_overlaps(box: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
    """(n,) whether each of the boxes shares a pixel with ``box``."""
    across = (box[0] < boxes[:, 2]) & (boxes[:, 0] < box[2])
    down = (box[1] < boxes[:, 3]) & (boxes[:, 1] < box[3])
    both: NDArray[np.bool_] = across & down
    return both


def measure_thickness(mask: NDArray[np.bool_], minimum: int) -> int:
    """The side of the largest square of masked pixels, at least ``minimum``."""
    best = minimum
    if min(mask.shape) <= minimum:
        return best
    heights = np.zeros(mask.shape[1], np.int32)  # of the run of masked pixels that ends here
    for row in mask:
        heights += 1
        heights *= row
        tall = heights > best
        # One step is enough: a square that ends in this row is at most one larger than the
        # largest that ended in the row before.
        if np.count_nonzero(tall) > best and _longest_run(tall) > best:
            best += 1
    return best


def _longest_run(flags: NDArray[np.bool_]) -> int:
    ends = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return int((ends[1::2] - ends[::2]).max(initial=0))


def _cell_boxes(mask: NDArray[np.bool_], cell: int) -> tuple[Boxes, NDArray[np.bool_]]:
    """(n, 4) tight boxes of the masked pixels in each occupied cell, and (h, w) occupied cells.

    cell: the side in pixels, a multiple of 8, because eight pixels are tested as a 64-bit word.
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


def _adjacent_cells(number: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of occupied cells that share a side; ``merge`` joins those that share a corner.

    number: (h, w), the cell's number, or -1 if it is empty.
    """
    pairs = [(number[:, :-1], number[:, 1:]), (number[:-1], number[1:])]
    occupied = [(first >= 0) & (second >= 0) for first, second in pairs]
    starts = [first[both] for (first, _), both in zip(pairs, occupied, strict=True)]
    ends = [second[both] for (_, second), both in zip(pairs, occupied, strict=True)]
    return np.concatenate(starts), np.concatenate(ends)


def _label_connected(
    count: int, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(count,) the lowest node that each node is connected to by the edges (starts, ends).

    Minimum-label hooking with pointer jumping (Shiloach and Vishkin, 1982).
    """
    labels = np.arange(count)
    while True:
        low = np.minimum(labels[starts], labels[ends])
        if np.array_equal(labels[starts], labels[ends]):
            return labels
        np.minimum.at(labels, labels[starts], low)
        np.minimum.at(labels, labels[ends], low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]


def _bounds(boxes: Boxes, labels: NDArray[np.int64]) -> Boxes:
    """The bounding box of the boxes of each label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    low = np.minimum.reduceat(boxes[order, :2], starts, axis=0)
    high = np.maximum.reduceat(boxes[order, 2:], starts, axis=0)
    return np.hstack([low, high])
