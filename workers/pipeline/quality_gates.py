"""Quality gates: metrics of a result and their limits.

Nothing here knows what the right content under the mask is. The metrics measure what only a
failed result has: NaN or infinite values, black, the mark unchanged, a seam along the mask, a
colour cast. A mask that follows an object's outline has a seam by nature: use ``gate=review``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import (
    GateBlack,
    GateColour,
    GateError,
    GateNotFinite,
    GateSeam,
    GateUnchanged,
)
from shared.geometry.box import Box
from shared.geometry.regions import Region
from shared.images import DecodedImage, as_rgb
from shared.masks import Mask, bounding_box, slices

Rgb = NDArray[np.uint8]  # (h, w, 3)
Samples = NDArray[np.float32]  # (n, 3) RGB, 0 to 255
Indices = tuple[NDArray[np.intp], NDArray[np.intp]]  # rows and columns, (n,) each

# Limits were chosen with tests/benchmarks/gates.py, which reports hits and false alarms.
SEAM_LIMIT = 2.0
COLOUR_LIMIT = 10.0
CHANGE_LIMIT = 0.05  # a VAE round trip alone changes far more, whatever the strength
BLACK_SHARE = 0.98
BLACK_LEVEL = 26  # the colour fit lifts black by up to 24
BLACK_SPREAD = 4.0  # a higher standard deviation is texture, not a black rectangle
MIN_BLACK_PIXELS = 36  # fewer may be part of a black letter
MIN_CONTRAST = 6.0  # RMS levels; below it there was no mark to remove

MAX_SAMPLES = 100_000
MIN_EDGE_PIXELS = 8
MAX_STEP_PX = 16
# Added to a gradient before its logarithm, so that noise on plain ground has ratios near 1.
GRADIENT_FLOOR = 4.0
JUMP_CAP = 48.0  # levels; one pixel on an object's edge must not decide the mean
CORRELATED_PIXELS = 4  # neighbours along an edge are about as informative as one sample
SEAM_Z, COLOUR_Z = 1.25, 2.0  # standard errors below the mean
MIN_ALPHA = 128
FAILED_EXCESS = 100.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics of the worst region; None if there was nothing to compare with.

    finite: whether all values of the engine's results are finite.
    black: share of the repainted pixels that are black although their surroundings are not.
    change: RMS change under the mask / RMS contrast of the original content against a plane
    fitted to its surroundings.
    seam: gradient across the mask's edge / gradient just outside it, as the geometric mean of
    the ratios; 1 is no seam.
    colour_jump: difference of the mean colours on the two sides of the mask's edge, in levels
    of 0 to 255. Seam and colour jump are lower confidence bounds.
    """

    finite: bool = True
    black: float = 0.0
    change: float | None = None
    seam: float | None = None
    colour_jump: float | None = None

    @property
    def score(self) -> float:
        """1 / (1 + max(excess)^2): 1 is the best, 0 the worst; a gate fails at 0.5 and below."""
        return 1 / (1 + max(gate.excess(self) for gate in _GATES) ** 2)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def examine(
    before: DecodedImage,
    after: DecodedImage,
    mask: Mask,
    plan: Sequence[Region],
    results: Sequence[NDArray[Any]],
    *,
    feather_px: int = 0,
) -> Scores:
    """Measure the composited image against its source, region by region.

    mask: (H, W) True = repaint, as it was planned. results: the engine's, one per region.
    Only the mask's bounding box in each region is read, so a small mark is cheap in any image.
    """
    if not all(_is_finite(result) for result in results):
        return Scores(finite=False)
    boxes = _mask_boxes(mask, plan)
    scores = [_examine_box(before, after, mask, box, feather_px) for box in boxes]
    return Scores(
        black=_worst(max, (score.black for score in scores)) or 0.0,
        change=_worst(min, (score.change for score in scores)),
        seam=_worst(max, (score.seam for score in scores)),
        colour_jump=_worst(max, (score.colour_jump for score in scores)),
    )


