"""Refinement: what a pass fills at a coarse scale is filled again at finer ones, up to 1:1.

A coarse result is blurred when it is enlarged. It fixes the layout for all finer windows, so that
their details fit together; without it each window would invent other content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from shared.geometry.regions import Region, plan_pass
from shared.params import Params

Mask = NDArray[np.bool_]

# How much finer one refinement is than the one before. Beyond it the enlarged image is so
# blurred that a strength low enough to keep its layout keeps the blur too.
STRIDE = 2.5


@dataclass(frozen=True, kw_only=True)
class RefinementPass:
    """One refinement pass.

    mask: (H, W) what is filled again. regions: its plan, finer than before.
    unrefined: indices in the first plan of the regions that this pass leaves as they are.
    """

    mask: Mask
    regions: tuple[Region, ...]
    unrefined: tuple[int, ...]


def plan_refinements(
    mask: Mask, plan: Sequence[Region], params: Params
) -> Iterator[RefinementPass]:
    """Plan the passes that follow a pass until all its regions are 1:1.

    mask, plan, params: the pass's. Coarser regions are refined first. Yields nothing unless
    ``refine_strength`` is set.
    """
    if not params.refine_strength or not plan:
        return
    scales = _space_scales(max(region.scale for region in plan))
    for scale, next_scale in zip(scales, [*scales, 1 / STRIDE][1:], strict=True):
        # A region that one stride brings to the next scale can wait for that pass.
        unrefined = tuple(
            index for index, region in enumerate(plan) if region.scale <= STRIDE * next_scale
        )
        coarse = [region for index, region in enumerate(plan) if index not in unrefined]
        coarse_mask = _restrict(mask, coarse)
        regions = plan_pass(coarse_mask, replace(params, mode="auto", scale=scale), any_size=False)
        yield RefinementPass(mask=coarse_mask, regions=regions, unrefined=unrefined)


def _space_scales(coarsest: float) -> list[float]:
    """Scales in equal ratios from below ``coarsest`` down to 1, each at most a stride apart."""
    count = ceil(log(coarsest, STRIDE))
    return [coarsest ** (remaining / count) for remaining in reversed(range(count))]


def _restrict(mask: Mask, regions: Sequence[Region]) -> Mask:
    """The part of the mask inside the regions' boxes."""
    restricted = np.zeros_like(mask)
    for region in regions:
        left, top, right, bottom = region.box
        restricted[top:bottom, left:right] = mask[top:bottom, left:right]
    return restricted
