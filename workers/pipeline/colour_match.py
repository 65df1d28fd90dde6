"""Colour: how an engine's colours become the picture's, learnt where both are known.

An engine paints more than the mask, so around the mask its colours can be compared with the
picture's. Averages over cells of a latent's size carry the comparison: they hold little of
the engine's noise and softness, and a 24-megapixel picture has only 375,000 of them.
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
KNOWN_PIXELS = 256
AGREEMENT = 0.5
GAINS = (0.8, 1.25)
SHIFTS = (-24.0, 24.0)

STIFFNESS = 8.0  # smooths over about sqrt(8) cells
SWEEPS = 16
DAMPING = 0.8
DOUBT = 1.0  # squared levels of contrast between cells, below which no gain shows
DOUBT_CELLS = 64


@dataclass(frozen=True, kw_only=True)
class Correction:
    """``gain * value + offset`` on values of 0 to 255.

    gain: (3,) float32. offset: (rows, columns, 3) float32, at the centres of cells of
    ``cell_px``, linear between them and constant past the outermost ones.
    """

    gain: NDArray[np.float32] = field(default_factory=lambda: np.ones(3, np.float32))
    offset: Cells = field(default_factory=lambda: np.zeros((1, 1, 3), np.float32))
    cell_px: int = CELL_PX

    @property
    def is_identity(self) -> bool:
        return bool((self.gain == 1).all() and not self.offset.any())

    def apply(self, rgb: Pixels, at: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
        """(h, w, 3) float32, clipped to 0..255, of pixels whose first lies ``at`` (left, top)."""
        fitted = rgb.astype(np.float32)
        if self.is_identity:
            return fitted
        left, top = at
        rows = _between(self.offset, (np.arange(top, top + rgb.shape[0]) + 0.5) / self.cell_px, 0)
        columns = (np.arange(left, left + rgb.shape[1]) + 0.5) / self.cell_px
        fitted *= self.gain
        fitted += _between(rows, columns, 1)
        return np.clip(fitted, 0, 255, out=fitted)


def fit_colour(
    painted: Pixels,
    known: Pixels,
    mask: Mask,
    *,
    method: ColourFit = "membrane",
    scale: float = 1.0,
) -> Correction:
    """How the painted colours become the known ones; all of one (h, w).

    ``ring`` learns one gain and offset from a ring around the mask; ``membrane`` lets the
    offset vary smoothly over the region, as light does. Both are bounded, and there is no
    change where little is known, where the colours agree already, or where the engine left
    everything outside the mask alone. scale: picture pixels to an engine pixel.

    The model is Speckman's partial linear one (1988): what is smooth in both pictures gives
    the offset, what is left the gain.
    """
    if method == "off":
        return Correction()
    cell_px = CELL_PX * ceil(scale)
    reach = ceil(CELL_PX * scale)
    weight, ours, theirs = _known_cells(
        painted, known, mask, cell_px, (reach, reach + RING_PX if method == "ring" else None)
    )
    if weight.sum() * cell_px**2 < KNOWN_PIXELS or np.array_equal(ours, theirs):
        return Correction()
    fit = _robust_fit(weight, ours, theirs, smooth=method == "membrane")
    left_over = fit.gain * ours + fit.offset - ours
    if (np.average(left_over**2, axis=(0, 1), weights=weight[..., 0]) < AGREEMENT**2).all():
        return Correction()
    return Correction(gain=fit.gain, offset=fit.offset, cell_px=cell_px)


def _known_cells(
    painted: Pixels, known: Pixels, mask: Mask, cell_px: int, reach: tuple[int, int | None]
) -> tuple[Cells, Cells, Cells]:
    """Known share (rows, columns, 1), 0 to 1, and mean colours (rows, columns, 3) of each cell.

    reach: a pixel counts farther from the mask than the first, and no farther than the second.
    """
    height, width = mask.shape
    rows, columns = -(-height // cell_px), -(-width // cell_px)
    sums = np.zeros((rows, columns, 7), np.float32)
    across = max(TILE_PX // cell_px, 1)
    for row in range(0, rows, across):
        for column in range(0, columns, across):
            tile = Box(column, row, column + across, row + across)
            box = Box(*(edge * cell_px for edge in tile)).clipped((width, height))
            usable = _usable(mask, box, *reach)[..., None]
            if usable.any():
                layers = np.concatenate(
                    [usable, painted[slices(box)] * usable, known[slices(box)] * usable], axis=-1
                )
                sums[slices(tile)] = _sums(layers, cell_px)
    known_pixels, many = sums[..., :1], np.maximum(sums[..., :1], 1)
    means = np.divide(sums[..., 1:], many, dtype=np.float32)
    weight = np.divide(known_pixels, cell_px**2, dtype=np.float32)
    return weight, means[..., :3], means[..., 3:]


def _usable(mask: Mask, box: Box, gap: int, end: int | None) -> Mask:
    squares = squared_distances(mask, box, end or gap)
    usable: Mask = squares > gap * gap
    return usable if end is None else usable & (squares <= end * end)


def _sums(layers: NDArray[np.uint8], step: int) -> NDArray[np.uint32]:
    """Totals of (h, w, C) over squares of ``step``; the last ones may be cut off."""
    down = np.add.reduceat(layers, range(0, layers.shape[0], step), axis=0, dtype=np.uint32)
    total: NDArray[np.uint32] = np.add.reduceat(down, range(0, down.shape[1], step), axis=1)
    return total


def _robust_fit(weight: Cells, ours: Cells, theirs: Cells, *, smooth: bool) -> Correction:
    """Fitted twice: what the first fit shows to be painted anew counts for little in the second."""
    draft = _fit(weight, ours, theirs, smooth=smooth)
    squares = ((draft.gain * ours + draft.offset - theirs) ** 2).sum(axis=2, keepdims=True)
    typical = np.median(squares[weight > 0]) + AGREEMENT**2
    trust: Cells = weight / (1 + squares / (9 * typical))  # Cauchy's weights
    return _fit(trust, ours, theirs, smooth=smooth)


def _fit(weight: Cells, ours: Cells, theirs: Cells, *, smooth: bool) -> Correction:
    both = np.concatenate([ours, theirs], axis=2)
    level = _smooth(both, weight) if smooth else _mean(both, weight)
    own, their = level[..., :3], level[..., 3:]
    gain = _gain(weight, ours - own, theirs - their)
    # The shift of the local colour is what is bounded, whatever the gain adds to it at 0.
    offset = np.clip(their - own, *SHIFTS) + (1 - gain) * own
    return Correction(gain=gain, offset=offset)


def _gain(weight: Cells, ours: Cells, theirs: Cells) -> NDArray[np.float32]:
    """(3,) of theirs over ours, from their deviations; near 1 where these tell little.

    The known colours explain the painted ones, which have the noise; a regression the other
    way round would take noise for lost contrast. Squared correlation discounts what the
    engine painted anew.
    """
    doubt = DOUBT * (weight.sum() + DOUBT_CELLS)
    together, own, their = (
        (weight * one * other).sum(axis=(0, 1))
        for one, other in ((ours, theirs), (ours, ours), (theirs, theirs))
    )
    slope = np.maximum(together + doubt, doubt) / (their + doubt)
    certain = together**2 / ((own + doubt) * (their + doubt))
    gain: NDArray[np.float32] = 1 + certain * (np.clip(1 / slope, *GAINS) - 1)
    return gain.astype(np.float32)


def _mean(values: Cells, weight: Cells) -> Cells:
    mean: Cells = (weight * values).sum(axis=(0, 1), keepdims=True) / max(weight.sum(), 1e-6)
    return mean


def _smooth(values: Cells, weight: Cells) -> Cells:
    """The membrane u with the least sum of weight * (u - values)^2 + STIFFNESS * |grad u|^2.

    Where nothing is known it is harmonic, as in Poisson image editing (Perez et al. 2003).
    Solved from coarse to fine, each grid starting from the one of half its size, with damped
    Jacobi sweeps (cascadic multigrid, Bornemann and Deuflhard 1996). The stiffness is the
    same on every grid: in two dimensions the gradient's energy does not depend on the scale.
    """
    pull: Cells = weight * values
    if max(weight.shape) > 2:
        known = _halved(weight)
        means = np.divide(_halved(pull), np.maximum(known, 1e-6), dtype=np.float32)
        level = _doubled(_smooth(means, known), weight.shape[:2])
    else:
        level = np.broadcast_to(_mean(values, weight), values.shape)
    stiff, damping = np.float32(STIFFNESS), np.float32(DAMPING)
    total = weight + stiff * _neighbours(np.ones_like(weight)) + np.float32(1e-6)
    for _ in range(SWEEPS):
        wanted = np.divide(pull + stiff * _neighbours(level), total, dtype=np.float32)
        level = level + damping * (wanted - level)
    return level


def _neighbours(cells: Cells) -> Cells:
    """The sum of the four cells beside each; none beyond the edges."""
    total = np.zeros_like(cells)
    total[1:] += cells[:-1]
    total[:-1] += cells[1:]
    total[:, 1:] += cells[:, :-1]
    total[:, :-1] += cells[:, 1:]
    return total


def _halved(cells: Cells) -> Cells:
    rows, columns = cells.shape[:2]
    down = np.add.reduceat(cells, range(0, rows, 2), axis=0)
    total: Cells = np.add.reduceat(down, range(0, columns, 2), axis=1)
    return total


def _doubled(cells: Cells, shape: tuple[int, int]) -> Cells:
    places = [(np.arange(length) + 0.5) / 2 for length in shape]
    return _between(_between(cells, places[0], 0), places[1], 1)


def _between(cells: Cells, places: NDArray[np.float64], axis: int) -> Cells:
    """Linear along an axis, at places counted in cells from the first one's edge."""
    last = cells.shape[axis] - 1
    at = np.clip(places - 0.5, 0, last)
    low = at.astype(np.intp)
    share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    one, other = cells.take(low, axis), cells.take(np.minimum(low + 1, last), axis)
    found: Cells = one + share * (other - one)
    return found
