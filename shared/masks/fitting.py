"""From a grey mask to the pixels of an image that are repainted."""

from __future__ import annotations

import numpy as np

from shared.errors import MaskSizeError
from shared.geometry.box import Box
from shared.masks.morphology import Grey, Mask, dilate, slices
from shared.params import MaskFit


def prepare_mask(
    grey: Grey,
    size: tuple[int, int],
    *,
    threshold: int,
    dilation: int = 0,
    invert: bool = False,
    fit: MaskFit = "exact",
) -> Mask:
    """Invert, fit, threshold and dilate a mask: (H, W) bool of an image of (width, height).

    dilation: the radius in pixels. Raises MaskSizeError.
    """
    # Inverted before it is fitted: pixels that a small mask does not cover stay unmasked in
    # either case. Fitted before the threshold: a lower threshold then always repaints more.
    oriented = np.uint8(255) - grey if invert else grey
    return dilate(apply_threshold(fit_to_size(oriented, size, fit), threshold=threshold), dilation)


def fit_to_size(mask: Grey, size: tuple[int, int], fit: MaskFit) -> Grey:
    """Fit a mask to an image of (width, height); returns (H, W).

    exact: the sizes must be equal. scale: the aspect ratios must be equal to within a pixel;
    each pixel becomes the maximum of those it overlaps, so that no thin stroke is lost.
    An anchor (``top-left`` to ``bottom-right``, ``center``): the mask is placed there
    unscaled, cropped if it is larger than the image and padded with 0 if it is smaller.
    Raises MaskSizeError.
    """
    width, height = mask.shape[1], mask.shape[0]
    if (width, height) == size:
        return mask
    if fit == "exact":
        raise MaskSizeError(
            f"the mask is {width}x{height}, the image {size[0]}x{size[1]}; "
            "make the mask the image's size, or set mask_fit to scale it or to align it"
        )
    if fit != "scale":
        return _align(mask, size, fit)
    if abs(width * size[1] - height * size[0]) > max(width, height, *size):
        raise MaskSizeError(
            f"the mask is {width}x{height} and cannot be scaled to {size[0]}x{size[1]} "
            "without distortion; align it, such as by mask_fit=center, or use a mask of that "
            "aspect ratio"
        )
    return _resample_max(_resample_max(mask, size[1], axis=0), size[0], axis=1)


def _align(mask: Grey, size: tuple[int, int], anchor: str) -> Grey:
    height, width = mask.shape
    left = _offset(size[0] - width, anchor, low="left", high="right")
    top = _offset(size[1] - height, anchor, low="top", high="bottom")
    aligned = np.zeros((size[1], size[0]), np.uint8)
    inside = Box(left, top, left + width, top + height).clipped(size)
    aligned[slices(inside)] = mask[slices(inside.moved(-left, -top))]
    return aligned


def _offset(excess: int, anchor: str, *, low: str, high: str) -> int:
    """The mask's first pixel in the image. excess: the image's length minus the mask's."""
    if low in anchor:
        return 0
    return excess if high in anchor else excess // 2


def _resample_max(mask: Grey, count: int, *, axis: int) -> Grey:
    """Resample an axis to ``count`` pixels, each the maximum of the pixels it overlaps."""
    length = mask.shape[axis]
    edges = np.arange(count + 1) * length
    first, last = edges[:-1] // count, -(-edges[1:] // count) - 1
    resampled: Grey = (
        np.maximum.reduceat(mask, first, axis) if count < length else mask.take(first, axis)
    )
    # reduceat stops before the next pixel's first; the two can share one.
    np.maximum(resampled, mask.take(last, axis), out=resampled)
    return resampled


def apply_threshold(grey: Grey, *, threshold: int) -> Mask:
    """(H, W) True where the grey value is at least the threshold."""
    return grey >= threshold