def verdict(scores: Scores, *, remedy: str) -> GateError | None:
    """The error of the first gate that fails, with its metric and the remedy; None if all pass."""
    for gate in _GATES:
        if gate.excess(scores) >= 1:
            return gate.error(f"{gate.message(scores)}; {remedy}, or gate=review to inspect it")
    return None


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """excess: the gate's metric / its limit; the gate fails from 1."""

    error: type[GateError]
    excess: Callable[[Scores], float]
    message: Callable[[Scores], str]


# In this order: a result that is not finite or black has a meaningless seam.
_GATES = (
    _Gate(
        error=GateNotFinite,
        excess=lambda scores: 0.0 if scores.finite else FAILED_EXCESS,
        message=lambda _: "the engine returned NaN or infinite values",
    ),
    _Gate(
        error=GateBlack,
        excess=lambda scores: FAILED_EXCESS if scores.black >= BLACK_SHARE else 0.0,
        message=lambda scores: (
            f"{scores.black:.0%} of a region is black, and its surroundings are not"
        ),
    ),
    _Gate(
        error=GateUnchanged,
        excess=lambda scores: (
            0.0 if scores.change is None else CHANGE_LIMIT / max(scores.change, 1e-3)
        ),
        message=lambda scores: (
            f"a region is unchanged: it differs by {scores.change:.1%} of the contrast under the "
            f"mask (at least {CHANGE_LIMIT:.0%})"
        ),
    ),
    _Gate(
        error=GateSeam,
        excess=lambda scores: (scores.seam or 0.0) / SEAM_LIMIT,
        message=lambda scores: (
            f"a seam: the gradient across the mask's edge is {scores.seam:.1f} times the gradient "
            f"just outside (below {SEAM_LIMIT:g})"
        ),
    ),
    _Gate(
        error=GateColour,
        excess=lambda scores: (scores.colour_jump or 0.0) / COLOUR_LIMIT,
        message=lambda scores: (
            f"the colour jumps by {scores.colour_jump:.0f} levels at the mask's edge "
            f"(below {COLOUR_LIMIT:g})"
        ),
    ),
)


def _worst(choose: Callable[..., float], metrics: Iterable[float | None]) -> float | None:
    known = [metric for metric in metrics if metric is not None]
    return choose(known) if known else None


def _is_finite(result: NDArray[Any]) -> bool:
    return result.dtype.kind in "biu" or bool(np.isfinite(result).all())


def _mask_boxes(mask: Mask, plan: Sequence[Region]) -> Iterator[Box]:
    """The mask's bounding box in each region, in image pixels."""
    for region in plan:
        box = region.box.clipped((mask.shape[1], mask.shape[0]))
        tight = bounding_box(mask[slices(box)])
        if tight is not None:
            yield tight.moved(box.left, box.top)


def _examine_box(
    before: DecodedImage, after: DecodedImage, mask: Mask, box: Box, feather_px: int
) -> Scores:
    # Known pixels lie past the feather; those inside it are mixtures.
    step = min(feather_px + 1, MAX_STEP_PX)
    reach = 2 * step
    around = Box(box.left - reach, box.top - reach, box.right + reach, box.bottom + reach)
    index = slices(around.clipped(before.size))
    masked, old, new = mask[index], _read_rgb(before, index), _read_rgb(after, index)
    visible = _find_visible(after, index)
    edge = _find_edge(masked, visible, 1)
    known = (edge if step == 1 else _find_edge(masked, visible, step)).known
    bounds = [_seam_and_jump(*colours) for colours in _edge_colours(old, new, edge, feather_px)]
    return Scores(
        black=_black_share(old, new, _sample(masked), known),
        change=_relative_change(old, new, _sample(masked & _find_visible(before, index)), known),
        seam=max((seam for seam, _ in bounds), default=None),
        colour_jump=max((jump for _, jump in bounds), default=None),
    )


