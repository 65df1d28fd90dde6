"""Groups of marks: boxes round the masked pixels that belong together; integers only.

Boxes are rows of an array: left, top, right, bottom, half open, and in further columns
whatever a group keeps the greatest of.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.int64]  # (n, 4 or more)


def find(mask: NDArray[np.bool_], context_px: int) -> Boxes:
    """Tight boxes of the connected components, joined where their context boxes overlap.

    context_px: 8 or more. Two pixels in touching cells of a grid as fine as the context always
    have overlapping contexts. So components of cells stand in for components of pixels: the
    same groups, found in a grid a thousand times smaller.
    """
    boxes, occupied = _cell_boxes(mask, context_px // 8 * 8)
    number = np.full(occupied.shape, -1, np.int64)
    number[occupied] = np.arange(len(boxes))
    labels = _connected(len(boxes), *_neighbours(number))
    return merged(_bounds(boxes, labels), reach=lambda found: grown(found, 2 * context_px))


def merged(boxes: Boxes, *, reach: Callable[[Boxes], Boxes]) -> Boxes:
    """Joins boxes until none touches what another reaches; sorted by top, then left."""
    while True:
        boxes = boxes[np.lexsort((boxes[:, 0], boxes[:, 1]))]
        reached = reach(boxes)
        pairs = [
            (np.full(len(touched), index), touched)
            for index, box in enumerate(reached)
            if len(touched := np.flatnonzero(overlap(box, boxes))) > 1
        ]
        if not pairs:
            return boxes
        ones, others = (np.concatenate(side) for side in zip(*pairs, strict=True))
        boxes = _bounds(boxes, _connected(len(boxes), ones, others))


def grown(boxes: Boxes, px: int) -> Boxes:
    return boxes + np.array([-px, -px, px, px], np.int64)


def overlap(box: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
    """(n,) which of the boxes share a pixel with the one."""
    across = (box[0] < boxes[:, 2]) & (boxes[:, 0] < box[2])
    down = (box[1] < boxes[:, 3]) & (boxes[:, 1] < box[3])
    both: NDArray[np.bool_] = across & down
    return both


def thickness(mask: NDArray[np.bool_], least: int) -> int:
    """The side of the largest square of masked pixels, or ``least`` where that is greater."""
    best = least
    if min(mask.shape) <= least:
        return best
    above = np.zeros(mask.shape[1], np.int32)  # masked pixels in a column, ending in this row
    for row in mask:
        above += 1
        above *= row
        tall = above > best
        # A square that ends in this row is at most one larger than those that ended above.
        if np.count_nonzero(tall) > best and _longest_run(tall) > best:
            best += 1
    return best


def _longest_run(flags: NDArray[np.bool_]) -> int:
    ends = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return int((ends[1::2] - ends[::2]).max(initial=0))


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
    """Pairs of cells side by side or one above the other; ``merged`` finds the diagonal ones.

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


def _bounds(boxes: Boxes, labels: NDArray[np.int64]) -> Boxes:
    """One box around all the boxes of each label."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    low = np.minimum.reduceat(boxes[order, :2], starts, axis=0)
    high = np.maximum.reduceat(boxes[order, 2:], starts, axis=0)
    return np.hstack([low, high])
