from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from shared import images
from shared.errors import FidelityError
from shared.geometry.box import Box
from shared.geometry.regions import Region, plan
from shared.masks import dilate
from shared.params import Mode, Params
from tests.benchmarks import compositing
from workers.pipeline import compositing as under_test
from workers.pipeline.compositing import composite, cut

DEEP = ["I;16", "LA;16", "RGB;16", "RGBA;16"]
MODES = ["1", "L", "LA", "RGB", "RGBA", "CMYK", *DEEP]
ROCKET = data.rocket()[:300, :400]
WHEEL = Box(60, 80, 180, 160)


def decoded(mode: str, rgb: NDArray[np.uint8] = ROCKET) -> images.DecodedImage:
    eight_bits = {"I;16": "L"}.get(mode, mode.partition(";")[0])
    image = Image.fromarray(rgb).convert("L" if eight_bits == "LA" else eight_bits)
    if eight_bits in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    buffer = io.BytesIO()
    if mode in DEEP:
        buffer.write(imagecodecs.png_encode(np.asarray(image).astype(np.uint16) * 257))
    else:
        image.save(buffer, "TIFF")
    return images.decode(buffer.getvalue(), max_pixels=10**8)


def marked(shape: tuple[int, ...], *boxes: Box) -> NDArray[np.bool_]:
    mask = np.zeros(shape[:2], np.bool_)
    for box in boxes:
        mask[box.top : box.bottom, box.left : box.right] = True
    return mask


def inpainted(
    source: images.DecodedImage,
    mask: NDArray[np.bool_],
    *,
    mode: Mode = "auto",
    any_size: bool = False,
    paint: Any = lambda image, mask: np.where(mask[..., None] > 0, 99, image),
    fill_alpha: bool = False,
    **params: Any,
) -> images.DecodedImage:
    """The image after an engine that computes ``paint``: grey 99 in the mask by default."""
    settings = Params(**params)
    dilated = dilate(mask, settings.mask_dilation)
    regions = plan(dilated, mode=mode, window=(512, 512), any_size=any_size)
    cuts = [cut(source.rgb(), dilated, region) for region in regions]
    results = [paint(image, region_mask).astype(np.uint8) for image, region_mask in cuts]
    return composite(source, dilated, regions, results, settings, fill_alpha=fill_alpha)


def changed(before: images.DecodedImage, after: images.DecodedImage) -> NDArray[np.bool_]:
    differs = before.pixels != after.pixels
    return differs if differs.ndim == 2 else differs.any(axis=-1)


# Pasting


@pytest.mark.parametrize("mode", MODES)
def test_only_masked_pixels_change_in_every_mode(mode: str) -> None:
    before, mask = decoded(mode), marked(ROCKET.shape, WHEEL)
    after = inpainted(before, mask, paint=lambda image, mask: np.full_like(image, 99))
    assert not (changed(before, after) & ~mask).any()
    assert changed(before, after).any()
    assert (after.mode, after.pixels.dtype) == (before.mode, before.pixels.dtype)


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        *[("L", 99), ("LA", 99), ("RGB", 99), ("RGBA", 99), ("1", False)],
        *[(mode, 99 * 257) for mode in DEEP],
    ],
)
def test_masked_pixels_take_the_engines_value(mode: str, value: int) -> None:
    before = decoded(mode)
    after = inpainted(before, marked(ROCKET.shape, WHEEL), any_size=True)
    inside = after.pixels[WHEEL.top : WHEEL.bottom, WHEEL.left : WHEEL.right]
    colours = inside[..., :-1] if before.has_alpha else inside
    assert (colours == value).all()


def test_cmyk_takes_the_engines_colour() -> None:
    after = inpainted(decoded("CMYK"), marked(ROCKET.shape, WHEEL), any_size=True)
    inside = after.rgb()[WHEEL.top : WHEEL.bottom, WHEEL.left : WHEEL.right]
    assert np.abs(inside.astype(int) - 99).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "LA;16", "RGBA;16"])
def test_alpha_is_unchanged_unless_transparent_parts_are_filled(mode: str) -> None:
    before, mask = decoded(mode), marked(ROCKET.shape, WHEEL)
    unfilled = inpainted(before, mask, mask_feather=8)
    assert np.array_equal(unfilled.alpha(), before.alpha())
    filled = inpainted(before, mask, mask_feather=8, fill_alpha=True)
    assert (filled.alpha()[mask] == 255).all()
    outside = ~dilate(mask, 8)
    assert np.array_equal(filled.alpha()[outside], before.alpha()[outside])


@pytest.mark.parametrize("any_size", [True, False])
@pytest.mark.parametrize("mode", ["auto", "tile", "full"])
def test_an_engine_that_returns_its_input_leaves_the_image_unchanged(
    mode: Mode, any_size: bool
) -> None:
    before, mask = decoded("RGB"), marked(ROCKET.shape, WHEEL, Box(390, 290, 400, 300))
    same = inpainted(before, mask, mode=mode, any_size=any_size, paint=lambda image, _: image)
    if any_size or mode == "tile":
        assert same.touched is None
    difference = np.abs(same.pixels.astype(int) - before.pixels)
    assert difference.mean() < 0.5


