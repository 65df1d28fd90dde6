"""Text drawn on an image after inpainting: diffusion models cannot write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from shared.errors import FontError, ParameterError
from shared.geometry.box import Box
from shared.images import Array, DecodedImage
from shared.masks import Mask, bounding_box, slices, tiles
from shared.params import TextAlign
from workers.pipeline.compositing import Weight, blend
from workers.pipeline.text_layout import TextLayout, typeset


@dataclass(frozen=True, kw_only=True)
class TextOverlay:
    """A text, its box and its style.

    text: words wrap to the box's width; a line break, or a backslash and an n, starts a new line.
    box: in image pixels; no pixel outside it changes. font: a font file's bytes; empty for the
    built-in DejaVu Sans (Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew, Arabic, many
    symbols; no Chinese, Japanese or Korean). size: pixels per em; 0 for the largest that fits.
    color: ``#rrggbb``, ``#rrggbbaa`` or a CSS name. align: horizontal; vertically the text is
    centred.
    """

    text: str
    box: Box
    font: bytes = b""
    size: int = 0
    color: str = "black"
    align: TextAlign = "center"


def resolve_text_box(text: str, mask: Mask) -> Box:
    """Parse ``left,top,right,bottom`` in pixels; an empty text means the mask's bounding box.

    Raises ParameterError.
    """
    if text.strip():
        return _parse_box(text)
    box = bounding_box(mask)
    if box is None:
        raise ParameterError("text_box: the mask is empty, so give left,top,right,bottom")
    return box


def _parse_box(text: str) -> Box:
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise ParameterError(
            f"text_box: {text!r} is not a box; write left,top,right,bottom in pixels"
        ) from None
    box = Box(left, top, right, bottom)
    if box.is_empty:
        raise ParameterError(
            f"text_box: {text!r} is empty; right must exceed left, and bottom exceed top"
        )
    return box


def draw_text(image: DecodedImage, overlay: TextOverlay) -> DecodedImage:
    """Draw the text, blended in the image's own mode and depth.

    Transparent pixels become as opaque as the text; opaque pixels stay opaque. Raises
    ParameterError, TextDoesNotFit, TextGlyphMissing, TextLayoutMissing and FontError.
    """
    box = overlay.box.clipped(image.size)
    if box.is_empty:
        raise ParameterError(
            f"text_box: {','.join(map(str, overlay.box))} lies outside the "
            f"{image.size[0]}x{image.size[1]} image"
        )
    colour, opacity = _parse_colour(overlay.color)
    try:
        layout = _lay_out(overlay, box)
        if layout is None:
            return image
        ink = np.asarray(layout.render(overlay.align, box.width))
    except OSError as error:  # raised by FreeType; no file is read here
        raise FontError(f"text_font: the font cannot be used: {error}") from error
    pixels = image.pixels.copy()
    top = box.top + (box.height - ink.shape[0]) // 2
    ink_box = Box(box.left, top, box.right, top + ink.shape[0])
    _blend_ink(pixels, image, ink_box, ink, colour, opacity)
    return image.replace(pixels, touched=_find_changed(image, pixels, ink_box))


def _lay_out(overlay: TextOverlay, box: Box) -> TextLayout | None:
    font = overlay.font or built_in_font()
    return typeset(overlay.text, font=font, size=overlay.size, box=box.size)


@cache
def built_in_font() -> bytes:
    return resources.files("workers.pipeline").joinpath("fonts/DejaVuSans.ttf").read_bytes()


def _parse_colour(text: str) -> tuple[NDArray[np.float32], float]:
    """(3,) RGB of 0 to 255, and the opacity, above 0 and up to 1."""
    try:
        red, green, blue, *alpha = ImageColor.getrgb(text.strip())
    except ValueError:
        raise ParameterError(
            f"text_color: {text!r} is not a colour; write #rrggbb, #rrggbbaa or a CSS name"
        ) from None
    opacity = alpha[0] / 255 if alpha else 1.0
    if opacity == 0:
        raise ParameterError(f"text_color: {text!r} is invisible; its last two digits are alpha")
    return np.array([red, green, blue], np.float32), opacity


def _blend_ink(
    pixels: Array,
    image: DecodedImage,
    ink_box: Box,
    ink: NDArray[np.uint8],
    colour: NDArray[np.float32],
    opacity: float,
) -> None:
    """Blend the colour into one box of the pixels. ink: (h, w), 255 = covered."""
    # Tile by tile: a box may be the whole image, and the weights are float32.
    for tile in tiles(ink_box):
        local = tile.moved(-ink_box.left, -ink_box.top)
        weight = ink[slices(local)] * np.float32(opacity / 255)
        if not weight.any():
            continue
        target, painted = pixels[slices(tile)], np.broadcast_to(colour, (*weight.shape, 3))
        if image.has_alpha:
            weight = _composite_alpha(target[..., -1], weight)
        blend(target, painted, weight, image.mode, profile=image.metadata.icc, fill_alpha=False)


def _composite_alpha(alpha: Array, weight: Weight) -> Weight:
    """Composite the text over alpha in place; return the text's share of the resulting colour.

    alpha: a view of the image's pixels. The operator ``over`` for colours that are not
    premultiplied by alpha (Porter and Duff, 1984):
    a = a_text + a_image * (1 - a_text), share = a_text / a.
    """
    opaque = np.float32(np.iinfo(alpha.dtype).max)
    combined = weight + alpha / opaque * (1 - weight)
    alpha[...] = np.rint(combined * opaque)
    return np.divide(weight, combined, out=np.zeros_like(weight), where=weight > 0)


def _find_changed(image: DecodedImage, pixels: Array, box: Box) -> Mask:
    """(H, W) the pixels that differ; only the box is compared."""
    differs = pixels[slices(box)] != image.pixels[slices(box)]
    changed = np.zeros(pixels.shape[:2], np.bool_)
    changed[slices(box)] = differs if differs.ndim == 2 else differs.any(axis=-1)
    return changed
