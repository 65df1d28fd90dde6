"""From a mask's location in a manifest to the pixels of an image that a pass repaints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from shared.masks.boxes import boxes_to_mask, parse_boxes
from shared.masks.fitting import prepare_mask
from shared.masks.morphology import Grey, Mask
from shared.masks.reading import HasAlpha, alpha_to_mask
from shared.params import Params, is_file


class MaskedImage(HasAlpha, Protocol):
    """What a mask needs to know of its image; ``DecodedImage`` has it."""

    @property
    def size(self) -> tuple[int, int]: ...


def load(
    location: str, image: MaskedImage, params: Params, *, read_file: Callable[[str], Grey]
) -> Mask:
    """Load the mask of one pass: (H, W) bool of the image's size, True = repaint.

    location: a file, ``alpha`` or ``box:...``. params: the pass's. read_file: returns the grey
    mask (``decode_mask``) of a file; a caller with many images of one mask can cache it.
    Raises MaskError, and what ``read_file`` and ``image`` raise.
    """
    if is_file(location):
        grey = read_file(location)
    elif location == "alpha":
        grey = alpha_to_mask(image)
    else:
        grey = boxes_to_mask(parse_boxes(location), image.size)
    return prepare_mask(
        grey,
        image.size,
        threshold=params.mask_threshold,
        dilation=params.mask_dilation,
        invert=params.mask_invert,
        fit=params.mask_fit,
    )
