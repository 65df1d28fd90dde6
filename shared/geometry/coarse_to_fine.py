"""Where a round is painted again, finer: what was painted coarsely comes out soft, enlarged.

The coarse result shows every window what the whole is to become, so that many of them add
detail to one picture; alone, those that see only hole would each invent another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import numpy as np

from shared.geometry.regions import Region, plan_for
from shared.masks.morphology import Mask, slices
from shared.params import Params

# Times finer at once. What is enlarged more is so soft that a strength which keeps its layout
# keeps its softness too.
STRIDE = 2.5


@dataclass(frozen=True, kw_only=True)
class RefinementPass:
    """One more go. mask: (H, W) what is painted again. regions: where, finer than before.

    kept: the places in the round's plan of the regions that are left alone.
    """

    mask: Mask
    regions: tuple[Region, ...]
    kept: tuple[int, ...]


def steps(mask: Mask, plan: Sequence[Region], params: Params) -> Iterator[RefinementPass]:
    """What follows a round until all of it is 1:1; nothing unless ``refine_strength`` asks for it.

    mask, plan, params: the round's. A region joins as late as the stride allows, the coarsest
    at once.
    """
    if not params.refine_strength or not plan:
        return
    scales = _scales(max(region.scale for region in plan))
    for scale, next_scale in zip(scales, [*scales, 1 / STRIDE][1:], strict=True):
        kept = tuple(n for n, one in enumerate(plan) if one.scale <= STRIDE * next_scale)
        soft = _within(mask, [one for n, one in enumerate(plan) if n not in kept])
        finer = replace(params, mode="auto", scale=scale)
        yield RefinementPass(mask=soft, regions=plan_for(soft, finer, any_size=False), kept=kept)


def _scales(coarsest: float) -> list[float]:
    """Evenly spaced from there down to 1, each at most a stride finer than the one before."""
    count = ceil(log(coarsest, STRIDE))
    return [coarsest ** (left / count) for left in reversed(range(count))]


def _within(mask: Mask, regions: Sequence[Region]) -> Mask:
    found = np.zeros_like(mask)
    for region in regions:
        found[slices(region.box)] = mask[slices(region.box)]
    return found
