"""Rounds, seeds and gates, with an engine that paints what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from shared.errors import Cancelled, GateError
from shared.images import DecodedImage
from shared.jobs import AttemptRecord
from shared.params import MAX_SEED, Params
from workers.active_jobs import StageTimer
from workers.engines.protocol import Interruption, Pixels, RegionWork
from workers.pipeline.inpainting import RESEED, Brush, MaskedPass, paint

SIZE = (700, 600)
GREY = 120
MARK = 250


@dataclass
class Engine:
    """Fills the mask with the grey that ``paints`` gives for a seed; None fails a gate at once.

    everywhere: what lies outside the mask does not come back as it was either.
    """

    paints: Callable[[int], int | None] = lambda _seed: GREY
    name: str = "sd2"
    revision: str = "1"
    device: str = "cpu"
    works: list[RegionWork] = field(default_factory=list)
    everywhere: bool = False

    def submit(self, work: RegionWork) -> Future[Pixels]:
        self.works.append(work)
        future: Future[Pixels] = Future()
        grey = self.paints(work.seed)
        if grey is None:
            future.set_exception(GateError("not a number", code="gate_not_finite"))
            return future
        painted = work.image.copy()
        where = (work.mask > 0) | self.everywhere
        painted[where] = np.clip(
            grey + np.random.default_rng(2).integers(-3, 4, (*work.mask.shape, 3)), 0, 255
        )[where]
        future.set_result(painted)
        return future

    def close(self) -> None: ...

    def seeds(self) -> list[int]:
        return [work.seed for work in self.works]


def picture(*boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> DecodedImage:
    """Grey with a little noise, and a bright mark in each box."""
    noise = np.random.default_rng(1).integers(-3, 4, (size[1], size[0], 3))
    pixels = (GREY + noise).astype(np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = MARK
    return DecodedImage(pixels=pixels, mode="RGB", format="PNG", source=b"the source")


def one_round(
    params: Params, *boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE
) -> MaskedPass:
    mask = np.zeros((size[1], size[0]), np.bool_)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return MaskedPass(mask=mask, params=params)


BOX, OTHER = (100, 100, 160, 150), (400, 300, 440, 340)


def painted(
    engine: Engine, params: Params, *rounds: MaskedPass, before: DecodedImage | None = None
) -> tuple[DecodedImage, AttemptRecord]:
    record, interruption = AttemptRecord(), Interruption()
    stage = StageTimer(record, interruption)
    brush = Brush(engine=engine, interruption=interruption, stage=stage, record=record)
    before, rounds = before or picture(BOX, OTHER), rounds or (one_round(params, BOX),)
    return paint(brush, before, rounds, params=params), record


def grey_in(result: DecodedImage, box: tuple[int, int, int, int]) -> int:
    left, top, right, bottom = box
    return round(float(result.pixels[top:bottom, left:right].mean()))


def test_a_good_result_is_taken_with_the_first_seed() -> None:
    engine, params = Engine(), Params(seed=5)
    result, record = painted(engine, params)
    assert grey_in(result, BOX) == GREY
    assert engine.seeds() == [5]
    assert (record.seed, record.reseeds, record.review) == (5, 0, None)
    assert record.score is not None
    assert record.score > 0.5
    assert record.scores["score"] == record.score


def test_a_result_that_fails_a_gate_is_painted_once_more_with_another_seed() -> None:
    engine = Engine(paints=lambda seed: GREY if seed >= RESEED else GREY + 60)
    result, record = painted(engine, Params(seed=5))
    assert engine.seeds() == [5, 5 + RESEED]
    assert grey_in(result, BOX) == GREY
    assert (record.seed, record.reseeds) == (5 + RESEED, 1)


@pytest.mark.parametrize("first", [None, GREY + 60])
def test_two_bad_results_fail_the_job_with_the_gate_s_code(first: int | None) -> None:
    engine = Engine(paints=lambda seed: GREY + 90 if seed >= RESEED else first)
    with pytest.raises(GateError) as caught:
        painted(engine, Params(seed=5))
    assert caught.value.code in ("gate_seam", "gate_colour")
    assert not caught.value.retryable
    assert len(engine.works) == 2


def test_the_better_of_two_bad_results_is_published_for_review() -> None:
    engine = Engine(paints=lambda seed: GREY + (90 if seed >= RESEED else 60))
    result, record = painted(engine, Params(seed=5, gate="review"))
    assert grey_in(result, BOX) == GREY + 60
    assert record.review in ("gate_seam", "gate_colour")
    assert record.seed == 5
    assert record.score is not None
    assert record.score < 0.5


def test_without_gates_the_first_result_is_published_and_still_scored() -> None:
    engine = Engine(paints=lambda _seed: GREY + 60)
    result, record = painted(engine, Params(gate="off"))
    assert grey_in(result, BOX) == GREY + 60
    assert len(engine.works) == 1
    assert record.review is None
    assert record.score is not None
    assert record.score < 0.5


def test_a_result_without_numbers_fails_even_without_gates() -> None:
    engine = Engine(paints=lambda _seed: None)
    with pytest.raises(GateError) as caught:
        painted(engine, Params(gate="off"))
    assert caught.value.code == "gate_not_finite"
    assert len(engine.works) == 2


def test_an_engine_without_seeds_is_asked_once() -> None:
    engine = Engine(paints=lambda _seed: GREY + 60, name="opencv")
    with pytest.raises(GateError, match="try another opencv_method"):
        painted(engine, Params())
    assert len(engine.works) == 1


def test_the_last_seed_wraps_round() -> None:
    engine = Engine(paints=lambda seed: GREY if seed < RESEED else GREY + 60)
    _, record = painted(engine, Params(seed=MAX_SEED))
    assert engine.seeds() == [MAX_SEED, RESEED - 1]
    assert record.seed == RESEED - 1


def test_a_later_round_works_on_what_the_earlier_ones_left() -> None:
    engine = Engine(paints=lambda seed: GREY + seed)
    params = Params(seed=0)
    both = [one_round(params, BOX), one_round(replace(params, prompt="eyes"), BOX, OTHER)]
    result, record = painted(engine, params, *both)
    assert [work.params.prompt for work in engine.works] == ["", "eyes"]
    assert [work.seed for work in engine.works] == [0, 1]
    seen = engine.works[1].image
    assert not (seen == MARK).all(axis=-1)[100:150, 100:160].any()
    assert grey_in(result, BOX) == grey_in(result, OTHER) == GREY + 1
    assert result.touched is not None
    assert result.touched[100:150, 100:160].mean() > 0.9
    assert result.touched[300:340, 400:440].mean() > 0.9
    assert (record.regions, record.windows) == (2, 2)


def test_pixels_that_only_an_earlier_round_changed_stay_touched() -> None:
    params = Params()
    both = [one_round(params, BOX), one_round(params, OTHER)]
    result, _ = painted(Engine(), params, *both)
    assert result.touched is not None
    changed = (result.pixels != picture(BOX, OTHER).pixels).any(axis=-1)
    assert np.array_equal(result.touched, changed)


def test_empty_masks_change_nothing_and_have_no_score() -> None:
    engine = Engine()
    result, record = painted(engine, Params(), one_round(Params()))
    assert result.touched is None
    assert (record.score, record.regions, engine.works) == (None, 0, [])


# --- a large hole, which is painted coarsely -----------------------------------------------------

WIDE = (2600, 1300)
HOLE, MARK_BESIDE = (100, 100, 1200, 1200), (2200, 300, 2240, 340)


def with_a_hole(engine: Engine, **asked: Any) -> tuple[DecodedImage, AttemptRecord]:
    params = Params(seed=5, gate="off", **asked)
    one = one_round(params, HOLE, MARK_BESIDE, size=WIDE)
    return painted(engine, params, one, before=picture(HOLE, MARK_BESIDE, size=WIDE))


def detail(result: DecodedImage, box: tuple[int, int, int, int]) -> float:
    """How far neighbours differ, in levels."""
    left, top, right, bottom = box
    inside = result.pixels[top:bottom, left:right].astype(np.int32)
    return float(np.abs(np.diff(inside, axis=1)).mean())


def test_a_hole_painted_coarsely_is_soft_until_it_is_painted_again() -> None:
    soft, _ = with_a_hole(Engine())
    sharp, record = with_a_hole(engine := Engine(), refine_strength=0.4)
    real = detail(soft, MARK_BESIDE)
    assert detail(soft, HOLE) < 0.7 * real
    assert detail(sharp, HOLE) == pytest.approx(real, rel=0.1)
    assert [work.params.strength for work in engine.works] == [0.8, 0.8, 0.4]
    assert engine.seeds() == [5, 6, 7]
    assert (record.regions, record.windows) == (3, 1 + 1 + 9)


def test_the_finer_windows_see_the_coarse_result_and_its_surroundings() -> None:
    soft, _ = with_a_hole(Engine())
    with_a_hole(engine := Engine(), refine_strength=0.4)
    again = engine.works[2]
    left, top = (HOLE[side] - np.argwhere(again.mask)[0][1 - side] for side in (0, 1))
    height, width = again.mask.shape
    assert np.array_equal(again.image, soft.pixels[top : top + height, left : left + width])
    assert np.count_nonzero(again.mask) == 1100 * 1100


@pytest.mark.parametrize("feather", [0, 3])
def test_only_what_was_coarse_is_painted_again(feather: int) -> None:
    soft, _ = with_a_hole(Engine(), mask_feather=feather)
    sharp, _ = with_a_hole(Engine(), mask_feather=feather, refine_strength=0.4)
    left, top, right, bottom = HOLE
    differs = (soft.pixels != sharp.pixels).any(axis=-1)
    differs[top - feather : bottom + feather, left - feather : right + feather] = False
    assert not differs.any()
    assert sharp.touched is not None
    changed = (sharp.pixels != picture(HOLE, MARK_BESIDE, size=WIDE).pixels).any(axis=-1)
    assert np.array_equal(sharp.touched, changed)


def test_gates_examine_the_last_result_and_another_seed_paints_all_of_it() -> None:
    engine = Engine(lambda seed: GREY + 90 if seed == 7 else GREY)
    params = Params(seed=5, refine_strength=0.4, colour_fit="off")
    one = one_round(params, HOLE, MARK_BESIDE, size=WIDE)
    _, record = painted(engine, params, one, before=picture(HOLE, MARK_BESIDE, size=WIDE))
    assert engine.seeds() == [5, 6, 7, RESEED + 5, RESEED + 6, RESEED + 7]
    assert (record.seed, record.reseeds, record.regions) == (RESEED + 5, 1, 3)


def test_what_is_interrupted_is_not_painted_again() -> None:
    def cancelled(_seed: int) -> int:
        engine.works[-1].interruption.set(Cancelled("by a person"))
        return GREY

    engine = Engine(cancelled)
    with pytest.raises(Cancelled):
        with_a_hole(engine, refine_strength=0.4)
    assert engine.seeds() == [5, 6]


def test_a_feather_is_laid_once_however_often_a_hole_is_painted() -> None:
    asked = {"mask_feather": 3, "colour_fit": "off"}
    rim = (HOLE[0], HOLE[1] - 2, HOLE[2], HOLE[1] - 1)
    soft, _ = with_a_hole(Engine(lambda _: GREY + 60, everywhere=True), **asked)
    sharp, _ = with_a_hole(
        Engine(lambda _: GREY + 60, everywhere=True), **asked, refine_strength=0.4
    )
    assert GREY + 20 < grey_in(soft, rim) < GREY + 40
    assert grey_in(sharp, rim) == pytest.approx(grey_in(soft, rim), abs=1)
