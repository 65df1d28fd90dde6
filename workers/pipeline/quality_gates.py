"""Is a result fit to be published? Figures that tell, and what they must not exceed.

Nothing here knows what ought to be under the mask. What is measured is what only broken work
has: no numbers, black, the mark still there, an edge along the mask, a cast of colour. A mask
that follows an object's outline has such an edge by right: there ``gate=review`` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, exp, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import GateError
from shared.geometry.box import Box
from shared.geometry.regions import Region
from shared.images import DecodedImage, as_rgb
from shared.masks import Mask, slices

Rgb = NDArray[np.uint8]  # (h, w, 3)
Samples = NDArray[np.float32]  # (n, 3) RGB, 0 to 255
Places = tuple[NDArray[np.intp], NDArray[np.intp]]  # rows and columns, (n,) each

# Chosen by tests/benchmarks/gates.py, which shows what each finds and how often it is wrong.
SEAM_LIMIT = 2.0
COLOUR_LIMIT = 10.0
CHANGE_LIMIT = 0.05  # far below what a VAE alone changes, whatever the strength
BLACK_SHARE = 0.98
BLACK_LEVEL = 26  # the colour fit lifts black by up to 24
BLACK_SPREAD = 4.0
MIN_BLACK = 36  # fewer pixels may well lie in a black letter
PLAIN = 6.0

SAMPLES = 100_000
MIN_PAIRS = 8
LONGEST_STEP_PX = 16
STEP_FLOOR, STEP_CAP = 4.0, 48.0
NEIGHBOURS = 4  # pixels along an edge that tell no more than one does
SEAM_ERRORS, COLOUR_ERRORS = 1.25, 2.0
OPAQUE = 128
HOPELESS = 100.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of the worst region. None: there was nothing to compare with.

    finite: whether every value of the engine's was a number.
    black: share of the repainted pixels that are black where their surroundings are not.
    change: how far the repainted pixels moved, in parts of what stood out under the mask.
    seam: how much steeper the picture is across the mask's edge than beside it; 1 is no seam.
    colour_jump: how far the mean colour moves across the mask's edge, in levels of 0 to 255.
    """

    finite: bool = True
    black: float = 0.0
    change: float | None = None
    seam: float | None = None
    colour_jump: float | None = None

    @property
    def score(self) -> float:
        """1 is the best, 0 the worst; a gate fails at 0.5 and below."""
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
    """Compares the composited picture with what it came from, region by region.

    mask: (H, W) True = repaint, as it was planned. results: what the engine returned, one for
    each region. Only the marks' boxes are looked at: a small mark costs little in any picture.
    """
    if not all(_is_finite(result) for result in results):
        return Scores(finite=False)
    found = [_examine_box(before, after, mask, box, feather_px) for box in _marks(mask, plan)]
    return Scores(
        black=_worst(max, (one.black for one in found)) or 0.0,
        change=_worst(min, (one.change for one in found)),
        seam=_worst(max, (one.seam for one in found)),
        colour_jump=_worst(max, (one.colour_jump for one in found)),
    )


def verdict(scores: Scores, *, remedy: str) -> GateError | None:
    """The first gate that fails, with its figures; None: publish. remedy: said with the error."""
    for gate in _GATES:
        if gate.excess(scores) >= 1:
            message = f"{gate.message(scores)}; {remedy}, or gate=review to look at it"
            return GateError(message, code=gate.code)
    return None


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """excess: the gate's figure in parts of its limit."""

    code: str
    excess: Callable[[Scores], float]
    message: Callable[[Scores], str]


_GATES = (
    _Gate(
        code="gate_not_finite",
        excess=lambda s: 0.0 if s.finite else HOPELESS,
        message=lambda _: "the engine returned values that are no numbers",
    ),
    _Gate(
        code="gate_black",
        excess=lambda s: HOPELESS if s.black >= BLACK_SHARE else 0.0,
        message=lambda s: f"{s.black:.0%} of a region is black and its surroundings are not",
    ),
    _Gate(
        code="gate_unchanged",
        excess=lambda s: 0.0 if s.change is None else CHANGE_LIMIT / max(s.change, 1e-3),
        message=lambda s: (
            f"a region came back as it was: it moved by {s.change:.1%} of what stands out under "
            f"the mask (at least {CHANGE_LIMIT:.0%})"
        ),
    ),
    _Gate(
        code="gate_seam",
        excess=lambda s: (s.seam or 0.0) / SEAM_LIMIT,
        message=lambda s: (
            f"a seam: the picture is {s.seam:.1f} times as steep across the mask's edge as beside "
            f"it (below {SEAM_LIMIT:g})"
        ),
    ),
    _Gate(
        code="gate_colour",
        excess=lambda s: (s.colour_jump or 0.0) / COLOUR_LIMIT,
        message=lambda s: (
            f"the colour jumps by {s.colour_jump:.0f} levels at the mask's edge "
            f"(below {COLOUR_LIMIT:g})"
        ),
    ),
)


