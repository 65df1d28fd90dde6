"""Masks: read from a file, an alpha channel or boxes, fitted to an image, dilated."""

from shared.masks.boxes import box_mask, parse_box
from shared.masks.fitting import binary, fitted, repainted
from shared.masks.morphology import (
    TILE_PX,
    Grey,
    Mask,
    dilate,
    slices,
    squared_distances,
    tiles,
)
from shared.masks.reading import alpha_mask, decode_mask

__all__ = [
    "TILE_PX",
    "Grey",
    "Mask",
    "alpha_mask",
    "binary",
    "box_mask",
    "decode_mask",
    "dilate",
    "fitted",
    "parse_box",
    "repainted",
    "slices",
    "squared_distances",
    "tiles",
]
