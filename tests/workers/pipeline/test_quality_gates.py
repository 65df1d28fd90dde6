"""What passes the gates and what does not, on real photographs and on the awkward masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared.engines import engine_spec
from shared.errors import GateError
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
    """White letters' worth of paint inside the mask, 3 px off its edge."""
    inner, stamped = ~dilate(~mask, 3), truth.copy()
    stamped[inner] = (truth[inner] * 0.4 + 0.6 * 255).astype(truth.dtype)
    return stamped


def scores(
    before: Array,
    fill: Array,
    mask: Mask,
    *,
    mode: str = "RGB",
    results: tuple[Array, ...] = (),
    feather_px: int = 0,
) -> Scores:
    """``fill`` pasted into the mask, and what the gates make of it."""
    after = before.copy()
    after[mask] = fill[mask]
    plan = regions.plan(mask, mode="auto", window=(512, 512), any_size=True)
    one, other = (
        DecodedImage(pixels=pixels, mode=mode, format="PNG") for pixels in (before, after)
    )
    return quality_gates.examine(one, other, mask, plan, results, feather_px=feather_px)


def code(found: Scores) -> str | None:
    error = quality_gates.verdict(found, remedy=SD2.gate_remedy)
    assert (found.score <= 0.5) == (error is not None)
    return error.code if error else None


def filled(fill: Array, **options: Any) -> str | None:
    return code(scores(marked(TRUTH, HOLE), fill, HOLE, **options))


def test_the_truth_passes_and_scores_high() -> None:
    found = scores(marked(TRUTH, HOLE), TRUTH, HOLE)
    assert code(found) is None
    assert found.score > 0.8


def test_values_that_are_no_numbers_fail() -> None:
    result = np.full((80, 50, 3), np.nan, np.float32)
    assert filled(TRUTH, results=(TRUTH,)) is None
    assert filled(TRUTH, results=(TRUTH, result)) == "gate_not_finite"


def test_black_fails_even_where_the_colour_fit_has_lifted_it() -> None:
    assert filled(np.zeros_like(TRUTH)) == "gate_black"
    assert filled(np.full_like(TRUTH, 24)) == "gate_black"


def test_black_in_a_black_picture_is_right() -> None:
    night = np.full_like(TRUTH, 3)
    assert code(scores(marked(night, HOLE), night, HOLE)) is None
    everything = np.ones_like(HOLE)
    assert code(scores(night, night * 0, everything)) is None
    assert code(scores(TRUTH, night * 0, everything)) == "gate_black"


def test_the_mark_left_in_fails() -> None:
    stamped = marked(TRUTH, HOLE)
    assert filled(stamped) == "gate_unchanged"
    noise = np.random.default_rng(1).integers(-1, 2, stamped.shape)
    assert filled(np.clip(stamped + noise, 0, 255).astype(np.uint8)) == "gate_unchanged"


def test_plain_ground_that_never_had_a_mark_may_come_back_as_it_was() -> None:
    white = np.full_like(TRUTH, 255)
    assert code(scores(white, white, HOLE)) is None
    down = np.linspace(90, 160, len(TRUTH)).round().astype(np.uint8)
    sky = np.broadcast_to(down[:, None, None], TRUTH.shape)
    assert code(scores(sky.copy(), sky, HOLE)) is None


def test_a_cast_of_one_channel_fails() -> None:
    tinted = TRUTH.copy()
    tinted[..., 2] = np.clip(tinted[..., 2].astype(int) + 25, 0, 255)
    assert filled(tinted) in ("gate_seam", "gate_colour")
    slight = np.clip(TRUTH + np.array([3, 0, -3]), 0, 255).astype(np.uint8)
    assert filled(slight) is None


def test_a_cast_in_coarse_texture_is_a_jump_of_colour_and_no_seam() -> None:
    gravel = photograph("gravel.png")
    mask = box(100, 60, 300, 240, like=gravel)
    darker = np.clip(gravel.astype(int) - 20, 0, 255).astype(np.uint8)
    assert code(scores(marked(gravel, mask), darker, mask)) == "gate_colour"


def test_noise_and_another_photograph_fail() -> None:
    noise = np.random.default_rng(2).integers(0, 256, TRUTH.shape).astype(np.uint8)
    assert filled(noise) == "gate_seam"
    assert filled(photograph("astronaut.png")) == "gate_seam"


