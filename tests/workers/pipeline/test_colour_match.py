from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import data

from shared.masks import dilate
from shared.params import ColourFit
from workers.pipeline import colour_match
from workers.pipeline.colour_match import Correction, fit_colour

CAT = data.chelsea()[:300, :448]
METHODS: list[ColourFit] = ["membrane", "ring"]


def nose(shape: tuple[int, ...] = CAT.shape) -> NDArray[np.bool_]:
    mask = np.zeros(shape[:2], np.bool_)
    mask[90:170, 180:300] = True
    return mask


def painted(
    *,
    gain: float = 1.0,
    offset: float | NDArray[np.float64] = 0.0,
    noise: float = 0.0,
    known: NDArray[np.uint8] = CAT,
) -> NDArray[np.uint8]:
    grain = np.random.default_rng(0).normal(0, noise, known.shape) if noise else 0
    return np.clip(np.rint(known * gain + offset + grain), 0, 255).astype(np.uint8)


def slope(px: int = CAT.shape[1], height: float = 12) -> NDArray[np.float64]:
    """(1, px, 1): light that rises by twice the height from left to right."""
    return np.linspace(-height, height, px)[None, :, None]


def mean_error(fit: Correction, result: NDArray[np.uint8], where: NDArray[np.bool_]) -> float:
    return float(np.abs(fit.apply(result) - CAT)[where].mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_colour_cast_is_corrected_inside_the_mask(method: ColourFit) -> None:
    result, mask = painted(gain=0.92, offset=9), nose()
    fit = fit_colour(result, CAT, mask, method=method)
    assert fit.gain == pytest.approx((1 / 0.92,) * 3, abs=0.02)
    assert mean_error(fit, result, mask) < 1


def test_only_the_membrane_corrects_light_that_varies_over_the_image() -> None:
    result, mask = painted(offset=slope()), nose()
    assert mean_error(fit_colour(result, CAT, mask), result, mask) < 0.7
    assert mean_error(fit_colour(result, CAT, mask, method="ring"), result, mask) > 1


def test_off_changes_nothing() -> None:
    result = painted(offset=20)
    fit = fit_colour(result, CAT, nose(), method="off")
    assert fit.is_identity
    assert np.array_equal(fit.apply(result), result)


@pytest.mark.parametrize("method", METHODS)
def test_pixels_in_and_near_the_mask_do_not_influence_the_fit(method: ColourFit) -> None:
    result, mask, other = painted(offset=10), nose(), CAT.copy()
    near = dilate(mask, colour_match.CELL_PX)
    other[near] = 255 - other[near]
    fit = fit_colour(result, CAT, mask, method=method)
    same = fit_colour(result, other, mask, method=method)
    assert np.array_equal(fit.apply(result), same.apply(result))


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_not_taken_for_lost_contrast(method: ColourFit) -> None:
    flat = np.full(CAT.shape, 120, np.uint8)
    fit = fit_colour(painted(known=flat, offset=-6, noise=4), flat, nose(), method=method)
    assert fit.gain == pytest.approx((1, 1, 1), abs=0.02)
    assert fit.apply(flat - np.uint8(6))[nose()] == pytest.approx(120, abs=0.5)


def test_noise_around_the_mask_does_not_spread_into_it() -> None:
    flat = np.full(CAT.shape, 120, np.uint8)
    fit = fit_colour(painted(known=flat, offset=-6, noise=4), flat, nose())
    assert fit.apply(flat)[nose()].std() < 0.1


def test_an_object_repainted_outside_the_mask_has_little_influence() -> None:
    result, mask = painted(offset=5), nose()
    result[100:160, 330:390] = 20
    fit = fit_colour(result, CAT, mask)
    assert mean_error(fit, result, mask) < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_unrelated_content_yields_no_gain(method: ColourFit) -> None:
    fit = fit_colour(np.ascontiguousarray(CAT[::-1, ::-1]), CAT, nose(), method=method)
    assert fit.gain == pytest.approx((1, 1, 1), abs=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_noisy_cells_yield_no_gain(method: ColourFit) -> None:
    random = np.random.default_rng(2)
    faint = np.kron(random.integers(118, 123, (6, 6, 1), np.uint8), np.ones((8, 8, 3), np.uint8))
    mask = np.zeros(faint.shape[:2], np.bool_)
    mask[:, :8] = True
    result = painted(known=faint, gain=0.8, offset=20, noise=8)
    fit = fit_colour(result, faint, mask, method=method)
    assert not fit.is_identity
    assert fit.gain == pytest.approx((1, 1, 1), abs=0.08)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_bounded(method: ColourFit) -> None:
    dark = fit_colour(CAT // 3, CAT, nose(), method=method)
    assert dark.gain.max() <= 1.25
    black = np.zeros_like(CAT)
    shift = fit_colour(black, CAT, nose(), method=method).apply(black)
    assert shift.max() <= 24


@pytest.mark.parametrize("method", METHODS)
def test_there_is_no_correction_if_colours_agree_or_little_is_known(method: ColourFit) -> None:
    result, mask = painted(offset=9), nose()
    corner = np.ones(mask.shape, np.bool_)
    corner[:15, :15] = False
    assert fit_colour(painted(noise=1), CAT, mask, method=method).is_identity
    assert fit_colour(result, CAT, corner, method=method).is_identity
    assert fit_colour(result, CAT, np.ones_like(mask), method=method).is_identity


def test_there_is_no_correction_if_the_engine_changed_only_the_mask() -> None:
    result = CAT.copy()
    result[nose()] = 0
    assert fit_colour(result, CAT, nose()).is_identity


def test_a_correction_applied_in_parts_equals_the_whole() -> None:
    result = painted(offset=slope())
    fit = fit_colour(result, CAT, nose())
    whole = fit.apply(result)
    assert np.array_equal(fit.apply(result[37:90, 130:200], (130, 37)), whole[37:90, 130:200])


def test_the_fit_does_not_depend_on_the_tile_size(monkeypatch: pytest.MonkeyPatch) -> None:
    result = painted(offset=slope())
    whole = fit_colour(result, CAT, nose())
    monkeypatch.setattr(colour_match, "TILE_PX", 64)
    assert np.array_equal(fit_colour(result, CAT, nose()).offset, whole.offset)


def test_a_scaled_result_is_compared_farther_from_the_mask() -> None:
    result, mask, other = painted(offset=10), nose(), CAT.copy()
    near = dilate(mask, 24)
    other[near] = 255 - other[near]
    reference = fit_colour(result, CAT, mask, scale=3)
    assert reference.cell_px == 24
    assert np.array_equal(fit_colour(result, other, mask, scale=3).offset, reference.offset)
    assert not np.array_equal(fit_colour(result, other, mask).offset, reference.offset)


def test_the_membrane_solves_its_linear_system() -> None:
    random, shape = np.random.default_rng(1), (29, 37)
    rows, columns = np.indices(shape)
    values = (10 * np.sin(rows / 9) + columns / 5 + random.normal(0, 0.5, shape))[..., None]
    weight = np.ones((*shape, 1))
    weight[8:20, 10:30] = 0
    solved = colour_match._fit_membrane(values.astype(np.float32), weight.astype(np.float32))
    assert solved[..., 0] == pytest.approx(_solve_directly(values[..., 0], weight[..., 0]), abs=0.5)


def _solve_directly(
    values: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    def path_laplacian(n: int) -> NDArray[np.float64]:
        steps = np.diff(np.eye(n), axis=0)
        return steps.T @ steps

    rows, columns = weight.shape
    laplacian = np.kron(path_laplacian(rows), np.eye(columns))
    laplacian += np.kron(np.eye(rows), path_laplacian(columns))
    system = colour_match.STIFFNESS * laplacian + np.diag(weight.ravel())
    return np.linalg.solve(system, (weight * values).ravel()).reshape(weight.shape)