def test_the_old_mark_does_not_leak_into_the_feather() -> None:
    rgb = np.full((300, 400, 3), 120, np.uint8)
    rgb[WHEEL.top : WHEEL.bottom, WHEEL.left : WHEEL.right] = 255
    after = inpainted(
        decoded("RGB", rgb),
        marked(rgb.shape, WHEEL),
        mask_feather=6,
        paint=lambda image, _: np.full_like(image, 120),
    )
    assert (after.pixels == 120).all()


def test_a_result_fades_out_over_the_feather() -> None:
    rgb = np.full((300, 400, 3), 100, np.uint8)
    row = WHEEL.top + 40
    after = inpainted(
        decoded("RGB", rgb),
        marked(rgb.shape, WHEEL),
        mask_feather=4,
        paint=lambda image, mask: np.where(dilate(mask > 0, 40)[..., None], 200, image),
    )
    # The colour fit sees 200 where 100 is known and subtracts its limit of 24.
    ramp = after.pixels[row, WHEEL.right - 1 : WHEEL.right + 6, 0].astype(int)
    assert (np.diff(ramp) <= 0).all()
    assert ramp[0] > ramp[2] > ramp[4] > 100
    assert ramp[5:].tolist() == [100, 100]


def test_a_wide_feather_ends_inside_its_region() -> None:
    rgb = np.full((600, 600, 3), 100, np.uint8)
    mask = marked(rgb.shape, Box(300, 300, 310, 310))
    # Stripes with the same mean, so that the colour fit does not remove them.
    stripes = np.where(np.arange(600) % 2, 140, 60)
    before = decoded("RGB", rgb)
    after = inpainted(
        before,
        mask,
        any_size=True,
        mask_feather=200,
        paint=lambda image, _: np.broadcast_to(stripes[: image.shape[1], None], image.shape),
    )
    height = np.abs(after.pixels[305, 310:345, 0].astype(int) - 100)
    assert height[0] > 35
    assert height[31] <= 1
    assert np.diff(height).max() <= 0
    assert not (changed(before, after) & ~marked(mask.shape, Box(268, 268, 342, 342))).any()


def test_a_feather_continues_to_the_edge_of_the_image() -> None:
    rgb = np.full((200, 300, 3), 100, np.uint8)
    before = decoded("RGB", rgb)
    mask = marked(rgb.shape, Box(10, 60, 290, 140))
    after = inpainted(
        before,
        mask,
        any_size=True,
        mask_feather=30,
        colour_fit="off",
        paint=lambda image, _: np.full_like(image, 200),
    )
    assert after.pixels[100, [0, -1], 0].tolist() == [168, 168]  # 10 of 31 pixels out


def test_uneven_light_is_corrected_across_tiles() -> None:
    rgb = np.full((120, 1400, 3), 120, np.uint8)
    light = np.linspace(-15, 15, 1400)[None, :, None]
    after = inpainted(
        decoded("RGB", rgb),
        marked(rgb.shape, Box(40, 50, 1360, 70)),
        any_size=True,
        paint=lambda image, _: np.rint(image + light[:, 8 : 8 + image.shape[1]]),
    )
    assert np.abs(after.pixels.astype(int) - 120).max() <= 2


def test_exactly_the_dilated_mask_is_painted() -> None:
    before, mask = decoded("RGB", np.full((300, 400, 3), 10, np.uint8)), marked(ROCKET.shape, WHEEL)
    after = inpainted(
        before, mask, mask_dilation=5, paint=lambda image, _: np.full_like(image, 200)
    )
    assert np.array_equal(changed(before, after), dilate(mask, 5))


def test_full_mode_scales_down_and_back() -> None:
    after = inpainted(decoded("RGB"), marked(ROCKET.shape, WHEEL), mode="full")
    inside = after.pixels[WHEEL.top + 4 : WHEEL.bottom - 4, WHEEL.left + 4 : WHEEL.right - 4]
    assert np.abs(inside.astype(int) - 99).max() <= 1


def test_results_are_pasted_where_their_regions_were_cut() -> None:
    marks = [Box(3, 3, 20, 20), Box(700, 40, 720, 60), Box(1380, 580, 1400, 600)]
    rgb = np.random.default_rng(0).integers(0, 255, (600, 1400, 3), dtype=np.uint8)
    after = inpainted(decoded("RGB", rgb), marked(rgb.shape, *marks), paint=lambda i, _: 255 - i)
    for mark in marks:
        where = (slice(mark.top, mark.bottom), slice(mark.left, mark.right))
        correlation = np.corrcoef(after.pixels[where].ravel(), 255 - rgb[where].ravel())[0, 1]
        assert correlation > 0.99


def test_without_regions_the_image_is_unchanged() -> None:
    before = decoded("RGB")
    after = composite(before, marked(ROCKET.shape), (), (), Params())
    assert after.touched is None
    assert images.encode(after) == before.source


def test_touched_holds_the_pixels_that_differ() -> None:
    before, mask = decoded("L"), marked(ROCKET.shape, WHEEL)
    after = inpainted(before, mask)
    assert after.touched is not None
    assert np.array_equal(after.touched, changed(before, after))