def test_a_seam_behind_a_feather_is_still_one() -> None:
    before = marked(TRUTH, HOLE)
    weight = np.zeros(HOLE.shape)
    for px in range(4, -1, -1):
        weight[dilate(HOLE, px)] = 1 - px / 5
    for fill, expected in ((TRUTH, None), (photograph("astronaut.png"), "gate_seam")):
        after = before + weight[..., None] * (fill.astype(float) - before)
        plan = regions.plan(HOLE, mode="auto", window=(512, 512), any_size=True)
        one, other = (
            DecodedImage(pixels=pixels, mode="RGB", format="PNG")
            for pixels in (before, after.round().astype(np.uint8))
        )
        assert code(quality_gates.examine(one, other, HOLE, plan, (), feather_px=4)) == expected


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
    if side > 1:  # one pixel has too few neighbours to tell a seam
        assert code(scores(before, np.full_like(smooth, 200), mask)) == "gate_seam"


def test_without_surroundings_there_is_no_edge_to_judge() -> None:
    everything = np.ones_like(HOLE)
    found = scores(TRUTH, photograph("astronaut.png"), everything)
    assert (found.seam, found.colour_jump) == (None, None)
    assert code(found) is None
    assert code(scores(TRUTH, TRUTH, everything)) == "gate_unchanged"


def test_an_empty_mask_is_as_good_as_can_be() -> None:
    found = scores(TRUTH, TRUTH, np.zeros_like(HOLE))
    assert found == Scores()
    assert found.score == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_is_judged_alike(mode: str) -> None:
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


def test_what_alpha_hides_is_no_surroundings() -> None:
    """A cut-out's hidden pixels are often black; its fill must not be held against them."""
    cutout = np.asarray(Image.fromarray(TRUTH).convert("RGBA")).copy()
    cutout[~HOLE] = 0
    repainted = cutout.copy()
    repainted[..., :3] = 240
    found = scores(cutout, repainted, HOLE, mode="RGBA")
    assert (found.seam, found.colour_jump) == (None, None)
    hole = cutout.copy()
    hole[HOLE] = 0  # nothing to see before, so nothing that could have been left in
    assert scores(hole, cutout, HOLE, mode="RGBA").change is None


def test_a_verdict_names_the_figure_and_the_remedy() -> None:
    error = quality_gates.verdict(Scores(seam=4.2), remedy=SD2.gate_remedy)
    assert isinstance(error, GateError)
    assert str(error) == (
        "a seam: the picture is 4.2 times as steep across the mask's edge as beside it "
        "(below 2); try another seed, or gate=review to look at it"
    )
    assert not error.retryable


def test_without_seeds_the_remedy_is_the_method_or_the_mask() -> None:
    assert str(quality_gates.verdict(Scores(colour_jump=40.0), remedy=OPENCV.gate_remedy)).endswith(
        "; try another opencv_method or opencv_radius, a mask that covers all of the mark, "
        "or gate=review to look at it"
    )


def test_the_first_gate_that_fails_is_told() -> None:
    everything = Scores(finite=False, black=1.0, change=0.0, seam=9.0, colour_jump=40.0)
    assert code(everything) == "gate_not_finite"
    assert code(Scores(change=0.0, seam=9.0)) == "gate_unchanged"
    assert code(Scores(seam=9.0, colour_jump=40.0)) == "gate_seam"


def test_scores_order_results_from_worst_to_best() -> None:
    found = [Scores(black=1.0), Scores(seam=3.0), Scores(colour_jump=9.0), Scores(seam=0.8)]
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert Scores(seam=0.8).to_json() == {
        **{"finite": True, "black": 0.0, "change": None, "seam": 0.8, "colour_jump": None},
        "score": pytest.approx(Scores(seam=0.8).score),
    }


def test_a_mark_s_cost_does_not_grow_with_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    convert = quality_gates.as_rgb

    def counted(pixels: Array, mode: str) -> Array:
        seen.append(pixels.shape)
        return convert(pixels, mode)

    monkeypatch.setattr(quality_gates, "as_rgb", counted)
    large = np.full((2000, 3000, 3), 90, np.uint8)
    mask = box(1000, 1000, 1100, 1030, like=large)
    assert code(scores(marked(large, mask), large, mask)) is None
    assert max(height * width for height, width, _ in seen) < 110 * 40
