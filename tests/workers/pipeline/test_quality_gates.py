"""The quality gates on real photographs and on masks that are hard to judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.engines import engine_spec
from shared.errors import GateSeam
from shared.geometry import regions
from shared.images import DecodedImage
from shared.masks import Mask, dilate
from tests import sample_images
from workers.pipeline import quality_gates
from workers.pipeline.quality_gates import Scores

Array = NDArray[Any]


SD2, OPENCV = engine_spec("sd2"), engine_spec("opencv")


def photograph(name: str = "coffee.png", mode: str = "RGB") -> Array:
    return np.asarray(sample_images.read_photograph(name).convert(mode))[:300, :400].copy()


def box(left: int, top: int, right: int, bottom: int, *, like: Array) -> Mask:
    mask = np.zeros(like.shape[:2], np.bool_)
    mask[top:bottom, left:right] = True
    return mask


TRUTH = photograph()
HOLE = box(120, 80, 200, 130, like=TRUTH)


def marked(truth: Array, mask: Mask) -> Array:
    """60% white over the mask's interior, 3 px from its edge."""
    interior, watermarked = ~dilate(~mask, 3), truth.copy()
    watermarked[interior] = (truth[interior] * 0.4 + 0.6 * 255).astype(truth.dtype)
    return watermarked


def scores(
    before: Array,
    fill: Array,
    mask: Mask,
    *,
    mode: str = "RGB",
    results: tuple[Array, ...] = (),
    feather_px: int = 0,
) -> Scores:
    """The scores of ``fill`` pasted into the mask."""
    after = before.copy()
    after[mask] = fill[mask]
    plan = regions.plan(mask, mode="auto", window=(512, 512), any_size=True)
    source, result = (
        DecodedImage(pixels=pixels, mode=mode, format="PNG") for pixels in (before, after)
    )
    return quality_gates.examine(source, result, mask, plan, results, feather_px=feather_px)


def code(measured: Scores) -> str | None:
    """The code of the gate that fails; None if all pass."""
    error = quality_gates.verdict(measured, remedy=SD2.gate_remedy)
    assert (measured.score <= 0.5) == (error is not None)
    return error.code if error else None


def code_of_fill(fill: Array, **options: Any) -> str | None:
    """The code for a watermarked photograph whose hole is filled with ``fill``."""
    return code(scores(marked(TRUTH, HOLE), fill, HOLE, **options))


def test_the_original_passes_and_scores_high() -> None:
    measured = scores(marked(TRUTH, HOLE), TRUTH, HOLE)
    assert code(measured) is None
    assert measured.score > 0.8


def test_nan_values_fail() -> None:
    result = np.full((80, 50, 3), np.nan, np.float32)
    assert code_of_fill(TRUTH, results=(TRUTH,)) is None
    assert code_of_fill(TRUTH, results=(TRUTH, result)) == "gate_not_finite"


def test_black_fails_even_where_the_colour_fit_has_lifted_it() -> None:
    assert code_of_fill(np.zeros_like(TRUTH)) == "gate_black"
    assert code_of_fill(np.full_like(TRUTH, 24)) == "gate_black"


def test_black_in_a_black_image_passes() -> None:
    night = np.full_like(TRUTH, 3)
    assert code(scores(marked(night, HOLE), night, HOLE)) is None
    everything = np.ones_like(HOLE)
    assert code(scores(night, night * 0, everything)) is None
    assert code(scores(TRUTH, night * 0, everything)) == "gate_black"


def test_a_mark_that_is_still_there_fails() -> None:
    watermarked = marked(TRUTH, HOLE)
    assert code_of_fill(watermarked) == "gate_unchanged"
    noise = np.random.default_rng(1).integers(-1, 2, watermarked.shape)
    assert code_of_fill(np.clip(watermarked + noise, 0, 255).astype(np.uint8)) == "gate_unchanged"


def test_plain_ground_without_a_mark_may_stay_unchanged() -> None:
    white = np.full_like(TRUTH, 255)
    assert code(scores(white, white, HOLE)) is None
    gradient = np.linspace(90, 160, len(TRUTH)).round().astype(np.uint8)
    sky = np.broadcast_to(gradient[:, None, None], TRUTH.shape)
    assert code(scores(sky.copy(), sky, HOLE)) is None


def test_a_colour_cast_in_one_channel_fails() -> None:
    tinted = TRUTH.copy()
    tinted[..., 2] = np.clip(tinted[..., 2].astype(int) + 25, 0, 255)
    assert code_of_fill(tinted) in ("gate_seam", "gate_colour")
    slight = np.clip(TRUTH + np.array([3, 0, -3]), 0, 255).astype(np.uint8)
    assert code_of_fill(slight) is None


def test_a_cast_in_coarse_texture_is_a_colour_jump_and_not_a_seam() -> None:
    gravel = photograph("gravel.png")
    mask = box(100, 60, 300, 240, like=gravel)
    darker = np.clip(gravel.astype(int) - 20, 0, 255).astype(np.uint8)
    assert code(scores(marked(gravel, mask), darker, mask)) == "gate_colour"


def test_noise_and_another_photograph_fail() -> None:
    noise = np.random.default_rng(2).integers(0, 256, TRUTH.shape).astype(np.uint8)
    assert code_of_fill(noise) == "gate_seam"
    assert code_of_fill(photograph("astronaut.png")) == "gate_seam"


