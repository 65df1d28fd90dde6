"""Masks and where they come from: a picture, a picture's own alpha, or a box in the manifest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import MaskError
from shared.images import Picture, as_rgb, decode
from shared.regions import Box

Grey = NDArray[np.uint8]  # (H, W), 255 = repaint

_COLOURFUL = 64  # between the strongest and the weakest channel
_COLOURFUL_SHARE = 0.001


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """(H, W) uint8 grey, upright, 255 = repaint, from any picture that ``decode`` reads.

    Transparent parts of a mask count as black, that is as kept. Raises ImageError and
    ObjectTooLarge as ``decode`` does, and MaskError for a mask in colours, which nobody
    could tell to be light or dark.
    """
    picture = decode(data, max_pixels=max_pixels)
    if picture.mode in ("L", "LA", "1", "I;16"):
        grey = as_rgb(picture.pixels, picture.mode)[..., 0]
    else:
        grey = _grey(picture.rgb())
    alpha = picture.alpha()
    if alpha is not None and not (alpha == 255).all():
        grey = (grey.astype(np.uint16) * alpha // 255).astype(np.uint8)
    return np.ascontiguousarray(grey)


def _grey(rgb: Grey) -> Grey:
    """(H, W) from (H, W, 3); the greatest channel, which for grey is any of them."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    high = np.maximum(np.maximum(red, green), blue)
    spread = high - np.minimum(np.minimum(red, green), blue)
    if np.count_nonzero(spread > _COLOURFUL) > _COLOURFUL_SHARE * spread.size:
        raise MaskError("the mask has colours; save it in grey: white is repainted, black kept")
    return high


def alpha_mask(picture: Picture) -> Grey:
    """The mask in a picture's own alpha: the more transparent, the whiter.

    With the usual threshold of 128, alpha below 128 is repainted. Raises MaskError where the
    picture has no alpha channel.
    """
    alpha = picture.alpha()
    if alpha is None:
        raise MaskError(
            f"the mask is 'alpha', but the {picture.format} has no alpha channel; give a mask"
        )
    return np.uint8(255) - alpha


def parse_box(text: str) -> Box:
    """``box:left,top,right,bottom`` or without ``box:``; whole pixels, half open.

    Raises MaskError. Coordinates past an edge are allowed here: only the picture knows them.
    """
    try:
        left, top, right, bottom = (int(part) for part in text.removeprefix("box:").split(","))
    except ValueError:
        raise MaskError(f"{text!r} is no box; write box:left,top,right,bottom in pixels") from None
    if left >= right or top >= bottom:
        raise MaskError(f"{text!r} is empty; right must exceed left, and bottom exceed top")
    return Box(left, top, right, bottom)


def box_mask(box: Box, size: tuple[int, int]) -> Grey:
    """(H, W) mask of the part of the box inside the (width, height) picture.

    Raises MaskError where the box lies wholly outside.
    """
    inside = box.clipped(size)
    if inside.width <= 0 or inside.height <= 0:
        raise MaskError(
            f"the box {','.join(map(str, box))} lies outside the {size[0]}x{size[1]} picture"
        )
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[inside.top : inside.bottom, inside.left : inside.right] = 255
    return mask


def check_size(mask: Grey, size: tuple[int, int]) -> None:
    """Raises MaskError unless the mask has the picture's (width, height)."""
    found = (mask.shape[1], mask.shape[0])
    if found != size:
        raise MaskError(
            f"the mask is {found[0]}x{found[1]}, the picture {size[0]}x{size[1]}; "
            "make the mask the picture's size"
        )
