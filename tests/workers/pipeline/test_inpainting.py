"""Passes, seeds and gates, with an engine whose result a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from shared.errors import Cancelled, GateError, GateNotFinite
from shared.images import DecodedImage
from shared.jobs import AttemptRecord, LeasedJob
from shared.params import MAX_SEED, Params
from shared.settings import Settings
from shared.storage import Storage
from workers.engines.protocol import Pixels, RegionWork
from workers.job_context import JobContext
from workers.pipeline.inpainting import RESEED, MaskedPass, inpaint
from workers.worker_context import PipelineContext

SIZE = (700, 600)
GREY = 120
MARK = 250


@dataclass
class Engine:
    """Fills the mask with the grey that ``choose_grey`` gives for a seed; None fails a gate.

    everywhere: it changes the pixels outside the mask too.
    """

    choose_grey: Callable[[int], int | None] = lambda _seed: GREY
    name: str = "sd2"
    revision: str = "1"
    device: str = "cpu"
    works: list[RegionWork] = field(default_factory=list)
    max_batch: int = 1
    everywhere: bool = False

    def submit(self, work: RegionWork) -> Future[Pixels]:
        self.works.append(work)
        future: Future[Pixels] = Future()
        grey = self.choose_grey(work.seed)
        if grey is None:
            future.set_exception(GateNotFinite("NaN or infinite"))
            return future
        filled = work.image.copy()
        where = (work.mask > 0) | self.everywhere
        filled[where] = np.clip(
            grey + np.random.default_rng(2).integers(-3, 4, (*work.mask.shape, 3)), 0, 255
        )[where]
        future.set_result(filled)
        return future

    def close(self) -> None: ...

    def seeds(self) -> list[int]:
        return [work.seed for work in self.works]


def make_image(*boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> DecodedImage:
    """Grey with a little noise, and a bright mark in each box."""
    noise = np.random.default_rng(1).integers(-3, 4, (size[1], size[0], 3))
    pixels = (GREY + noise).astype(np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = MARK
    return DecodedImage(pixels=pixels, mode="RGB", format="PNG", source=b"the source")


def make_pass(
    params: Params, *boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE
) -> MaskedPass:
    mask = np.zeros((size[1], size[0]), np.bool_)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return MaskedPass(mask=mask, params=params)


BOX, OTHER = (100, 100, 160, 150), (400, 300, 440, 340)


def run(
    engine: Engine, params: Params, *passes: MaskedPass, image: DecodedImage | None = None
) -> tuple[DecodedImage, AttemptRecord]:
    """Inpaints the image; by default one with two marks, in one pass over the first."""
    worker = PipelineContext(
        settings=Settings(_env_file=None), storage=Storage(roots=[], buckets=[]), engine=engine
    )
    leased = LeasedJob(
        id=1,
        attempt=1,
        engine=engine.name,
        image="in.png",
        mask="mask.png",
        output="out.png",
        params=params,
        priority=0,
        failures=0,
    )
    job = JobContext(leased=leased)
    image, passes = image or make_image(BOX, OTHER), passes or (make_pass(params, BOX),)
    return inpaint(worker, job, image, passes), job.record


def grey_in(result: DecodedImage, box: tuple[int, int, int, int]) -> int:
    left, top, right, bottom = box
    return round(float(result.pixels[top:bottom, left:right].mean()))


def test_a_good_result_is_taken_with_the_first_seed() -> None:
    engine, params = Engine(), Params(seed=5)
    result, record = run(engine, params)
    assert grey_in(result, BOX) == GREY
    assert engine.seeds() == [5]
    assert (record.seed, record.reseeds, record.review) == (5, 0, None)
    assert record.score is not None
    assert record.score > 0.5
    assert record.scores["score"] == record.score


def test_a_result_that_fails_a_gate_is_inpainted_again_with_another_seed() -> None:
    engine = Engine(choose_grey=lambda seed: GREY if seed >= RESEED else GREY + 60)
    result, record = run(engine, Params(seed=5))
    assert engine.seeds() == [5, 5 + RESEED]
    assert grey_in(result, BOX) == GREY
    assert (record.seed, record.reseeds) == (5 + RESEED, 1)


@pytest.mark.parametrize("first", [None, GREY + 60])
def test_two_bad_results_fail_the_job_with_the_gate_s_code(first: int | None) -> None:
    engine = Engine(choose_grey=lambda seed: GREY + 90 if seed >= RESEED else first)
    with pytest.raises(GateError) as caught:
        run(engine, Params(seed=5))
    assert caught.value.code in ("gate_seam", "gate_colour")
    assert not caught.value.retryable
    assert len(engine.works) == 2


def test_the_better_of_two_bad_results_is_published_for_review() -> None:
    engine = Engine(choose_grey=lambda seed: GREY + (90 if seed >= RESEED else 60))
    result, record = run(engine, Params(seed=5, gate="review"))
    assert grey_in(result, BOX) == GREY + 60
    assert record.review in ("gate_seam", "gate_colour")
    assert record.seed == 5
    assert record.score is not None
    assert record.score < 0.5


def test_without_gates_the_first_result_is_published_and_still_scored() -> None:
    engine = Engine(choose_grey=lambda _seed: GREY + 60)
    result, record = run(engine, Params(gate="off"))
    assert grey_in(result, BOX) == GREY + 60
    assert len(engine.works) == 1
    assert record.review is None
    assert record.score is not None
    assert record.score < 0.5


def test_a_result_that_is_not_finite_fails_even_without_gates() -> None:
    engine = Engine(choose_grey=lambda _seed: None)
    with pytest.raises(GateError) as caught:
        run(engine, Params(gate="off"))
    assert caught.value.code == "gate_not_finite"
    assert len(engine.works) == 2


def test_an_engine_without_seeds_runs_once() -> None:
    engine = Engine(choose_grey=lambda _seed: GREY + 60, name="opencv")
    with pytest.raises(GateError, match="try another opencv_method"):
        run(engine, Params())
    assert len(engine.works) == 1


def test_the_largest_seed_wraps_around() -> None:
    engine = Engine(choose_grey=lambda seed: GREY if seed < RESEED else GREY + 60)
    _, record = run(engine, Params(seed=MAX_SEED))
    assert engine.seeds() == [MAX_SEED, RESEED - 1]
    assert record.seed == RESEED - 1


def test_a_later_pass_works_on_the_result_of_the_earlier_ones() -> None:
    engine = Engine(choose_grey=lambda seed: GREY + seed)
    params = Params(seed=0)
    passes = [make_pass(params, BOX), make_pass(replace(params, prompt="eyes"), BOX, OTHER)]
    result, record = run(engine, params, *passes)
    assert [work.params.prompt for work in engine.works] == ["", "eyes"]
    assert [work.seed for work in engine.works] == [0, 1]
    second_input = engine.works[1].image
    assert not (second_input == MARK).all(axis=-1)[100:150, 100:160].any()
    assert grey_in(result, BOX) == grey_in(result, OTHER) == GREY + 1
    assert result.touched is not None
    assert result.touched[100:150, 100:160].mean() > 0.9
    assert result.touched[300:340, 400:440].mean() > 0.9
    assert (record.regions, record.windows) == (2, 2)


def test_pixels_that_only_an_earlier_pass_changed_stay_touched() -> None:
    params = Params()
    passes = [make_pass(params, BOX), make_pass(params, OTHER)]
    result, _ = run(Engine(), params, *passes)
    assert result.touched is not None
    changed = (result.pixels != make_image(BOX, OTHER).pixels).any(axis=-1)
    assert np.array_equal(result.touched, changed)


def test_empty_masks_change_nothing_and_have_no_score() -> None:
    engine = Engine()
    result, record = run(engine, Params(), make_pass(Params()))
    assert result.touched is None
    assert (record.score, record.regions, engine.works) == (None, 0, [])


# --- a large hole, which is inpainted coarsely ---------------------------------------------------

WIDE = (2600, 1300)
HOLE, SMALL_MARK = (100, 100, 1200, 1200), (2200, 300, 2240, 340)


def run_with_a_hole(engine: Engine, **params: Any) -> tuple[DecodedImage, AttemptRecord]:
    job_params = Params(seed=5, gate="off", **params)
    only_pass = make_pass(job_params, HOLE, SMALL_MARK, size=WIDE)
    return run(engine, job_params, only_pass, image=make_image(HOLE, SMALL_MARK, size=WIDE))


def mean_neighbour_difference(result: DecodedImage, box: tuple[int, int, int, int]) -> float:
    """Mean absolute difference of horizontal neighbours, in levels."""
    left, top, right, bottom = box
    inside = result.pixels[top:bottom, left:right].astype(np.int32)
    return float(np.abs(np.diff(inside, axis=1)).mean())


def test_a_hole_inpainted_coarsely_is_soft_until_it_is_refined() -> None:
    soft, _ = run_with_a_hole(Engine())
    sharp, record = run_with_a_hole(engine := Engine(), refine_strength=0.4)
    real = mean_neighbour_difference(soft, SMALL_MARK)
    assert mean_neighbour_difference(soft, HOLE) < 0.7 * real
    assert mean_neighbour_difference(sharp, HOLE) == pytest.approx(real, rel=0.1)
    assert [work.params.strength for work in engine.works] == [0.8, 0.8, 0.4]
    assert engine.seeds() == [5, 6, 7]
    assert (record.regions, record.windows) == (3, 1 + 1 + 9)


def test_the_finer_windows_see_the_coarse_result_and_its_surroundings() -> None:
    soft, _ = run_with_a_hole(Engine())
    run_with_a_hole(engine := Engine(), refine_strength=0.4)
    finer = engine.works[2]
    left, top = (HOLE[side] - np.argwhere(finer.mask)[0][1 - side] for side in (0, 1))
    height, width = finer.mask.shape
    assert np.array_equal(finer.image, soft.pixels[top : top + height, left : left + width])
    assert np.count_nonzero(finer.mask) == 1100 * 1100


@pytest.mark.parametrize("feather", [0, 3])
def test_only_coarse_regions_are_refined(feather: int) -> None:
    soft, _ = run_with_a_hole(Engine(), mask_feather=feather)
    sharp, _ = run_with_a_hole(Engine(), mask_feather=feather, refine_strength=0.4)
    left, top, right, bottom = HOLE
    differs = (soft.pixels != sharp.pixels).any(axis=-1)
    differs[top - feather : bottom + feather, left - feather : right + feather] = False
    assert not differs.any()
    assert sharp.touched is not None
    changed = (sharp.pixels != make_image(HOLE, SMALL_MARK, size=WIDE).pixels).any(axis=-1)
    assert np.array_equal(sharp.touched, changed)


def test_gates_examine_the_refined_result_and_another_seed_repeats_all_of_it() -> None:
    engine = Engine(lambda seed: GREY + 90 if seed == 7 else GREY)
    params = Params(seed=5, refine_strength=0.4, colour_fit="off")
    only_pass = make_pass(params, HOLE, SMALL_MARK, size=WIDE)
    _, record = run(engine, params, only_pass, image=make_image(HOLE, SMALL_MARK, size=WIDE))
    assert engine.seeds() == [5, 6, 7, RESEED + 5, RESEED + 6, RESEED + 7]
    assert (record.seed, record.reseeds, record.regions) == (RESEED + 5, 1, 3)


def test_an_interrupted_job_is_not_refined() -> None:
    def cancelled(_seed: int) -> int:
        engine.works[-1].interruption.set(Cancelled("by a person"))
        return GREY

    engine = Engine(cancelled)
    with pytest.raises(Cancelled):
        run_with_a_hole(engine, refine_strength=0.4)
    assert engine.seeds() == [5, 6]


def test_the_feather_is_applied_once_however_often_a_hole_is_refined() -> None:
    params = {"mask_feather": 3, "colour_fit": "off"}
    rim = (HOLE[0], HOLE[1] - 2, HOLE[2], HOLE[1] - 1)
    soft, _ = run_with_a_hole(Engine(lambda _: GREY + 60, everywhere=True), **params)
    sharp, _ = run_with_a_hole(
        Engine(lambda _: GREY + 60, everywhere=True), **params, refine_strength=0.4
    )
    assert GREY + 20 < grey_in(soft, rim) < GREY + 40
    assert grey_in(sharp, rim) == pytest.approx(grey_in(soft, rim), abs=1)