def _worst(choose: Callable[..., float], figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return choose(known) if known else None


def _is_finite(result: NDArray[Any]) -> bool:
    return result.dtype.kind in "biu" or bool(np.isfinite(result).all())


def _marks(mask: Mask, plan: Sequence[Region]) -> Iterator[Box]:
    """The box of the repainted pixels in each region."""
    for region in plan:
        box = region.box.clipped((mask.shape[1], mask.shape[0]))
        marked = mask[slices(box)]
        rows, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
        if len(rows):
            tight = Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            yield tight.moved(box.left, box.top)


def _examine_box(
    before: DecodedImage, after: DecodedImage, mask: Mask, box: Box, feather_px: int
) -> Scores:
    step = min(feather_px + 1, LONGEST_STEP_PX)
    reach = 2 * step
    around = Box(box.left - reach, box.top - reach, box.right + reach, box.bottom + reach)
    where = slices(around.clipped(before.size))
    marked, old, new = mask[where], _rgb(before, where), _rgb(after, where)
    visible = _visible(after, where)
    near = _pairs(marked, visible, 1)
    known = (near if step == 1 else _pairs(marked, visible, step)).known
    edges = [_edge(*edge) for edge in _edges(old, new, near, feather_px)]
    return Scores(
        black=_black(old, new, _thinned(marked), known),
        change=_change(old, new, _thinned(marked & _visible(before, where)), known),
        seam=max((seam for seam, _ in edges), default=None),
        colour_jump=max((jump for _, jump in edges), default=None),
    )


def _rgb(picture: DecodedImage, where: tuple[slice, slice]) -> Rgb:
    return as_rgb(picture.pixels[where], picture.mode)


def _visible(picture: DecodedImage, where: tuple[slice, slice]) -> Mask:
    """(h, w) what alpha does not hide: hidden pixels may hold any colour."""
    alpha = picture.alpha()
    if alpha is None:
        return np.ones(picture.pixels[where].shape[:2], np.bool_)
    visible: Mask = alpha[where] >= OPAQUE
    return visible


def _thinned(mask: Mask) -> Places:
    """The mask's pixels, on a coarser grid where they are many."""
    step = ceil(sqrt(np.count_nonzero(mask) / SAMPLES)) or 1
    rows, columns = np.nonzero(mask[::step, ::step])
    return rows * step, columns * step


# --- inside ----------------------------------------------------------------------------------


def _black(old: Rgb, new: Rgb, inside: Places, known: Places) -> float:
    """The share of black inside where it is even and not what surrounds it."""
    brightest = new[inside].max(axis=1)
    if len(brightest) < MIN_BLACK or brightest.std() > BLACK_SPREAD:
        return 0.0
    around = new[known] if len(known[0]) >= MIN_PAIRS else old[inside]
    if (around.max(axis=1) <= BLACK_LEVEL).mean() > 0.5:
        return 0.0
    return float((brightest <= BLACK_LEVEL).mean())


def _change(old: Rgb, new: Rgb, inside: Places, known: Places) -> float | None:
    """How much of what stood out from its surroundings has moved.

    None where nothing stood out: a plain ground may come back as it was.
    """
    if not len(inside[0]):
        return None
    around = known if len(known[0]) >= MIN_PAIRS else inside
    content = old[inside].astype(np.float32)
    stood_out = _rms(content - _plane(old[around].astype(np.float32), around, inside))
    return _rms(new[inside] - content) / stood_out if stood_out >= PLAIN else None


def _plane(colours: Samples, known: Places, wanted: Places) -> Samples:
    """(n, 3) at the wanted places, on the plane through the known colours by least squares."""
    factors = np.linalg.lstsq(_coordinates(known), colours, rcond=None)[0]
    plane: Samples = _coordinates(wanted) @ factors
    return plane


def _coordinates(places: Places) -> NDArray[np.float32]:
    rows, columns = (place.astype(np.float32) / 100 for place in places)
    return np.stack([np.ones_like(rows), rows, columns], axis=1)


def _rms(values: Samples) -> float:
    return sqrt(float(np.mean(np.square(values))))


# --- the edge --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Repainted pixels at the mask's edge, known ones a step outside, and a step beyond those."""

    inside: Places
    outside: Places
    beyond: Places

    def __len__(self) -> int:
        return len(self.inside[0])

    @property
    def known(self) -> Places:
        rows, columns = (
            np.concatenate(both) for both in zip(self.outside, self.beyond, strict=True)
        )
        return rows, columns


def _pairs(mask: Mask, visible: Mask, step: int) -> _Pairs:
    """In each of four directions where all pixels outside are known and visible."""
    found = [_towards(mask, visible, step, *way) for way in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    inside, outside, beyond = (
        (np.concatenate([one[n][0] for one in found]), np.concatenate([one[n][1] for one in found]))
        for n in range(3)
    )
    return _Pairs(inside=inside, outside=outside, beyond=beyond)


def _towards(
    mask: Mask, visible: Mask, step: int, down: int, right: int
) -> tuple[Places, Places, Places]:
    rows, columns = _leaving(mask, down, right)
    last = rows + 2 * step * down, columns + 2 * step * right
    kept = (last[0] >= 0) & (last[0] < mask.shape[0])
    kept &= (last[1] >= 0) & (last[1] < mask.shape[1])
    rows, columns = rows[kept], columns[kept]
    clear = visible[rows, columns]
    for away in range(1, 2 * step + 1):
        at = rows + away * down, columns + away * right
        clear &= visible[at] & ~mask[at]
    rows, columns = rows[clear], columns[clear]
    inside, outside, beyond = (
        (rows + away * down, columns + away * right) for away in (0, step, 2 * step)
    )
    return inside, outside, beyond


def _leaving(mask: Mask, down: int, right: int) -> Places:
    """Masked pixels whose neighbour in that direction is not, evenly thinned."""
    along = mask if right else mask.T
    forward = right + down > 0
    edge = along[:, :-1] & ~along[:, 1:] if forward else along[:, 1:] & ~along[:, :-1]
    first, second = np.nonzero(edge)
    second = second if forward else second + 1
    thin = ceil(4 * len(first) / SAMPLES) or 1
    first, second = first[::thin], second[::thin]
    return (first, second) if right else (second, first)


def _edges(
    old: Rgb, new: Rgb, pairs: _Pairs, feather_px: int
) -> Iterator[tuple[Samples, Samples, Samples]]:
    """What to compare as (inside, outside, beyond): at the mask's edge, and in the feather.

    There the engine's own pixels can be had back from the mixture, and compared with the known
    ones in the same places.
    """
    if len(pairs) < MIN_PAIRS:
        return
    outside = _at(new, pairs.outside)
    yield _at(new, pairs.inside), outside, _at(new, pairs.beyond)
    if feather_px:
        known = _at(old, pairs.outside)
        painted = known + (outside - known) * np.float32((feather_px + 1) / feather_px)
        yield painted, known, _at(old, pairs.beyond)


def _at(rgb: Rgb, places: Places) -> Samples:
    return rgb[places].astype(np.float32)


def _edge(inside: Samples, outside: Samples, beyond: Samples) -> tuple[float, float]:
    """The seam and the colour jump, each as little as chance leaves of it.

    The seam is the geometric mean of step sizes across the edge over those just outside, so
    that lines of the picture that cross the mask weigh little.
    """
    steeper = _log_step(inside - outside) - _log_step(outside - beyond)
    seam = exp(float(steeper.mean()) - SEAM_ERRORS * float(_error(steeper)))
    drift = np.clip(inside - outside, -STEP_CAP, STEP_CAP)
    jump = np.abs(drift.mean(axis=0)) - COLOUR_ERRORS * _error(drift)
    return seam, max(float(jump.max()), 0.0)


def _log_step(difference: Samples) -> NDArray[np.float32]:
    """(n,) of the channel that differs most; the floor keeps a plain ground's noise small."""
    steps: NDArray[np.float32] = np.log(np.abs(difference).max(axis=1) + np.float32(STEP_FLOOR))
    return steps


def _error(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The standard error of the mean along the first axis; large where the samples are few."""
    count = max(len(values) / NEIGHBOURS - 1, 0.5)
    error: NDArray[np.float32] = values.std(axis=0) / np.float32(sqrt(count))
    return error
