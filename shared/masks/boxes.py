"""Boxes as masks: the text ``box:left,top,right,bottom`` in a manifest's mask column."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from shared.errors import MaskError
from shared.geometry.box import Box
from shared.masks.morphology import Grey, slices

# At most nine digits: int() raises ValueError past 4,300.
_MAX_BOXES = 1_000  # drawing a box costs as much as its area
_EDGE = re.compile(r"\s*(?:([+-]?\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%)\s*")


class Edge(NamedTuple):
    """One side of a box, in pixels from the image's left or top, or in percent of its length.

    A Fraction, because 12.4% of a length must not be rounded before it is rounded outward.
    """

    value: Fraction
    is_percent: bool

    def px(self, length: int) -> Fraction:
        return self.value * length / 100 if self.is_percent else self.value


Edges = tuple[Edge, Edge, Edge, Edge]  # left, top, right, bottom


def parse_boxes(text: str) -> tuple[Edges, ...]:
    """Parse ``box:left,top,right,bottom``, half open; further boxes follow after semicolons.

    Each number is whole pixels, or a percentage of the image's width or height. Pixels past
    the image's edge are allowed here, because its size is not known yet. Raises MaskError.
    """
    boxes = text.split(";")
    if len(boxes) > _MAX_BOXES:
        raise MaskError(
            f"{len(boxes):,} boxes are too many; use at most {_MAX_BOXES:,}, or a mask file"
        )
    return tuple(_parse_edges(box) for box in boxes)


def _parse_edges(text: str) -> Edges:
    matches = [_EDGE.fullmatch(part) for part in text.strip().removeprefix("box:").split(",")]
    if len(matches) != 4 or None in matches:
        raise MaskError(
            f"{text!r} is not a box; write box:left,top,right,bottom in whole pixels or percent"
        )
    left, top, right, bottom = (
        Edge(Fraction(match[1] or match[2]), match[2] is not None) for match in matches if match
    )
    for low, high in ((left, right), (top, bottom)):
        if low.is_percent == high.is_percent and low.value >= high.value:
            raise MaskError(f"{text!r} is empty; right must exceed left, and bottom exceed top")
    return left, top, right, bottom


def boxes_to_mask(boxes: tuple[Edges, ...], size: tuple[int, int]) -> Grey:
    """Draw the boxes into a mask of an image of (width, height): (H, W), 255 inside.

    Percentages are rounded outward, and boxes clipped to the image. Raises MaskError if a box
    is empty or lies outside the image.
    """
    mask = np.zeros((size[1], size[0]), np.uint8)
    for edges in boxes:
        box = _to_pixels(edges, size)
        inside = box.clipped(size)
        if inside.is_empty:
            problem = "is empty in" if box.is_empty else "lies outside"
            raise MaskError(
                f"the box {','.join(map(str, box))} {problem} the {size[0]}x{size[1]} image; "
                "pixels count from the left and the top"
            )
        mask[slices(inside)] = 255
    return mask


def _to_pixels(edges: Edges, size: tuple[int, int]) -> Box:
    left, top, right, bottom = edges
    return Box(
        int(left.px(size[0]) // 1),
        int(top.px(size[1]) // 1),
        int(-(-right.px(size[0]) // 1)),
        int(-(-bottom.px(size[1]) // 1)),
    )
