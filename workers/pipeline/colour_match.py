"""Colour match: fit an engine's colours to the image's, where both are known.

An engine paints more than the mask, so around the mask its colours can be compared with the
image's. Averages over cells of a latent's size carry the comparison: they hold little of the
engine's noise and blur, and a 24-megapixel image has only 375,000 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from shared.geometry.box import Box
from shared.masks import TILE_PX, Mask, slices, squared_distances
from shared.params import ColourFit

Pixels = NDArray[np.uint8]
Cells = NDArray[np.float32]  # (rows, columns, channels)

CELL_PX = 8  # a latent's side: engines repaint whole latents, so nearer pixels are not known
RING_PX = 16
MIN_KNOWN_PIXELS = 256
MIN_RMS = 0.5  # levels; a smaller correction is not worth applying
GAIN_LIMITS = (0.8, 1.25)
SHIFT_LIMITS = (-24.0, 24.0)

STIFFNESS = 8.0  # smooths over about sqrt(8) cells
SWEEPS = 16
DAMPING = 0.8
# Ridge of the gain's regression: with less variance between cells (squared levels) than this,
# or with few cells, the gain stays near 1.
RIDGE = 1.0
RIDGE_CELLS = 64


@dataclass(frozen=True, kw_only=True)
class Correction:
    """``gain * value + offset`` on values of 0 to 255.

    gain: (3,) float32. offset: (rows, columns, 3) float32, at the centres of cells of
    ``cell_px``, bilinear between them and constant past the outermost ones.
    """

    gain: NDArray[np.float32] = field(default_factory=lambda: np.ones(3, np.float32))
    offset: Cells = field(default_factory=lambda: np.zeros((1, 1, 3), np.float32))
    cell_px: int = CELL_PX

    @property
    def is_identity(self) -> bool:
        return bool((self.gain == 1).all() and not self.offset.any())

    def apply(self, rgb: Pixels, at: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
        """(h, w, 3) float32, clipped to 0..255. at: (left, top) of ``rgb`` in the fitted region."""
        corrected = rgb.astype(np.float32)
        if self.is_identity:
            return corrected
        left, top = at
        rows = (np.arange(top, top + rgb.shape[0]) + 0.5) / self.cell_px
        columns = (np.arange(left, left + rgb.shape[1]) + 0.5) / self.cell_px
        corrected *= self.gain
        corrected += _interpolate(_interpolate(self.offset, rows, 0), columns, 1)
        return np.clip(corrected, 0, 255, out=corrected)


def fit_colour(
    painted: Pixels,
    known: Pixels,
    mask: Mask,
    *,
    method: ColourFit = "membrane",
    scale: float = 1.0,
) -> Correction:
    """Fit the correction that maps the painted colours to the known ones around the mask.

    painted, known: (h, w, 3). mask: (h, w). scale: image pixels per engine pixel.
    ``ring`` fits one gain and offset to a ring around the mask; ``membrane`` lets the offset
    vary smoothly over the region, as light does. Both are bounded. The identity is returned
    if few pixels are known, if the colours agree already, or if the engine left everything
    outside the mask unchanged.

    The model is a partial linear one (Speckman, 1988): the smooth parts of both images
    determine the offset, the remainders the gain.
    """
    if method == "off":
        return Correction()
    cell_px = CELL_PX * ceil(scale)
    gap = ceil(CELL_PX * scale)
    weight, painted_cells, known_cells = _average_cells(
        painted, known, mask, cell_px, (gap, gap + RING_PX if method == "ring" else None)
    )
    known_pixels = weight.sum() * cell_px**2
    if known_pixels < MIN_KNOWN_PIXELS or np.array_equal(painted_cells, known_cells):
        return Correction()
    fit = _fit_robustly(weight, painted_cells, known_cells, smooth=method == "membrane")
    shift = fit.gain * painted_cells + fit.offset - painted_cells
    if (np.average(shift**2, axis=(0, 1), weights=weight[..., 0]) < MIN_RMS**2).all():
        return Correction()
    return Correction(gain=fit.gain, offset=fit.offset, cell_px=cell_px)


def _average_cells(
    painted: Pixels, known: Pixels, mask: Mask, cell_px: int, reach: tuple[int, int | None]
) -> tuple[Cells, Cells, Cells]:
    """Known share (rows, columns, 1), 0 to 1, and mean colours (rows, columns, 3) per cell.

    reach: (gap, end); a pixel is known if gap < distance to the mask <= end.
    """
    height, width = mask.shape
    rows, columns = -(-height // cell_px), -(-width // cell_px)
    sums = np.zeros((rows, columns, 7), np.float32)
    # Whole cells per tile, so that no cell is summed in two parts.
    tile_cells = max(TILE_PX // cell_px, 1)
    for row in range(0, rows, tile_cells):
        for column in range(0, columns, tile_cells):
            cells = Box(column, row, column + tile_cells, row + tile_cells)
            box = Box(*(edge * cell_px for edge in cells)).clipped((width, height))
            usable = _find_known(mask, box, *reach)[..., None]
            if usable.any():
                layers = np.concatenate(
                    [usable, painted[slices(box)] * usable, known[slices(box)] * usable], axis=-1
                )
                sums[slices(cells)] = _sum_blocks(layers, cell_px)
    counts = sums[..., :1]
    means = np.divide(sums[..., 1:], np.maximum(counts, 1), dtype=np.float32)
    weight = np.divide(counts, cell_px**2, dtype=np.float32)
    return weight, means[..., :3], means[..., 3:]


def _find_known(mask: Mask, box: Box, gap: int, end: int | None) -> Mask:
    squares = squared_distances(mask, box, end or gap)
    beyond_gap: Mask = squares > gap * gap
    return beyond_gap if end is None else beyond_gap & (squares <= end * end)


def _sum_blocks(layers: NDArray[np.uint8], side: int) -> NDArray[np.uint32]:
    """Sums of (h, w, C) over squares of ``side``; the last row and column may be incomplete."""
    rows = np.add.reduceat(layers, range(0, layers.shape[0], side), axis=0, dtype=np.uint32)
    total: NDArray[np.uint32] = np.add.reduceat(rows, range(0, rows.shape[1], side), axis=1)
    return total


# --- gain and offset -------------------------------------------------------------------------


def _fit_robustly(weight: Cells, painted: Cells, known: Cells, *, smooth: bool) -> Correction:
    """Robust fit: outliers of the first fit are down-weighted (Cauchy) in the second.

    weight / (1 + r^2 / c^2), with c three times the typical residual.
    """
    first = _fit(weight, painted, known, smooth=smooth)
    residuals = first.gain * painted + first.offset - known
    squares = (residuals**2).sum(axis=2, keepdims=True)
    typical = np.median(squares[weight > 0]) + MIN_RMS**2
    robust: Cells = weight / (1 + squares / (9 * typical))
    return _fit(robust, painted, known, smooth=smooth)


def _fit(weight: Cells, painted: Cells, known: Cells, *, smooth: bool) -> Correction:
    both = np.concatenate([painted, known], axis=2)
    level = _fit_membrane(both, weight) if smooth else _weighted_mean(both, weight)
    painted_level, known_level = level[..., :3], level[..., 3:]
    gain = _fit_gain(weight, painted - painted_level, known - known_level)
    # The shift of the local mean is bounded, not the offset: a gain alone changes the offset.
    shift = np.clip(known_level - painted_level, *SHIFT_LIMITS)
    return Correction(gain=gain, offset=shift + (1 - gain) * painted_level)


def _fit_gain(weight: Cells, painted: Cells, known: Cells) -> NDArray[np.float32]:
    """(3,) the gain from painted to known deviations: 1 + r^2 * (1 / slope - 1), bounded.

    slope is that of a ridge regression, with a prior of 1, of the painted on the known
    deviations, because the painted ones have the noise; regressing the other way round would
    take noise for lost contrast. r^2, the squared correlation, discounts repainted content.
    """
    ridge = RIDGE * (weight.sum() + RIDGE_CELLS)
    covariance, painted_variance, known_variance = (
        (weight * first * second).sum(axis=(0, 1))
        for first, second in ((painted, known), (painted, painted), (known, known))
    )
    slope = np.maximum(covariance + ridge, ridge) / (known_variance + ridge)
    squared_correlation = covariance**2 / ((painted_variance + ridge) * (known_variance + ridge))
    gain: NDArray[np.float32] = 1 + squared_correlation * (np.clip(1 / slope, *GAIN_LIMITS) - 1)
    return gain.astype(np.float32)


def _weighted_mean(values: Cells, weight: Cells) -> Cells:
    mean: Cells = (weight * values).sum(axis=(0, 1), keepdims=True) / max(weight.sum(), 1e-6)
    return mean


# --- membrane --------------------------------------------------------------------------------


def _fit_membrane(values: Cells, weight: Cells) -> Cells:
    """The u that minimises sum(weight * (u - values)^2) + STIFFNESS * sum(|grad u|^2).

    Where nothing is known u is harmonic, as in Poisson image editing (Perez et al., 2003).
    Solved from coarse to fine, each grid starting from the solution of the grid of half its
    size, with damped Jacobi sweeps (cascadic multigrid, Bornemann and Deuflhard, 1996).
    """
    pull: Cells = weight * values
    if max(weight.shape) > 2:
        coarse_weight = _halve(weight)
        means = np.divide(_halve(pull), np.maximum(coarse_weight, 1e-6), dtype=np.float32)
        level = _double(_fit_membrane(means, coarse_weight), weight.shape[:2])
    else:
        level = np.broadcast_to(_weighted_mean(values, weight), values.shape)
    # The same on every grid: in two dimensions the gradient's energy is independent of scale.
    stiff, damping = np.float32(STIFFNESS), np.float32(DAMPING)
    diagonal = weight + stiff * _sum_neighbours(np.ones_like(weight)) + np.float32(1e-6)
    for _ in range(SWEEPS):
        solved = np.divide(pull + stiff * _sum_neighbours(level), diagonal, dtype=np.float32)
        level = level + damping * (solved - level)
    return level


def _sum_neighbours(cells: Cells) -> Cells:
    """The sum of the four adjacent cells; 0 beyond the edges."""
    total = np.zeros_like(cells)
    total[1:] += cells[:-1]
    total[:-1] += cells[1:]
    total[:, 1:] += cells[:, :-1]
    total[:, :-1] += cells[:, 1:]
    return total


def _halve(cells: Cells) -> Cells:
    """Sums over 2x2 cells."""
    rows, columns = cells.shape[:2]
    row_sums = np.add.reduceat(cells, range(0, rows, 2), axis=0)
    total: Cells = np.add.reduceat(row_sums, range(0, columns, 2), axis=1)
    return total


def _double(cells: Cells, shape: tuple[int, int]) -> Cells:
    rows, columns = ((np.arange(length) + 0.5) / 2 for length in shape)
    return _interpolate(_interpolate(cells, rows, 0), columns, 1)


def _interpolate(cells: Cells, positions: NDArray[np.float64], axis: int) -> Cells:
    """Linear along an axis. positions: in cells from the first one's edge; its centre is 0.5."""
    last = cells.shape[axis] - 1
    index = np.clip(positions - 0.5, 0, last)
    low = index.astype(np.intp)
    share = (index - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    start, end = cells.take(low, axis), cells.take(np.minimum(low + 1, last), axis)
    values: Cells = start + share * (end - start)
    return values
