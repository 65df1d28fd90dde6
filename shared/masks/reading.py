"""From an image file or an alpha channel to a grey mask: what a drawing means."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from shared.errors import ImageError, MaskError
from shared.images import DecodedImage, Pixels, decode, probe
from shared.masks.morphology import Grey

_DARK = 64  # a pixel whose strongest channel is below counts as black
_COLOURFUL = 64  # difference between the strongest and the weakest channel
_NOISE_SHARE = 0.001  # share of the drawn pixels that may be noise of a lossy file
_HUE_NOISE_SHARE = 0.02  # the same for hues, which JPEG smears over edges
_HUE_SAMPLES = 100_000


class HasAlpha(Protocol):
    def alpha(self) -> Grey | None: ...


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """Decode any image that ``images.decode`` reads into a mask: (H, W), upright, 255 = repaint.

    White is repainted; black and transparent are kept. A drawing in one colour, on black or on
    a transparent layer, counts by its shape alone. Raises ObjectTooLarge as ``decode`` does,
    and MaskError for files that cannot be read and for ambiguous drawings.
    """
    try:
        image = decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise MaskError(f"the mask: {error}") from error
    return _to_grey(image)


def probe_mask(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a mask file, from its header; raises as ``decode_mask`` does."""
    try:
        return probe(data, max_pixels=max_pixels)
    except ImageError as error:
        raise MaskError(f"the mask: {error}") from error


def alpha_to_mask(image: HasAlpha) -> Grey:
    """The inverse of an image's alpha: 255 where it is fully transparent.

    With the default threshold of 48, alpha below 208 is repainted. Raises MaskError if the
    image has no alpha channel.
    """
    alpha = image.alpha()
    if alpha is None:
        raise MaskError(
            "the mask is 'alpha', but the image has no alpha channel; give a mask file or a box"
        )
    return np.uint8(255) - alpha


def _to_grey(image: DecodedImage) -> Grey:
    alpha = image.alpha()
    if image.pixels.dtype == np.uint16 and (maximum := int(image.pixels.max())) < 256:
        grey = _read_dark_16_bit(image, maximum)
    elif alpha is None or (alpha == 255).all():
        grey = _read_opaque(image.rgb())
    else:
        grey = _read_layer(image.rgb(), alpha)
    # Programs write masks of 0 and 1. In a lossy file a 1 is noise.
    if image.encoding.lossless and grey.max() == 1:
        grey = grey * np.uint8(255)
    return np.ascontiguousarray(grey)


def _read_dark_16_bit(image: DecodedImage, maximum: int) -> Pixels:
    """(H, W) from a 16-bit mask of 0 and 1; raises MaskError if the values look like 8 bits."""
    if maximum > 1:
        raise MaskError(
            f"the mask is 16-bit, but its brightest pixel is {maximum} of 65535; "
            "save it as 8-bit grey, or make white 65535"
        )
    height, width = image.pixels.shape[:2]
    grey: Pixels = image.pixels.reshape(height, width, -1).max(axis=2).astype(np.uint8)
    return grey


def _read_opaque(rgb: Pixels) -> Pixels:
    """(H, W) from (H, W, 3): grey unchanged; one colour on black scaled to white."""
    if rgb.strides[2] == 0:  # a grey image, broadcast to three channels
        return rgb[..., 0]
    brightness = _brightness(rgb)
    drawn = rgb[brightness >= _DARK]
    if not _is_colourful(drawn):
        return brightness
    ink = _ink_brightness(drawn)
    if ink is None or len(drawn) == brightness.size:
        raise MaskError(
            "the mask has several colours, or no black; draw the area to repaint in white, "
            "or in any one colour, on black, and save it without loss"
        )
    whitened: Pixels = np.minimum(brightness * np.float32(255 / ink), 255).astype(np.uint8)
    return whitened


def _read_layer(rgb: Pixels, alpha: Pixels) -> Pixels:
    """(H, W) from a drawing on a transparent layer: alpha, scaled so that its maximum is white.

    A grey drawing counts by brightness times alpha. Raises MaskError for black drawings and
    for drawings in several colours.
    """
    maximum = int(alpha.max())
    drawn = rgb[alpha > maximum // 2]
    shape = alpha
    if _is_colourful(drawn):
        if _ink_brightness(drawn) is None:
            raise MaskError(
                "the mask has several colours on a transparent layer; draw the area to repaint "
                "in one colour. To repaint the image's own transparent parts, use mask 'alpha'"
            )
    elif maximum and _brightness(drawn).max() < _DARK:
        raise MaskError(
            "the mask is black on a transparent layer, and both mean keep; draw the area to "
            "repaint in white"
        )
    else:
        shape = (_brightness(rgb).astype(np.uint16) * alpha // 255).astype(np.uint8)
    return (shape.astype(np.uint16) * 255 // max(int(shape.max()), _DARK)).astype(np.uint8)


def _brightness(rgb: Pixels) -> Pixels:
    """The maximum of the channels (V of HSV)."""
    # Two calls of maximum: max(axis=-1) over three channels is several times slower.
    brightness: Pixels = np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    return brightness


def _is_colourful(drawn: Pixels) -> bool:
    """Whether more of the (n, 3) pixels are coloured than noise explains."""
    weakest = np.minimum(np.minimum(drawn[:, 0], drawn[:, 1]), drawn[:, 2])
    count = np.count_nonzero(_brightness(drawn) - weakest > _COLOURFUL)
    return bool(count > _NOISE_SHARE * len(drawn))


def _ink_brightness(drawn: Pixels) -> int | None:
    """The brightness, 1 to 255, of the one colour of (n, 3) pixels in lighter and darker shades.

    None if they have several colours: too many lie off the line from black to the median.
    """
    sample = drawn[:: -(-len(drawn) // _HUE_SAMPLES)].astype(np.float32)
    median = np.median(sample, axis=0)
    if median.max() - median.min() <= _COLOURFUL:
        return None
    projected = (sample @ median / (median @ median))[:, None] * median
    off_line = np.count_nonzero(np.abs(sample - projected).max(axis=1) > _COLOURFUL)
    return None if off_line > _HUE_NOISE_SHARE * len(sample) else int(median.max())
