"""Masks: read from a file, an alpha channel or boxes; fitted to an image; thresholded, dilated."""

from shared.masks.boxes import boxes_to_mask, parse_boxes
from shared.masks.fitting import apply_threshold, fit_to_size, prepare_mask
from shared.masks.loading import load
from shared.masks.morphology import (
    TILE_PX,
    Grey,
    Mask,
    bounding_box,
    dilate,
    slices,
    squared_distances,
    tiles,
)
from shared.masks.reading import alpha_to_mask, decode_mask, probe_mask

__all__ = [
    "TILE_PX",
    "Grey",
    "Mask",
    "alpha_to_mask",
    "apply_threshold",
    "bounding_box",
    "boxes_to_mask",
    "decode_mask",
    "dilate",
    "fit_to_size",
    "load",
    "parse_boxes",
    "prepare_mask",
    "probe_mask",
    "slices",
    "squared_distances",
    "tiles",
]
