"""What is painted again, how finely, and in which order; plans only."""

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


def steps(
    mask: NDArray[np.bool_], params: Params, *, any_size: bool = False
) -> list[coarse_to_fine.RefinementPass]:
    plan = plan_pass(mask, params, any_size=any_size)
    return list(coarse_to_fine.plan_refinements(mask, plan, params))


# marks, params, then for each step: its scale, its windows, the regions it keeps, what it repaints
CASES = {
    "a mark that a window holds is sharp already": ([MARK], {}, []),
    "a hole painted 1.6 times too coarsely: once more, 1:1": (
        [SMALLER_HOLE],
        {},
        [(1.0, 6, (), [SMALLER_HOLE])],
    ),
    "a large hole in two strides": (
        [HOLE],
        {},
        [(2.125, 12, (), [HOLE]), (1.0, 35, (), [HOLE])],
    ),
    "the finer of two joins later, and a mark stays as it is": (
        [SMALLER_HOLE, HOLE, MARK],
        {},
        [(2.125, 12, (0, 2), [HOLE]), (1.0, 41, (2,), [SMALLER_HOLE, HOLE])],
    ),
    "one that a single stride brings to 1:1 waits for the last": (
        [SQUARE_HOLE, HOLE],
        {},
        [(2.125, 12, (0,), [HOLE]), (1.0, 44, (), [SQUARE_HOLE, HOLE])],
    ),
    "a scale that was asked for": (
        [MARK],
        {"scale": 2.0},
        [(1.0, 1, (), [MARK])],
    ),
    "a whole picture scaled to a window": (
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
def test_what_is_coarse_is_painted_again_in_finer_and_finer_windows(case: str) -> None:
    marks, asked, expected = CASES[case]
    found = steps(marked(*marks), Params(refine_strength=0.4, **asked))
    assert [
        (one.regions[0].scale, sum(len(region.windows) for region in one.regions), one.unrefined)
        for one in found
    ] == [(scale, windows, kept) for scale, windows, kept, _ in expected]
    for one, (*_, again) in zip(found, expected, strict=True):
        assert np.array_equal(one.mask, marked(*again))


def test_nothing_is_painted_again_unless_asked_for_nor_where_no_window_is() -> None:
    assert steps(marked(HOLE), Params()) == []
    assert steps(marked(), Params(refine_strength=0.4)) == []
    assert steps(marked(HOLE), Params(refine_strength=0.4), any_size=True) == []


def test_a_picture_smaller_than_a_window_has_nothing_finer() -> None:
    thumbnail = marked((20, 20, 190, 140), size=(200, 150))
    assert steps(thumbnail, Params(refine_strength=0.4)) == []
