"""What a mask's drawing means: grey, in one colour, or on a transparent layer."""

from __future__ import annotations

import numpy as np

from shared.errors import ImageError, MaskError
from shared.images import DecodedImage, Pixels, decode
from shared.masks.morphology import Grey

_DARK = 64  # below it a pixel counts as black
_COLOURFUL = 64  # between the strongest and the weakest channel
_ODD_SHARE = 0.001  # of what is drawn; noise of lossy files
_HUE_SHARE = 0.02  # the same for colours, which JPEG smears over edges
_HUE_SAMPLES = 100_000


def decode_mask(data: bytes, *, max_pixels: int) -> Grey:
    """(H, W) uint8 grey, upright, 255 = repaint, from any picture that ``decode`` reads.

    White is repainted, black and transparent are kept; ``_to_grey`` says what else is read.
    Raises ObjectTooLarge as ``decode`` does, and MaskError for what it cannot read or what can
    be read in two ways.
    """
    try:
        picture = decode(data, max_pixels=max_pixels)
    except ImageError as error:
        raise MaskError(f"the mask: {error}") from error
    return _to_grey(picture)


def alpha_to_mask(picture: DecodedImage) -> Grey:
    """The mask in a picture's own alpha: the more transparent, the whiter.

    With the default threshold of 48, alpha below 208 is repainted. Raises MaskError where the
    picture has no alpha channel.
    """
    alpha = picture.alpha()
    if alpha is None:
        raise MaskError(
            f"the mask is 'alpha', but the {picture.format} has no alpha channel; give a mask"
        )
    return np.uint8(255) - alpha


def _to_grey(picture: DecodedImage) -> Grey:
    """(H, W) uint8, 255 = repaint: white is repainted, black and transparent are kept.

    A drawing in one colour, on black or on a transparent layer, counts by its shape alone. A
    lossless mask of 0 and 1 only, as programs write them, is one of 0 and 255. Raises
    MaskError for what can be read in two ways.
    """
    alpha = picture.alpha()
    if picture.pixels.dtype == np.uint16 and (strongest := int(picture.pixels.max())) < 256:
        grey = _faint(picture, strongest)
    elif alpha is None or (alpha == 255).all():
        grey = _opaque(picture.rgb())
    else:
        grey = _layer(picture.rgb(), alpha)
    if picture.encoding.lossless and grey.max() == 1:
        grey = grey * np.uint8(255)
    return np.ascontiguousarray(grey)


def _faint(picture: DecodedImage, strongest: int) -> Pixels:
    """A 16-bit mask whose values all fit into 8 bits; raises MaskError if they say nothing."""
    if strongest > 1:
        raise MaskError(
            f"the mask is 16-bit, but its brightest pixel is {strongest} of 65535; "
            "save it as 8-bit grey, or make white 65535"
        )
    height, width = picture.pixels.shape[:2]
    grey: Pixels = picture.pixels.reshape(height, width, -1).max(axis=2).astype(np.uint8)
    return grey


def _opaque(rgb: Pixels) -> Pixels:
    """(H, W) from (H, W, 3): grey as it is, one colour on black as if it were white."""
    if rgb.strides[2] == 0:  # one channel shown three times
        return rgb[..., 0]
    light = _light(rgb)
    drawn = rgb[light >= _DARK]
    if not _is_colourful(drawn):
        return light
    ink = _ink(drawn)
    if ink is None or len(drawn) == light.size:
        raise MaskError(
            "the mask has several colours, or no black; draw what is to be repainted in white, "
            "or in any one colour, on black, and save it without loss"
        )
    whitened: Pixels = np.minimum(light * np.float32(255 / ink), 255).astype(np.uint8)
    return whitened


def _layer(rgb: Pixels, alpha: Pixels) -> Pixels:
    """(H, W) from a transparent layer: white where it was drawn on most opaquely.

    Grey drawings count by their brightness too. Raises MaskError for black ones and for
    drawings in several colours.
    """
    strongest = int(alpha.max())
    drawn = rgb[alpha > strongest // 2]
    shape = alpha
    if _is_colourful(drawn):
        if _ink(drawn) is None:
            raise MaskError(
                "the mask has several colours on a transparent layer; draw in one colour what is "
                "to be repainted. For the picture's own transparent parts the mask is 'alpha'"
            )
    elif strongest and _light(drawn).max() < _DARK:
        raise MaskError(
            "the mask is black on a transparent layer, and both mean keep; draw what is to be "
            "repainted in white"
        )
    else:
        shape = (_light(rgb).astype(np.uint16) * alpha // 255).astype(np.uint8)
    return (shape.astype(np.uint16) * 255 // max(int(shape.max()), _DARK)).astype(np.uint8)


def _light(rgb: Pixels) -> Pixels:
    """The greatest channel, which for grey is any of them."""
    light: Pixels = np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    return light


def _is_colourful(drawn: Pixels) -> bool:
    """Whether (n, 3) pixels are more than grey ones with a little noise."""
    weakest = np.minimum(np.minimum(drawn[:, 0], drawn[:, 1]), drawn[:, 2])
    count = np.count_nonzero(_light(drawn) - weakest > _COLOURFUL)
    return bool(count > _ODD_SHARE * len(drawn))


def _ink(drawn: Pixels) -> int | None:
    """The brightness, 1 to 255, of the one colour that (n, 3) pixels have, lighter or darker.

    None where they have several: they lie off the line from black to their median colour.
    """
    sample = drawn[:: -(-len(drawn) // _HUE_SAMPLES)].astype(np.float32)
    median = np.median(sample, axis=0)
    if median.max() - median.min() <= _COLOURFUL:
        return None
    nearest = (sample @ median / (median @ median))[:, None] * median
    odd = np.count_nonzero(np.abs(sample - nearest).max(axis=1) > _COLOURFUL)
    return None if odd > _HUE_SHARE * len(sample) else int(median.max())
