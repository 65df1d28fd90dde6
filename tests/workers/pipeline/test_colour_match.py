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
    """(1, px, 1): light that rises from left to right by twice the height."""
    return np.linspace(-height, height, px)[None, :, None]


def error(fit: Correction, picture: NDArray[np.uint8], where: NDArray[np.bool_]) -> float:
    return float(np.abs(fit.apply(picture) - CAT)[where].mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_cast_is_undone_inside_the_mask(method: ColourFit) -> None:
    picture, mask = painted(gain=0.92, offset=9), nose()
    fit = fit_colour(picture, CAT, mask, method=method)
    assert fit.gain == pytest.approx((1 / 0.92,) * 3, abs=0.02)
    assert error(fit, picture, mask) < 1


def test_light_that_changes_over_the_picture_is_undone_by_the_membrane_alone() -> None:
    picture, mask = painted(offset=slope()), nose()
    assert error(fit_colour(picture, CAT, mask), picture, mask) < 0.7
    assert error(fit_colour(picture, CAT, mask, method="ring"), picture, mask) > 1


def test_off_changes_nothing() -> None:
    picture = painted(offset=20)
    fit = fit_colour(picture, CAT, nose(), method="off")
    assert fit.is_identity
    assert np.array_equal(fit.apply(picture), picture)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_under_the_mask_and_beside_it_does_not_count(method: ColourFit) -> None:
    picture, mask, other = painted(offset=10), nose(), CAT.copy()
    near = dilate(mask, colour_match.CELL_PX)
    other[near] = 255 - other[near]
    fit = fit_colour(picture, CAT, mask, method=method)
    same = fit_colour(picture, other, mask, method=method)
    assert np.array_equal(fit.apply(picture), same.apply(picture))


@pytest.mark.parametrize("method", METHODS)
def test_noise_passes_for_no_lost_contrast(method: ColourFit) -> None:
    flat = np.full(CAT.shape, 120, np.uint8)
    fit = fit_colour(painted(known=flat, offset=-6, noise=4), flat, nose(), method=method)
    assert fit.gain == pytest.approx((1, 1, 1), abs=0.02)
    assert fit.apply(flat - np.uint8(6))[nose()] == pytest.approx(120, abs=0.5)


def test_noise_around_the_mask_is_not_smeared_into_it() -> None:
    flat = np.full(CAT.shape, 120, np.uint8)
    fit = fit_colour(painted(known=flat, offset=-6, noise=4), flat, nose())
    assert fit.apply(flat)[nose()].std() < 0.1


def test_a_thing_painted_anew_outside_the_mask_counts_for_little() -> None:
    picture, mask = painted(offset=5), nose()
    picture[100:160, 330:390] = 20
    fit = fit_colour(picture, CAT, mask)
    assert error(fit, picture, mask) < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_painted_anew_tells_no_gain(method: ColourFit) -> None:
    fit = fit_colour(np.ascontiguousarray(CAT[::-1, ::-1]), CAT, nose(), method=method)
    assert fit.gain == pytest.approx((1, 1, 1), abs=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_noisy_cells_tell_no_gain(method: ColourFit) -> None:
    random = np.random.default_rng(2)
    faint = np.kron(random.integers(118, 123, (6, 6, 1), np.uint8), np.ones((8, 8, 3), np.uint8))
    mask = np.zeros(faint.shape[:2], np.bool_)
    mask[:, :8] = True
    picture = painted(known=faint, gain=0.8, offset=20, noise=8)
    fit = fit_colour(picture, faint, mask, method=method)
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
def test_no_fit_where_the_colours_agree_or_little_is_known(method: ColourFit) -> None:
    picture, mask = painted(offset=9), nose()
    corner = np.ones(mask.shape, np.bool_)
    corner[:15, :15] = False
    assert fit_colour(painted(noise=1), CAT, mask, method=method).is_identity
    assert fit_colour(picture, CAT, corner, method=method).is_identity
    assert fit_colour(picture, CAT, np.ones_like(mask), method=method).is_identity


def test_an_engine_that_left_the_rest_alone_gets_no_fit() -> None:
    picture = CAT.copy()
    picture[nose()] = 0
    assert fit_colour(picture, CAT, nose()).is_identity


def test_a_fit_applied_in_parts_is_the_fit() -> None:
    picture = painted(offset=slope())
    fit = fit_colour(picture, CAT, nose())
    whole = fit.apply(picture)
    assert np.array_equal(fit.apply(picture[37:90, 130:200], (130, 37)), whole[37:90, 130:200])


def test_tiles_do_not_show_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = painted(offset=slope())
    whole = fit_colour(picture, CAT, nose())
    monkeypatch.setattr(colour_match, "TILE_PX", 64)
    assert np.array_equal(fit_colour(picture, CAT, nose()).offset, whole.offset)


def test_a_scaled_result_is_compared_farther_from_the_mask() -> None:
    picture, mask, other = painted(offset=10), nose(), CAT.copy()
    near = dilate(mask, 24)
    other[near] = 255 - other[near]
    honest = fit_colour(picture, CAT, mask, scale=3)
    assert honest.cell_px == 24
    assert np.array_equal(fit_colour(picture, other, mask, scale=3).offset, honest.offset)
    assert not np.array_equal(fit_colour(picture, other, mask).offset, honest.offset)


def test_the_membrane_solves_its_equation() -> None:
    random, shape = np.random.default_rng(1), (29, 37)
    rows, columns = np.indices(shape)
    values = (10 * np.sin(rows / 9) + columns / 5 + random.normal(0, 0.5, shape))[..., None]
    weight = np.ones((*shape, 1))
    weight[8:20, 10:30] = 0
    found = colour_match._smooth(values.astype(np.float32), weight.astype(np.float32))
    assert found[..., 0] == pytest.approx(_membrane(values[..., 0], weight[..., 0]), abs=0.5)


def _membrane(values: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    def path(n: int) -> NDArray[np.float64]:
        steps = np.diff(np.eye(n), axis=0)
        return steps.T @ steps

    rows, columns = weight.shape
    laplacian = np.kron(path(rows), np.eye(columns)) + np.kron(np.eye(rows), path(columns))
    system = colour_match.STIFFNESS * laplacian + np.diag(weight.ravel())
    return np.linalg.solve(system, (weight * values).ravel()).reshape(weight.shape)