def _read_rgb(image: DecodedImage, index: tuple[slice, slice]) -> Rgb:
    return as_rgb(image.pixels[index], image.mode)


def _find_visible(image: DecodedImage, index: tuple[slice, slice]) -> Mask:
    """(h, w) True where alpha is at least half: transparent pixels may have any colour."""
    alpha = image.alpha()
    if alpha is None:
        return np.ones(image.pixels[index].shape[:2], np.bool_)
    visible: Mask = alpha[index] >= MIN_ALPHA
    return visible


def _sample(mask: Mask) -> Indices:
    """The mask's pixels, on a coarser grid if there are more than MAX_SAMPLES."""
    step = ceil(sqrt(np.count_nonzero(mask) / MAX_SAMPLES)) or 1
    rows, columns = np.nonzero(mask[::step, ::step])
    return rows * step, columns * step


# --- under the mask --------------------------------------------------------------------------


def _black_share(old: Rgb, new: Rgb, inside: Indices, known: Indices) -> float:
    """The share of black pixels inside; 0 if they have texture or lie in black surroundings."""
    brightness = new[inside].max(axis=1)
    if len(brightness) < MIN_BLACK_PIXELS or brightness.std() > BLACK_SPREAD:
        return 0.0
    surroundings = new[known] if len(known[0]) >= MIN_EDGE_PIXELS else old[inside]
    if (surroundings.max(axis=1) <= BLACK_LEVEL).mean() > 0.5:
        return 0.0
    return float((brightness <= BLACK_LEVEL).mean())


def _relative_change(old: Rgb, new: Rgb, inside: Indices, known: Indices) -> float | None:
    """RMS(new - old) / RMS(old - plane), the plane fitted to the surroundings.

    None if the old content hardly differs from the plane: plain ground may come back unchanged.
    """
    if not len(inside[0]):
        return None
    surroundings = known if len(known[0]) >= MIN_EDGE_PIXELS else inside
    content = old[inside].astype(np.float32)
    plane = _fit_plane(old[surroundings].astype(np.float32), surroundings, inside)
    contrast = _rms(content - plane)
    return _rms(new[inside] - content) / contrast if contrast >= MIN_CONTRAST else None


def _fit_plane(colours: Samples, known: Indices, wanted: Indices) -> Samples:
    """(n, 3) values at ``wanted`` of the least-squares plane through the known colours."""
    coefficients = np.linalg.lstsq(_design_matrix(known), colours, rcond=None)[0]
    plane: Samples = _design_matrix(wanted) @ coefficients
    return plane


def _design_matrix(indices: Indices) -> NDArray[np.float32]:
    """(n, 3) rows of [1, y, x], in hundreds of pixels to keep float32 accurate."""
    rows, columns = (index.astype(np.float32) / 100 for index in indices)
    return np.stack([np.ones_like(rows), rows, columns], axis=1)


def _rms(values: Samples) -> float:
    return sqrt(float(np.mean(np.square(values))))


# --- at the mask's edge ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _EdgePixels:
    """Triples of pixels in a line across the mask's edge, (n,) each.

    inside: masked, at the edge. outside: known, one step away. beyond: known, two steps away.
    """

    inside: Indices
    outside: Indices
    beyond: Indices

    def __len__(self) -> int:
        return len(self.inside[0])

    @property
    def known(self) -> Indices:
        rows, columns = (
            np.concatenate(pair) for pair in zip(self.outside, self.beyond, strict=True)
        )
        return rows, columns


def _find_edge(mask: Mask, visible: Mask, step: int) -> _EdgePixels:
    """The edge pixels in four directions whose outer pixels are all unmasked and visible."""
    directions = ((0, 1), (0, -1), (1, 0), (-1, 0))
    triples = [_find_edge_towards(mask, visible, step, *direction) for direction in directions]
    inside, outside, beyond = (
        (
            np.concatenate([triple[n][0] for triple in triples]),
            np.concatenate([triple[n][1] for triple in triples]),
        )
        for n in range(3)
    )
    return _EdgePixels(inside=inside, outside=outside, beyond=beyond)