def test_a_seam_is_detected_through_a_feather() -> None:
    before = marked(TRUTH, HOLE)
    weight = np.zeros(HOLE.shape)
    for px in range(4, -1, -1):
        weight[dilate(HOLE, px)] = 1 - px / 5
    for fill, expected in ((TRUTH, None), (photograph("astronaut.png"), "gate_seam")):
        after = before + weight[..., None] * (fill.astype(float) - before)
        plan = regions.plan(HOLE, mode="auto", window=(512, 512), any_size=True)
        source, result = (
            DecodedImage(pixels=pixels, mode="RGB", format="PNG")
            for pixels in (before, after.round().astype(np.uint8))
        )
        measured = quality_gates.examine(source, result, HOLE, plan, (), feather_px=4)
        assert code(measured) == expected


def test_one_bad_region_among_good_ones_fails() -> None:
    mask = HOLE | box(300, 200, 360, 260, like=TRUTH)
    fill = TRUTH.copy()
    fill[190:270, 290:370] = 0
    before = marked(TRUTH, mask)
    assert code(scores(before, TRUTH, mask)) is None
    assert code(scores(before, fill, mask)) == "gate_black"


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_a_tiny_mark_can_be_judged(side: int) -> None:
    smooth = photograph("moon.png")
    mask = box(150, 150, 150 + side, 150 + side, like=smooth)
    before = smooth.copy()
    before[mask] = 255
    assert code(scores(before, smooth, mask)) is None
    assert code(scores(before, before, mask)) == "gate_unchanged"
    if side > 1:  # one pixel has too few edge pixels to measure a seam
        assert code(scores(before, np.full_like(smooth, 200), mask)) == "gate_seam"


def test_a_mask_over_the_whole_image_has_no_edge_to_judge() -> None:
    everything = np.ones_like(HOLE)
    measured = scores(TRUTH, photograph("astronaut.png"), everything)
    assert (measured.seam, measured.colour_jump) == (None, None)
    assert code(measured) is None
    assert code(scores(TRUTH, TRUTH, everything)) == "gate_unchanged"


def test_an_empty_mask_has_the_best_score() -> None:
    measured = scores(TRUTH, TRUTH, np.zeros_like(HOLE))
    assert measured == Scores()
    assert measured.score == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16", "1"])
def test_the_gates_work_in_every_mode(mode: str) -> None:
    if mode == "I;16":
        truth, white = photograph(mode="L").astype(np.uint16) * 257, 65535
    else:
        truth, white = photograph(mode=mode), True if mode == "1" else 255
    before, black = truth.copy(), np.zeros_like(truth)
    letters = box(140, 95, 180, 115, like=truth)
    before[letters] = 0 if mode == "CMYK" else white
    if mode == "CMYK":
        black[..., 3] = 255
    if mode in ("LA", "RGBA"):
        black[..., -1] = 255
    assert code(scores(before, truth, HOLE, mode=mode)) is None
    assert code(scores(before, before, HOLE, mode=mode)) == "gate_unchanged"
    assert code(scores(before, black, HOLE, mode=mode)) == "gate_black"


def test_transparent_pixels_do_not_count_as_surroundings() -> None:
    """A cut-out's hidden pixels are often black; its fill must not be compared with them."""
    cutout = np.asarray(Image.fromarray(TRUTH).convert("RGBA")).copy()
    cutout[~HOLE] = 0
    repainted = cutout.copy()
    repainted[..., :3] = 240
    measured = scores(cutout, repainted, HOLE, mode="RGBA")
    assert (measured.seam, measured.colour_jump) == (None, None)
    hole = cutout.copy()
    hole[HOLE] = 0  # nothing was visible before, so no mark can be unchanged
    assert scores(hole, cutout, HOLE, mode="RGBA").change is None


def test_the_error_names_the_metric_and_the_remedy() -> None:
    error = quality_gates.verdict(Scores(seam=4.2), remedy=SD2.gate_remedy)
    assert isinstance(error, GateSeam)
    assert str(error) == (
        "a seam: the gradient across the mask's edge is 4.2 times the gradient just outside "
        "(below 2); try another seed, or gate=review to inspect it"
    )
    assert not error.retryable


def test_the_remedy_for_opencv_is_the_method_or_the_mask() -> None:
    assert str(quality_gates.verdict(Scores(colour_jump=40.0), remedy=OPENCV.gate_remedy)).endswith(
        "; try another opencv_method or opencv_radius, a mask that covers all of the mark, "
        "or gate=review to inspect it"
    )


def test_the_first_gate_that_fails_is_reported() -> None:
    fails_all = Scores(finite=False, black=1.0, change=0.0, seam=9.0, colour_jump=40.0)
    assert code(fails_all) == "gate_not_finite"
    assert code(Scores(change=0.0, seam=9.0)) == "gate_unchanged"
    assert code(Scores(seam=9.0, colour_jump=40.0)) == "gate_seam"


def test_scores_order_results_from_worst_to_best() -> None:
    worst_first = [Scores(black=1.0), Scores(seam=3.0), Scores(colour_jump=9.0), Scores(seam=0.8)]
    ordered = [measured.score for measured in worst_first]
    assert ordered == sorted(ordered)
    assert Scores(seam=0.8).to_json() == {
        **{"finite": True, "black": 0.0, "change": None, "seam": 0.8, "colour_jump": None},
        "score": pytest.approx(Scores(seam=0.8).score),
    }


def test_only_the_surroundings_of_the_mask_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    convert = quality_gates.as_rgb

    def counted(pixels: Array, mode: str) -> Array:
        shapes.append(pixels.shape)
        return convert(pixels, mode)

    monkeypatch.setattr(quality_gates, "as_rgb", counted)
    large = np.full((2000, 3000, 3), 90, np.uint8)
    mask = box(1000, 1000, 1100, 1030, like=large)
    assert code(scores(marked(large, mask), large, mask)) is None
    assert max(height * width for height, width, _ in shapes) < 110 * 40
