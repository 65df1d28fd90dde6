from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared import images, masks
from shared.errors import MaskError, MaskSizeError
from shared.masks import Grey
from shared.params import MaskFit, Params

LIMIT = 10_000_000
MASK = np.zeros((100, 150), np.uint8)
MASK[20:40, 30:60] = 255
TEXT = Image.new("L", (300, 200))
ImageDraw.Draw(TEXT).text((10, 50), "Sample", fill=255, font=ImageFont.load_default(80))
WRITTEN = np.asarray(TEXT)


def save(pixels: NDArray[Any] | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(pixels: NDArray[Any] | Image.Image, format: str = "PNG", **options: Any) -> Grey:
    return masks.decode_mask(save(pixels, format, **options), max_pixels=LIMIT)


def in_colour(ink: tuple[int, ...], ground: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    return Image.composite(
        Image.new("RGB", TEXT.size, ink), Image.new("RGB", TEXT.size, ground), TEXT
    )


def layer(ink: tuple[int, int, int], alpha: NDArray[np.uint8] = MASK) -> NDArray[np.uint8]:
    """(h, w, 4): a drawing in one colour with that alpha."""
    return np.dstack([np.full((*alpha.shape, 3), ink, np.uint8), alpha])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK"])
def test_a_mask_is_read_from_any_mode(mode: str) -> None:
    image = Image.fromarray(MASK)
    if mode == "I;16":
        image = Image.fromarray(MASK.astype(np.uint16) * 257)
    elif mode == "CMYK":
        image = image.convert("RGB").convert("CMYK")
    else:
        image = image.convert("LA").convert(mode) if mode == "LA" else image.convert(mode)
    assert np.array_equal(read(image, "TIFF" if mode == "CMYK" else "PNG"), MASK)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_tiff_whose_zero_is_white_is_read_as_displayed(mode: str) -> None:
    stored = save(Image.fromarray(MASK).convert(mode), "TIFF", tiffinfo={262: 0})
    shown = np.asarray(Image.open(io.BytesIO(stored)).convert("L"))
    assert np.array_equal(masks.decode_mask(stored, max_pixels=LIMIT), shown)
    assert shown[30, 40] != shown[0, 0]


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(read(np.ascontiguousarray(np.rot90(MASK)), exif=exif), MASK)


def test_jpeg_noise_around_black_and_white_does_not_pass_the_threshold() -> None:
    mask = masks.apply_threshold(read(TEXT.convert("RGB"), "JPEG", quality=60), threshold=128)
    assert np.count_nonzero(mask != (WRITTEN >= 128)) < 0.01 * np.count_nonzero(WRITTEN)
    assert not mask[:40].any()


def test_the_default_threshold_includes_the_soft_edge_of_a_faint_mark() -> None:
    """The opacity of a faint mark, saved as its mask, has no white."""
    faint = (WRITTEN * 0.4).astype(np.uint8)
    missed = faint[~masks.apply_threshold(faint, threshold=Params().mask_threshold)]
    assert missed.sum() < 0.03 * faint.sum()


@pytest.mark.parametrize("pixels", [MASK // 255, (MASK // 255).astype(np.uint16)])
def test_a_mask_of_0_and_1_is_read_as_0_and_255(pixels: NDArray[Any]) -> None:
    assert np.array_equal(read(pixels), MASK)


@pytest.mark.parametrize("ink", [(1, 1, 1), (1, 0, 0)])
def test_a_mask_in_16_bit_colour_is_read_like_one_in_8(ink: tuple[int, int, int]) -> None:
    deep = MASK[..., None] * np.array(ink, np.uint16) * np.uint16(257)
    file = images.encode(images.DecodedImage(pixels=deep, mode="RGB;16", format="PNG"))
    assert np.array_equal(masks.decode_mask(file, max_pixels=LIMIT), MASK)


def test_8_bit_values_in_16_bits_are_refused() -> None:
    with pytest.raises(MaskError, match="255 of 65535"):
        read(MASK.astype(np.uint16))


INKS = {"red": (255, 0, 0), "maroon": (128, 0, 0), "blue": (0, 0, 255), "pink": (255, 0, 160)}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("JPEG", {"quality": 80})])
def test_one_colour_on_black_counts_as_white(
    ink: str, format: str, options: dict[str, Any]
) -> None:
    mask = read(in_colour(INKS[ink]), format, **options) >= 128
    assert np.count_nonzero(mask != (WRITTEN >= 128)) < 0.05 * np.count_nonzero(WRITTEN)


def test_a_palette_of_one_colour_and_black_is_a_mask() -> None:
    labels = Image.fromarray(MASK // 255).convert("P")
    labels.putpalette([0, 0, 0, 128, 0, 0])
    assert np.array_equal(read(labels), MASK)


def two_labels() -> Image.Image:
    classes = (MASK // 255).copy()
    classes[60:70, 30:60] = 2
    image = Image.fromarray(classes).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return image


@pytest.mark.parametrize(
    "image",
    [
        two_labels(),
        in_colour((255, 0, 0), (255, 255, 255)),
        in_colour((255, 0, 0), (0, 0, 255)),
        Image.new("RGB", (20, 10), (255, 0, 0)),
    ],
)
def test_a_mask_with_several_colours_or_without_black_is_refused(image: Image.Image) -> None:
    with pytest.raises(MaskError, match=r"several colours, or no black; draw .* white"):
        read(image)


@pytest.mark.parametrize("ink", [(255, 255, 255), (255, 0, 0), (0, 90, 200)])
@pytest.mark.parametrize("opacity", [255, 100])
def test_a_drawing_on_a_transparent_layer_counts_by_its_shape(
    ink: tuple[int, int, int], opacity: int
) -> None:
    drawn = (MASK // 255) * np.uint8(opacity)
    assert np.array_equal(read(layer(ink, drawn)), MASK)


def test_a_grey_layer_counts_by_its_brightness_too() -> None:
    half = layer((255, 255, 255))
    half[30:, :, :3] = 0
    expected = MASK.copy()
    expected[30:] = 0
    assert np.array_equal(read(half), expected)


def test_an_ambiguous_layer_is_refused() -> None:
    with pytest.raises(MaskError, match="black on a transparent layer"):
        read(layer((0, 0, 0)))
    colours = layer((255, 0, 0))
    colours[30:, :, :3] = (0, 0, 255)
    with pytest.raises(MaskError, match=r"several colours on a transparent layer.*'alpha'"):
        read(colours)


def test_an_empty_layer_is_an_empty_mask() -> None:
    assert not read(layer((0, 0, 0), np.zeros_like(MASK))).any()


def test_the_alpha_mask_is_the_inverse_of_alpha() -> None:
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :, 3] = [0, 127, 128, 255]
    grey = masks.alpha_to_mask(images.decode(save(pixels), max_pixels=LIMIT))
    assert masks.apply_threshold(grey, threshold=128).tolist() == [[True, True, False, False]]
    with pytest.raises(MaskError, match="no alpha"):
        masks.alpha_to_mask(images.decode(save(MASK), max_pixels=LIMIT))


def boxed(text: str, size: tuple[int, int]) -> Grey:
    return masks.boxes_to_mask(masks.parse_boxes(text), size)


BOXES = {
    "box:1,2,3,4": [(1, 2, 3, 4)],
    "1,2,3,4": [(1, 2, 3, 4)],
    "box: 1, 2, 3, 4": [(1, 2, 3, 4)],
    "box:-5,2,3,900": [(0, 2, 3, 10)],
    "box:0,0,5,5;box:10,5,20,10": [(0, 0, 5, 5), (10, 5, 20, 10)],
    "box:0,0,5,5; 10,5,20,10": [(0, 0, 5, 5), (10, 5, 20, 10)],
    "box:75%,50%,100%,100%": [(15, 5, 20, 10)],
    "box:12.4%,0,12.6%,100%": [(2, 0, 3, 10)],
    "box:0,0,100%,3": [(0, 0, 20, 3)],
}


@pytest.mark.parametrize("text", BOXES)
def test_boxes_are_pixels_or_percent_clipped_to_the_image(text: str) -> None:
    expected = np.zeros((10, 20), np.uint8)
    for left, top, right, bottom in BOXES[text]:
        expected[top:bottom, left:right] = 255
    assert np.array_equal(boxed(text, (20, 10)), expected)


@pytest.mark.parametrize(
    "text",
    ["box:1,2,3", "box:", "box:1,2,1,4", "box:1,5,3,4", "1,2,3,4.5", "box:50%,0,10%,9", "1,2,3,4;"],
)
def test_a_malformed_box_is_refused(text: str) -> None:
    with pytest.raises(MaskError):
        masks.parse_boxes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("box:20,0,22,8", "lies outside the 20x10 image"),
        ("box:-9,-9,-1,-1", "count from the left and the top"),
        ("box:0,0,5,5;box:15,0,50%,5", "is empty in the 20x10"),
    ],
)
def test_a_box_outside_the_image_is_refused(text: str, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        boxed(text, (20, 10))


def test_an_inverted_box_masks_everything_outside_the_box() -> None:
    grey = boxed("box:0,0,5,5", (20, 10))
    mask = masks.prepare_mask(grey, (20, 10), threshold=128, invert=True)
    assert np.array_equal(mask, grey == 0)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(MaskSizeError, match=r"150x100, the image 100x150.*mask_fit"):
        masks.prepare_mask(MASK, (100, 150), threshold=128)


ANCHORED: dict[MaskFit, tuple[int, int]] = {
    "top-left": (0, 0),
    "top": (75, 0),
    "top-right": (150, 0),
    "left": (0, 50),
    "center": (75, 50),
    "right": (150, 50),
    "bottom-left": (0, 100),
    "bottom": (75, 100),
    "bottom-right": (150, 100),
}


@pytest.mark.parametrize("fit", ANCHORED)
@pytest.mark.parametrize("invert", [False, True])
def test_a_smaller_mask_is_placed_unscaled_at_its_anchor(fit: MaskFit, invert: bool) -> None:
    left, top = ANCHORED[fit]
    small = np.full((200, 300), 0, np.uint8)
    small[top : top + 100, left : left + 150] = 255 - MASK if invert else MASK
    mask = masks.prepare_mask(MASK, (300, 200), threshold=128, invert=invert, fit=fit)
    assert np.array_equal(mask, small == 255)
    back = masks.fit_to_size(small, (150, 100), fit)
    assert np.array_equal(back, small[top : top + 100, left : left + 150])


@st.composite
def scalings(draw: st.DrawFn) -> tuple[Grey, tuple[int, int]]:
    """A mask with a few pixels, and the size of an image with its aspect ratio."""
    width, height = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(draw(st.integers(1, 4))):
        mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 255
    up, down = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return mask, (max(width * up // down, 1), max(height * up // down, 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scalings())
def test_scaling_loses_no_stroke(case: tuple[Grey, tuple[int, int]]) -> None:
    mask, (width, height) = case
    scaled = masks.fit_to_size(mask, (width, height), "scale")
    expected = np.zeros((height, width), np.bool_)
    for y, x in np.argwhere(mask):
        rows = slice(y * height // len(mask), -(-(y + 1) * height // len(mask)))
        columns = slice(x * width // mask.shape[1], -(-(x + 1) * width // mask.shape[1]))
        expected[rows, columns] = True
    assert np.array_equal(scaled == 255, expected)


def test_scaling_accepts_a_rounded_aspect_ratio_and_refuses_another() -> None:
    assert masks.fit_to_size(np.zeros((133, 200), np.uint8), (6000, 4000), "scale").shape == (
        4000,
        6000,
    )
    with pytest.raises(MaskSizeError, match=r"200x130 .* 6000x4000 without distortion"):
        masks.fit_to_size(np.zeros((130, 200), np.uint8), (6000, 4000), "scale")


def test_thin_black_lines_survive_inversion_and_scaling() -> None:
    white = np.full((400, 600), 255, np.uint8)
    white[200] = 0
    mask = masks.prepare_mask(white, (60, 40), threshold=128, invert=True, fit="scale")
    assert np.flatnonzero(mask.all(axis=1)).tolist() == [20]
    assert np.count_nonzero(mask) == 60


@pytest.mark.parametrize("px", [1, 2, 5, 17, 40])
def test_dilation_is_the_exact_disc(px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks.morphology, "TILE_PX", 32)
    mask = np.random.default_rng(px).random((90, 110)) < 0.002
    y, x = np.nonzero(mask)
    rows, columns = np.mgrid[:90, :110]
    near = ((rows[..., None] - y) ** 2 + (columns[..., None] - x) ** 2).min(-1) <= px * px
    assert np.array_equal(masks.dilate(mask, px), near)


def test_the_bounding_box_is_the_smallest_that_holds_the_mask() -> None:
    assert masks.bounding_box(MASK > 0) == (30, 20, 60, 40)
    assert masks.bounding_box(np.zeros((4, 4), np.bool_)) is None


def test_a_mask_is_loaded_from_a_file_from_alpha_and_from_boxes() -> None:
    image = images.decode(save(layer((9, 9, 9), 255 - MASK)), max_pixels=LIMIT)
    expected = masks.dilate(MASK > 0, 3)
    for location in ("mask.png", "alpha", "box:30,20,60,40"):
        loaded = masks.load(location, image, Params(mask_dilation=3), read_file=lambda _: MASK)
        assert np.array_equal(loaded, expected), location
