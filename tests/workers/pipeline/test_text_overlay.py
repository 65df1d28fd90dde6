from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.errors import FontError, ParameterError
from shared.geometry.box import Box
from shared.images import DecodedImage
from shared.images.image import from_rgb, full_scale, has_alpha
from workers.pipeline.text_overlay import TextOverlay, built_in_font, draw_text, resolve_text_box

BOX = Box(20, 10, 180, 70)
MODES = ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "LA;16", "RGB;16", "RGBA;16"]
OUTSIDE = np.ones((80, 200), np.bool_)
OUTSIDE[10:70, 20:180] = False


def blank(mode: str, *, alpha: int = 255, grey: int = 255) -> DecodedImage:
    """A 200x80 image of one grey level, 0 to 255."""
    layers = [from_rgb(np.full((80, 200, 3), grey, np.float32), mode)]
    if has_alpha(mode):
        layers.append(np.full((80, 200, 1), alpha / 255 * full_scale(mode), np.float32))
    depth = np.bool_ if mode == "1" else np.uint16 if mode.endswith(";16") else np.uint8
    pixels = np.rint(np.concatenate(layers, axis=-1)).astype(depth)
    return DecodedImage(
        pixels=pixels[..., 0] if pixels.shape[-1] == 1 else pixels, mode=mode, format="PNG"
    )


def with_text(source: DecodedImage, text: str = "Sale", **options: Any) -> DecodedImage:
    return draw_text(source, TextOverlay(text=text, **({"box": BOX} | options)))


def changed(before: DecodedImage, after: DecodedImage) -> NDArray[np.bool_]:
    differs: NDArray[np.bool_] = before.pixels != after.pixels
    return differs if differs.ndim == 2 else differs.any(axis=-1)


@pytest.mark.parametrize("mode", MODES)
def test_text_is_drawn_in_every_mode_and_only_in_its_box(mode: str) -> None:
    before = blank(mode)
    after = with_text(before, color="black")
    assert (after.mode, after.pixels.dtype) == (mode, before.pixels.dtype)
    assert not (changed(before, after) & OUTSIDE).any()
    assert after.rgb()[~OUTSIDE].min() <= 1
    assert after.touched is not None
    assert np.array_equal(after.touched, changed(before, after))


def test_edges_are_blended_at_full_depth() -> None:
    values = np.unique(with_text(blank("I;16"), color="#00000055").pixels)
    assert len(values) > 10
    assert (values % 257 != 0).any()


def test_the_text_has_the_given_colour() -> None:
    after = with_text(blank("RGB"), "█", color="#c81e5a", size=50)
    assert tuple(after.pixels[40, 100]) == (200, 30, 90)
    half = with_text(blank("RGB"), "█", color="#00000080", size=50)
    assert tuple(half.pixels[40, 100]) == (127, 127, 127)


def test_pixels_touched_before_stay_touched() -> None:
    before = blank("L")
    first = np.zeros((80, 200), np.bool_)
    first[0, 0] = True
    after = with_text(before.replace(before.pixels.copy(), touched=first))
    assert after.touched is not None
    assert after.touched[0, 0]
    assert after.touched.sum() == 1 + changed(before, after).sum()


@pytest.mark.parametrize(("align", "first", "last"), [("left", 20, 60), ("right", 140, 180)])
def test_lines_are_aligned_in_the_box(align: str, first: int, last: int) -> None:
    after = with_text(blank("L"), "HHH\nH", size=20, align=align)
    columns = np.flatnonzero(changed(blank("L"), after).any(axis=0))
    nearest = columns[0] - 20 if align == "left" else 180 - 1 - columns[-1]
    assert nearest <= 3
    assert columns[-1] - columns[0] < 60


def test_text_is_centred_in_its_box() -> None:
    ink = changed(blank("L"), with_text(blank("L"), "H", size=20))
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert abs((rows[0] + rows[-1]) / 2 - 39.5) <= 1
    assert abs((columns[0] + columns[-1]) / 2 - 99.5) <= 1


# Transparency


@pytest.mark.parametrize("mode", ["LA", "RGBA", "LA;16", "RGBA;16"])
def test_text_on_a_transparent_image_is_opaque_without_dark_edges(mode: str) -> None:
    after = with_text(blank(mode, alpha=0, grey=0), color="white")
    alpha = after.alpha()
    assert alpha is not None
    assert alpha.max() == 255
    assert set(np.unique(after.rgb()[alpha > 0])) == {255}
    assert not alpha[OUTSIDE].any()


def test_an_opaque_image_stays_opaque() -> None:
    after = with_text(blank("RGBA", alpha=255))
    assert set(np.unique(after.alpha())) == {255}


def test_text_is_composited_over_half_transparent_pixels() -> None:
    after = with_text(blank("RGBA", alpha=100), "█", size=50, color="#00000080")
    red, *_, alpha = after.pixels[40, 100]
    opacity, behind = 128 / 255, 100 / 255
    together = opacity + behind * (1 - opacity)
    assert abs(alpha - 255 * together) <= 1
    assert abs(red - 255 * behind * (1 - opacity) / together) <= 1


# Boxes, colours, fonts


def test_the_box_is_the_masks_bounding_box_unless_given() -> None:
    mask = np.zeros((80, 200), np.bool_)
    mask[10:20, 30:40] = mask[50, 60] = True
    assert resolve_text_box("", mask) == Box(30, 10, 61, 51)
    assert resolve_text_box("1, 2,3,4", mask) == Box(1, 2, 3, 4)


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "5,5,5,9", ""])
def test_a_malformed_box_is_an_error(text: str) -> None:
    with pytest.raises(ParameterError, match="text_box"):
        resolve_text_box(text, np.zeros((8, 8), np.bool_))


def test_a_box_past_the_edge_is_clipped_and_one_outside_is_an_error() -> None:
    after = with_text(blank("L"), "H", box=Box(150, 40, 400, 300))
    assert after.touched is not None
    with pytest.raises(ParameterError, match="outside the 200x80 image"):
        with_text(blank("L"), box=Box(200, 0, 300, 80))


@pytest.mark.parametrize("color", ["blurple", "#12345", "#00000000"])
def test_a_malformed_colour_is_an_error(color: str) -> None:
    with pytest.raises(ParameterError, match="text_color"):
        with_text(blank("L"), color=color)


@pytest.mark.parametrize("damage", ["no font", "cut", "outlines", "tables"])
def test_a_damaged_font_is_an_error(damage: str) -> None:
    font = bytearray(built_in_font())
    if damage == "no font":
        font = bytearray(b"<html>not found</html>")
    elif damage == "cut":
        del font[200_000:]
    elif damage == "outlines":
        start = font.index(b"glyf")
        glyphs = int.from_bytes(font[start + 8 : start + 12])
        font[glyphs : glyphs + 400_000] = b"\x55" * 400_000
    else:
        font[font.index(b"hhea") : font.index(b"hhea") + 4] = b"none"
    with pytest.raises(FontError):
        with_text(blank("L"), font=bytes(font))


def test_a_blank_text_changes_nothing() -> None:
    before = blank("L")
    assert with_text(before, " ") is before


def test_the_built_in_font_has_its_licence() -> None:
    folder = Path(__file__).parents[3] / "workers" / "pipeline" / "fonts"
    assert "Bitstream Vera" in (folder / "LICENSE").read_text()
