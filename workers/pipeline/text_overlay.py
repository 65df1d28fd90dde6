"""Lettering: real text drawn on a picture after inpainting, where a model would only scribble."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from shared.errors import ImageError, ParameterError
from shared.geometry.box import Box
from shared.images import Array, DecodedImage
from shared.masks import Mask, slices, tiles
from shared.params import TextAlign
from workers.pipeline.compositing import Weight, blend
from workers.pipeline.text_layout import TextLayout, typeset


@dataclass(frozen=True, kw_only=True)
class TextOverlay:
    """What is drawn, and where.

    text: words wrap to the box's width; a line break, or a backslash and an n, starts a new line.
    box: in picture pixels; none outside it changes. font: a font file's bytes; empty for the
    built-in one, DejaVu Sans: Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic, many
    symbols, no Chinese, Japanese or Korean. size: pixels to the em; 0 for the largest that fits.
    color: ``#rrggbb``, ``#rrggbbaa`` or a CSS name. align: vertically the text is centred.
    """

    text: str
    box: Box
    font: bytes = b""
    size: int = 0
    color: str = "black"
    align: TextAlign = "center"


def resolve_text_box(text: str, mask: Mask) -> Box:
    """``left,top,right,bottom`` in pixels, or the mask's bounding box where that is empty.

    Raises ParameterError.
    """
    if text.strip():
        return _parse_box(text)
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ParameterError("text_box: the mask is empty, so give left,top,right,bottom")
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _parse_box(text: str) -> Box:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise ParameterError(
            f"text_box: {text!r} is no box; write left,top,right,bottom in pixels"
        ) from None
    if left >= right or top >= bottom:
        raise ParameterError(
            f"text_box: {text!r} is empty; right must exceed left, and bottom exceed top"
        )
    return Box(left, top, right, bottom)


def draw_text(picture: DecodedImage, lettering: TextOverlay) -> DecodedImage:
    """The picture with the text on it, blended in its own mode and depth.

    Where the picture is transparent it becomes as opaque as the text; opaque stays opaque.
    Raises ParameterError, for a text with codes ``text_does_not_fit``, ``text_glyph_missing``
    and ``text_layout_missing``; ImageError with code ``bad_font``.
    """
    box = lettering.box.clipped(picture.size)
    if box.width <= 0 or box.height <= 0:
        raise ParameterError(
            f"text_box: {','.join(map(str, lettering.box))} lies outside the "
            f"{picture.size[0]}x{picture.size[1]} picture"
        )
    colour, opacity = _colour(lettering.color)
    try:
        setting = _setting(lettering, box)
        if setting is None:
            return picture
        ink = np.asarray(setting.image(lettering.align, box.width))
    except OSError as error:  # FreeType's, no file is read here
        raise ImageError(f"text_font: the font cannot be used: {error}", code="bad_font") from error
    pixels = picture.pixels.copy()
    top = box.top + (box.height - ink.shape[0]) // 2
    place = Box(box.left, top, box.right, top + ink.shape[0])
    _print(pixels, picture, place, ink, colour, opacity)
    return picture.replace(pixels, touched=_touched(picture, pixels, place))


def _setting(lettering: TextOverlay, box: Box) -> TextLayout | None:
    return typeset(
        lettering.text,
        font=lettering.font or built_in_font(),
        size=lettering.size,
        box=(box.width, box.height),
    )


@cache
def built_in_font() -> bytes:
    return resources.files("workers.pipeline").joinpath("fonts/DejaVuSans.ttf").read_bytes()


def _colour(text: str) -> tuple[NDArray[np.float32], float]:
    """(3,) RGB of 0 to 255, and an opacity above 0 up to 1."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text.strip())
    except ValueError:
        raise ParameterError(
            f"text_color: {text!r} is no colour; write #rrggbb, #rrggbbaa or a CSS name"
        ) from None
    opacity = alpha[0] / 255 if alpha else 1.0
    if opacity == 0:
        raise ParameterError(f"text_color: {text!r} is invisible; its last two digits are alpha")
    return np.array([red, green, blue], np.float32), opacity


def _print(
    pixels: Array,
    picture: DecodedImage,
    place: Box,
    ink: NDArray[np.uint8],
    colour: NDArray[np.float32],
    opacity: float,
) -> None:
    """Colours the pixels of one box, tile by tile. ink: (h, w), 255 = covered."""
    for tile in tiles(place):
        cover = ink[slices(tile.moved(-place.left, -place.top))] * np.float32(opacity / 255)
        if not cover.any():
            continue
        target = pixels[slices(tile)]
        painted = np.broadcast_to(colour, (*cover.shape, 3))
        if picture.has_alpha:
            cover = _over(target[..., -1], cover)
        blend(
            target,
            painted,
            cover,
            picture.mode,
            profile=picture.metadata.icc,
            fill_alpha=False,
        )


def _over(alpha: Array, cover: Weight) -> Weight:
    """Makes alpha, a view of the pixels, as opaque as both layers; the text's share of colour.

    Porter and Duff, 1984: over, for colours that are not multiplied by alpha.
    """
    full = np.float32(np.iinfo(alpha.dtype).max)
    behind = alpha / full
    opaque = cover + behind * (1 - cover)
    alpha[...] = np.rint(opaque * full)
    return np.divide(cover, opaque, out=np.zeros_like(cover), where=cover > 0)


def _touched(picture: DecodedImage, pixels: Array, place: Box) -> Mask:
    where = slices(place)
    differs = pixels[where] != picture.pixels[where]
    found = np.zeros(pixels.shape[:2], np.bool_)
    if picture.touched is not None:
        found |= picture.touched
    found[where] |= differs if differs.ndim == 2 else differs.any(axis=-1)
    return found
