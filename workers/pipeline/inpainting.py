"""From a picture and a job's masks to the repainted picture: rounds, seeds, gates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace

import numpy as np

from shared.engines import engine_spec
from shared.errors import GateError
from shared.geometry import coarse_to_fine
from shared.geometry.regions import Region, plan_for
from shared.images import DecodedImage
from shared.jobs import AttemptRecord
from shared.masks import Mask
from shared.params import MAX_SEED, Params
from workers.active_jobs import StageTimer
from workers.engines.protocol import Engine, Interruption, Pixels, RegionWork, Report
from workers.pipeline import compositing, quality_gates
from workers.pipeline.quality_gates import Scores

log = logging.getLogger(__name__)

RESEED = 1 << 32  # apart from the seeds of a job's regions, and of rows that count up


@dataclass(frozen=True, kw_only=True)
class MaskedPass:
    """One pass of a job. mask: (H, W) True = repaint. is_alpha: it came from the picture."""

    mask: Mask
    params: Params
    is_alpha: bool = False


@dataclass(frozen=True, kw_only=True)
class Brush:
    """What paints one job: its engine, how it is stopped, timed and recorded."""

    engine: Engine
    interruption: Interruption
    stage: StageTimer
    record: AttemptRecord
    priority: int = 0


def paint(
    brush: Brush, picture: DecodedImage, rounds: Sequence[MaskedPass], *, params: Params
) -> DecodedImage:
    """The picture after every round, with the better of two seeds where a gate asks for it.

    params: the job's. An engine without seeds is asked once. Raises GateError where the result
    fails a gate with every seed, unless ``params.gate`` has it published; the record then says
    what is to be reviewed.
    """
    seeds = [params.seed]
    if engine_spec(brush.engine.name).has_seeds:
        seeds.append((params.seed + RESEED) % (MAX_SEED + 1))
    best: _Painted | None = None
    error: GateError | None = None
    for number, seed in enumerate(seeds):
        brush.record.reseeds = number
        try:
            painted = _all_rounds(brush, picture, rounds, seed=seed)
        except GateError as failed:
            error = failed
            continue
        if best is None or painted.score > best.score:
            best = painted
        if painted.finding is None or params.gate == "off":
            break
        log.info("seed %s: %s", seed, painted.finding)
    if best is None:
        raise error or GateError("nothing was painted")
    return _judged(brush.record, best, params)


@dataclass(frozen=True, kw_only=True)
class _Painted:
    """scores: the worst round's; None where nothing was repainted."""

    picture: DecodedImage
    seed: int
    scores: Scores | None = None
    finding: GateError | None = None

    @property
    def score(self) -> float:
        return self.scores.score if self.scores else 1.0


def _judged(record: AttemptRecord, painted: _Painted, params: Params) -> DecodedImage:
    record.seed = painted.seed
    if painted.scores:
        record.scores, record.score = painted.scores.to_json(), painted.scores.score
    if painted.finding and params.gate == "fail":
        raise painted.finding
    if painted.finding and params.gate == "review":
        record.review = painted.finding.code
    return painted.picture


def _all_rounds(
    brush: Brush, picture: DecodedImage, rounds: Sequence[MaskedPass], *, seed: int
) -> _Painted:
    record = brush.record
    record.regions = record.windows = 0
    painted = _Painted(picture=picture, seed=seed)
    for one in rounds:
        painted = _round(brush, painted, one)
    return painted


def _round(brush: Brush, so_far: _Painted, one: MaskedPass) -> _Painted:
    """Adds a round; the scores become the worse ones, the finding the first."""
    picture, stage, spec = so_far.picture, brush.stage, engine_spec(brush.engine.name)
    with stage("plan"):
        plan = plan_for(one.mask, one.params, any_size=spec.any_size)
        steps = list(coarse_to_fine.steps(one.mask, plan, one.params))
    if not plan:
        return so_far
    filled = _fill(brush, picture, one, plan, seed=so_far.seed)
    result = _composited(brush, picture, one, plan, filled)
    again = replace(one.params, strength=one.params.refine_strength)
    for step in steps:
        finer = MaskedPass(mask=step.mask, params=again, is_alpha=one.is_alpha)
        sharp = _fill(brush, result, finer, step.regions, seed=so_far.seed)
        # Not onto the coarse result: a feather over a feather falls off twice as fast.
        kept = [plan[n] for n in step.kept], [filled[n] for n in step.kept]
        under = _composited(brush, picture, one, *kept)
        result = _composited(brush, under, finer, step.regions, sharp)
    with stage("examine"):
        scores = quality_gates.examine(
            picture, result, one.mask, plan, filled, feather_px=one.params.mask_feather
        )
    worse = so_far.scores is None or scores.score < so_far.score
    return replace(
        so_far,
        picture=result,
        scores=scores if worse else so_far.scores,
        finding=so_far.finding or quality_gates.verdict(scores, remedy=spec.gate_remedy),
    )


def _fill(
    brush: Brush, picture: DecodedImage, one: MaskedPass, plan: Sequence[Region], *, seed: int
) -> list[Pixels]:
    """Submits all regions before waiting for the first, so that they can share batches.

    seed: the job's, which its regions count up from.
    """
    record, report = brush.record, Report()
    first_region = record.regions or 0
    record.regions = first_region + len(plan)
    record.windows = (record.windows or 0) + sum(len(region.windows) for region in plan)
    with brush.stage("inpaint"):
        rgb, futures = picture.rgb(), []
        for number, region in enumerate(plan, first_region):
            image, region_mask = compositing.cut(rgb, one.mask, region)
            work = RegionWork(
                image=image,
                mask=region_mask,
                windows=region.windows,
                params=one.params,
                seed=(seed + number) % (MAX_SEED + 1),
                priority=brush.priority,
                interruption=brush.interruption,
                report=report,
            )
            futures.append(brush.engine.submit(work))
        wait(futures)  # a region that fails leaves the others running; none may outlive its job
        record.memory_mode = report.memory or record.memory_mode
        return [np.asarray(future.result()) for future in futures]


def _composited(
    brush: Brush,
    picture: DecodedImage,
    one: MaskedPass,
    plan: Sequence[Region],
    filled: Sequence[Pixels],
) -> DecodedImage:
    with brush.stage("composite"):
        return compositing.composite(
            picture, one.mask, plan, filled, one.params, fill_alpha=one.is_alpha
        )
