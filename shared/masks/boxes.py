"""Boxes as masks: the text ``box:left,top,right,bottom`` in a manifest's mask column."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from shared.errors import MaskError
from shared.geometry.box import Box
from shared.masks.morphology import Grey, slices

_EDGE = re.compile(r"\s*(?:([+-]?\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%)\s*")


class Edge(NamedTuple):
    """A side of a box: pixels from the picture's left or top, or hundredths of its length."""

    value: Fraction
    is_percent: bool

    def px(self, length: int) -> Fraction:
        return self.value * length / 100 if self.is_percent else self.value


Edges = tuple[Edge, Edge, Edge, Edge]  # left, top, right, bottom


def parse_boxes(text: str) -> tuple[Edges, ...]:
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


def boxes_to_mask(boxes: tuple[Edges, ...], size: tuple[int, int]) -> Grey:
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