# Changes outside the mask are detected


def test_a_changed_pixel_outside_the_mask_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    original = under_test._feather_weights

    def too_wide(*args: Any, **options: Any) -> Any:
        weight = original(*args, **options)
        weight[0, 0] = 1
        return weight

    monkeypatch.setattr(under_test, "_feather_weights", too_wide)
    with pytest.raises(FidelityError, match="outside the mask"):
        inpainted(
            decoded("RGB"),
            marked(ROCKET.shape, WHEEL),
            any_size=True,
            paint=lambda image, _: np.full_like(image, 99),
        )


def test_a_changed_alpha_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    original = under_test.blend

    def blend_alpha(*args: Any, **options: Any) -> None:
        original(*args, **options | {"fill_alpha": True})

    monkeypatch.setattr(under_test, "blend", blend_alpha)
    with pytest.raises(FidelityError, match="alpha"):
        inpainted(decoded("RGBA"), marked(ROCKET.shape, WHEEL))


# Compared with other tools


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("rocket", slice(80, 240), slice(100, 300)), ("coffee", slice(80, 240), slice(60, 260))],
)
def test_our_paste_is_as_good_as_other_tools(name: str, rows: slice, columns: slice) -> None:
    crop = compositing.photograph(name)[rows, columns]
    measured = [compositing.measure(case) for case in compositing.cases(crop)]
    mean = {
        method: compositing.mean_scores(scores[method] for scores in measured)
        for method in compositing.METHODS
    }
    for peer in compositing.PEERS:
        assert mean["ours"].is_as_good_as(mean[peer]) == (True, True, True), peer


def test_our_paste_changes_nothing_past_dilation_and_feather() -> None:
    for case in compositing.cases(compositing.photograph("chelsea")[:160, :200]):
        after = compositing.ours(case.marked, case.mask, case.painted)
        reach = compositing.OURS.mask_dilation + compositing.OURS.mask_feather
        far = ~dilate(case.mask >= compositing.OURS.mask_threshold, reach)
        assert np.array_equal(after[far], case.marked[far]), case.name


# Cutting


def test_past_the_edge_the_last_pixels_of_image_and_mask_repeat() -> None:
    mask = marked(ROCKET.shape, Box(390, 290, 400, 300))
    region = Region(box=Box(0, 0, 512, 512), size=(512, 512), windows=(Box(0, 0, 512, 512),))
    image, region_mask = cut(ROCKET, mask, region)
    assert (image.shape, region_mask.shape, image.dtype, region_mask.dtype) == (
        (512, 512, 3),
        (512, 512),
        np.uint8,
        np.uint8,
    )
    assert (image[400, :400] == ROCKET[-1]).all()
    assert (image[:300, 450] == ROCKET[:, -1]).all()
    assert (region_mask[295, 400:] == 255).all()
    assert set(np.unique(region_mask)) == {0, 255}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(20, 900),
    height=st.integers(20, 900),
    across=st.floats(0, 0.999),
    down=st.floats(0, 0.999),
    side=st.sampled_from([1, 1, 200]),
    mode=st.sampled_from(["full", "auto"]),
    scale=st.sampled_from([None, 0.6, 1.7]),
)
def test_at_any_scale_the_whole_mask_is_painted_and_no_mark_leaks(
    width: int, height: int, across: float, down: float, side: int, mode: Mode, scale: float | None
) -> None:
    top, left = int(down * height), int(across * width)
    mask = marked((height, width), Box(left, top, left + side, top + side))
    source = decoded("RGB", np.where(mask[..., None], np.uint8(255), np.zeros(3, np.uint8)))
    regions = plan(mask, mode=mode, window=(512, 512), scale=scale)
    results = []
    for region in regions:
        image, region_mask = cut(source.rgb(), mask, region)
        under_windows = np.zeros(region_mask.shape, np.bool_)
        for window in region.windows:
            under_windows[window.top : window.bottom, window.left : window.right] = True
        assert region_mask[under_windows].any()
        assert not region_mask[~under_windows].any()
        assert not image[region_mask == 0].any()
        results.append(np.full_like(image, 120))
    after = composite(source, mask, regions, results, Params(colour_fit="off"))
    assert (after.pixels[mask] == 120).all()


# The feather


def feather(mask: NDArray[np.bool_], px: int) -> NDArray[np.float32]:
    return under_test._feather_weights(mask, Box(0, 0, mask.shape[1], mask.shape[0]), px)


def test_the_feather_is_1_in_the_mask_and_0_past_its_length() -> None:
    mask = marked((60, 60), Box(20, 20, 30, 30))
    weight = feather(mask, 8)
    assert weight.dtype == np.float32
    assert (weight[mask] == 1).all()
    assert (weight[~dilate(mask, 8)] == 0).all()
    assert ((weight > 0) == dilate(mask, 8)).all()
    ramp = weight[25, 29:40]
    assert np.allclose(ramp, np.clip(1 - np.arange(11) / 9, 0, 1), atol=1e-6)
    assert np.array_equal(feather(mask, 0), mask)
