"""Which regions are refined, at which scales and in which order; plans only."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.geometry import coarse_to_fine
from shared.geometry.regions import plan_pass
from shared.params import Params

PHOTO = (6000, 4000)
HOLE = (1500, 1000, 4500, 3000)
SMALLER_HOLE, SQUARE_HOLE = (200, 100, 1100, 800), (100, 100, 1100, 1100)
MARK = (5500, 3750, 5900, 3900)


def marked(*marks: tuple[int, int, int, int], size: tuple[int, int] = PHOTO) -> NDArray[np.bool_]:
    mask = np.zeros((size[1], size[0]), np.bool_)
    for left, top, right, bottom in marks:
        mask[top:bottom, left:right] = True
    return mask


def refinements(
    mask: NDArray[np.bool_], params: Params, *, any_size: bool = False
) -> list[coarse_to_fine.RefinementPass]:
    plan = plan_pass(mask, params, any_size=any_size)
    return list(coarse_to_fine.plan_refinements(mask, plan, params))


# marks, params, then for each refinement: scale, windows, unrefined regions, marks it fills
CASES = {
    "a mark that fits a window is 1:1 already": ([MARK], {}, []),
    "a hole at scale 1.6 is refined once": (
        [SMALLER_HOLE],
        {},
        [(1.0, 6, (), [SMALLER_HOLE])],
    ),
    "a large hole is refined twice": (
        [HOLE],
        {},
        [(2.125, 12, (), [HOLE]), (1.0, 35, (), [HOLE])],
    ),
    "the coarser of two holes is refined first, and a 1:1 mark never": (
        [SMALLER_HOLE, HOLE, MARK],
        {},
        [(2.125, 12, (0, 2), [HOLE]), (1.0, 41, (2,), [SMALLER_HOLE, HOLE])],
    ),
    "a hole that one stride brings to 1:1 is refined last": (
        [SQUARE_HOLE, HOLE],
        {},
        [(2.125, 12, (0,), [HOLE]), (1.0, 44, (), [SQUARE_HOLE, HOLE])],
    ),
    "a scale given by the parameters": (
        [MARK],
        {"scale": 2.0},
        [(1.0, 1, (), [MARK])],
    ),
    "a whole image scaled into a window": (
        [MARK],
        {"mode": "full"},
        [
            (5.15625, 1, (), [MARK]),
            (2.265625, 1, (), [MARK]),
            (1.0, 1, (), [MARK]),
        ],
    ),
    "tiles are 1:1": ([HOLE], {"mode": "tile"}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_coarse_regions_are_refined_at_finer_and_finer_scales(case: str) -> None:
    marks, params, expected = CASES[case]
    passes = refinements(marked(*marks), Params(refine_strength=0.4, **params))
    assert [
        (
            refinement.regions[0].scale,
            sum(len(region.windows) for region in refinement.regions),
            refinement.unrefined,
        )
        for refinement in passes
    ] == [(scale, windows, unrefined) for scale, windows, unrefined, _ in expected]
    for refinement, (*_, refined_marks) in zip(passes, expected, strict=True):
        assert np.array_equal(refinement.mask, marked(*refined_marks))


def test_nothing_is_refined_unless_asked_for_or_if_the_engine_has_no_windows() -> None:
    assert refinements(marked(HOLE), Params()) == []
    assert refinements(marked(), Params(refine_strength=0.4)) == []
    assert refinements(marked(HOLE), Params(refine_strength=0.4), any_size=True) == []


def test_an_image_smaller_than_a_window_is_not_refined() -> None:
    thumbnail = marked((20, 20, 190, 140), size=(200, 150))
    assert refinements(thumbnail, Params(refine_strength=0.4)) == []