def _find_edge_towards(
    mask: Mask, visible: Mask, step: int, down: int, right: int
) -> tuple[Indices, Indices, Indices]:
    rows, columns = _find_boundary(mask, down, right)
    last = rows + 2 * step * down, columns + 2 * step * right
    within = (last[0] >= 0) & (last[0] < mask.shape[0])
    within &= (last[1] >= 0) & (last[1] < mask.shape[1])
    rows, columns = rows[within], columns[within]
    usable = visible[rows, columns]
    for distance in range(1, 2 * step + 1):
        index = rows + distance * down, columns + distance * right
        usable &= visible[index] & ~mask[index]
    rows, columns = rows[usable], columns[usable]
    inside, outside, beyond = (
        (rows + distance * down, columns + distance * right) for distance in (0, step, 2 * step)
    )
    return inside, outside, beyond


def _find_boundary(mask: Mask, down: int, right: int) -> Indices:
    """Masked pixels whose neighbour in that direction is unmasked; every n-th if there are many."""
    along = mask if right else mask.T
    forward = right + down > 0
    edge = along[:, :-1] & ~along[:, 1:] if forward else along[:, 1:] & ~along[:, :-1]
    first, second = np.nonzero(edge)
    second = second if forward else second + 1
    # Four directions share the samples.
    stride = ceil(4 * len(first) / MAX_SAMPLES) or 1
    first, second = first[::stride], second[::stride]
    return (first, second) if right else (second, first)


def _edge_colours(
    old: Rgb, new: Rgb, edge: _EdgePixels, feather_px: int
) -> Iterator[tuple[Samples, Samples, Samples]]:
    """The colours (inside, outside, beyond) to compare: at the mask's edge and in the feather.

    One pixel outside, a feather of f pixels has mixed new = old + f / (f + 1) * (painted - old).
    Solved for ``painted``, the engine's pixel is compared with the original in the same place.
    """
    if len(edge) < MIN_EDGE_PIXELS:
        return
    outside = _colours(new, edge.outside)
    yield _colours(new, edge.inside), outside, _colours(new, edge.beyond)
    if feather_px:
        known = _colours(old, edge.outside)
        painted = known + (outside - known) * np.float32((feather_px + 1) / feather_px)
        yield painted, known, _colours(old, edge.beyond)


def _colours(rgb: Rgb, indices: Indices) -> Samples:
    return rgb[indices].astype(np.float32)


def _seam_and_jump(inside: Samples, outside: Samples, beyond: Samples) -> tuple[float, float]:
    """Lower confidence bounds of seam and colour jump.

    seam = exp(mean(log g(inside, outside) - log g(outside, beyond)) - z * standard error);
    the geometric mean gives little weight to edges of the image that cross the mask.
    colour jump = max over channels of |mean(inside - outside)| - z * standard error.
    """
    log_ratio = _log_gradient(inside - outside) - _log_gradient(outside - beyond)
    seam = exp(float(log_ratio.mean()) - SEAM_Z * float(_standard_error(log_ratio)))
    difference = np.clip(inside - outside, -JUMP_CAP, JUMP_CAP)
    jump = np.abs(difference.mean(axis=0)) - COLOUR_Z * _standard_error(difference)
    return seam, max(float(jump.max()), 0.0)


def _log_gradient(difference: Samples) -> NDArray[np.float32]:
    """(n,) log(g), where g is the difference in the channel that differs most, plus a floor."""
    logs: NDArray[np.float32] = np.log(np.abs(difference).max(axis=1) + np.float32(GRADIENT_FLOOR))
    return logs


def _standard_error(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The standard error of the mean along the first axis, for correlated neighbours."""
    count = max(len(values) / CORRELATED_PIXELS - 1, 0.5)
    error: NDArray[np.float32] = values.std(axis=0) / np.float32(sqrt(count))
    return error
