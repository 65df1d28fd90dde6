"""From a grey mask to the pixels of an image that are repainted."""

from __future__ import annotations

import numpy as np

from shared.errors import MaskError
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
    """Which pixels of a (width, height) picture a mask repaints, (H, W) bool.

    In this order: inverted; laid over the image by ``fit_to_size``, so that what lies beside
    a small mask is kept either way; thresholded, so that a lower threshold always repaints
    more; grown by ``dilation`` pixels. Raises MaskError.
    """
    turned = np.uint8(255) - grey if invert else grey
    return dilate(apply_threshold(fit_to_size(turned, size, fit), threshold=threshold), dilation)


def fit_to_size(mask: Grey, size: tuple[int, int], fit: MaskFit) -> Grey:
    """The mask laid over a (width, height) picture, (H, W).

    exact: it must have that size. scale: it must have that shape, to a pixel; each pixel takes
    the brightest of those it stands for, so that no stroke is lost. An anchor (``top-left`` to
    ``bottom-right``, ``center``): pixel for pixel from there, cut off where the mask is larger
    than the picture, kept where it is smaller. Raises MaskError.
    """
    if fit == "exact":
        _check_size(mask, size)
    found = (mask.shape[1], mask.shape[0])
    if found == size:
        return mask
    if fit != "scale":
        return _anchored(mask, size, fit)
    if abs(found[0] * size[1] - found[1] * size[0]) > max(*found, *size):
        raise MaskError(
            f"the mask is {found[0]}x{found[1]} and cannot be scaled to {size[0]}x{size[1]} "
            "without distortion; use an anchor such as mask_fit=center, or a mask of that shape",
            code="mask_size",
        )
    return _brightest(_brightest(mask, size[1], axis=0), size[0], axis=1)


def _check_size(mask: Grey, size: tuple[int, int]) -> None:
    """Raises MaskError unless the mask has the picture's (width, height)."""
    found = (mask.shape[1], mask.shape[0])
    if found != size:
        raise MaskError(
            f"the mask is {found[0]}x{found[1]}, the picture {size[0]}x{size[1]}; "
            "make the mask the picture's size, or say with mask_fit how to lay it over",
            code="mask_size",
        )


def _anchored(mask: Grey, size: tuple[int, int], anchor: str) -> Grey:
    laid = np.zeros((size[1], size[0]), np.uint8)
    height, width = mask.shape
    left = _start(size[0] - width, anchor, low="left", high="right")
    top = _start(size[1] - height, anchor, low="top", high="bottom")
    inside = Box(left, top, left + width, top + height).clipped(size)
    laid[slices(inside)] = mask[slices(inside.moved(-left, -top))]
    return laid


def _start(room: int, anchor: str, *, low: str, high: str) -> int:
    if low in anchor:
        return 0
    return room if high in anchor else room // 2


def _brightest(mask: Grey, count: int, *, axis: int) -> Grey:
    """The mask with ``count`` pixels along the axis, each the greatest of those it overlaps."""
    length = mask.shape[axis]
    edges = np.arange(count + 1) * length
    first, last = edges[:-1] // count, -(-edges[1:] // count) - 1
    shrinks = count < length
    found: Grey = np.maximum.reduceat(mask, first, axis) if shrinks else mask.take(first, axis)
    np.maximum(found, mask.take(last, axis), out=found)
    return found


def apply_threshold(mask_grey: Grey, *, threshold: int) -> Mask:
    """(H, W) True where the grey is at the threshold or above."""
    return mask_grey >= threshold
