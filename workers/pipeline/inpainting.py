"""From an image and a job's masks to the inpainted image: passes, seeds, quality gates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace

import numpy as np

from shared.engines import engine_spec
from shared.errors import GateError
from shared.geometry import coarse_to_fine
from shared.geometry.regions import Region, plan_pass
from shared.images import DecodedImage
from shared.masks import Mask
from shared.params import MAX_SEED, Params
from workers.engines.protocol import Engine, Pixels, RegionWork, Report
from workers.job_context import JobContext
from workers.pipeline import compositing, quality_gates
from workers.pipeline.quality_gates import Scores
from workers.worker_context import PipelineContext

log = logging.getLogger(__name__)

# Added to the seed for the second try. Far from the seeds of a job's regions, which count up from
# the job's, and from those of the rows of a manifest that count up too.
RESEED = 1 << 32


@dataclass(frozen=True, kw_only=True)
class MaskedPass:
    """One pass of a job. mask: (H, W) True = repaint. is_alpha: it is the image's own alpha."""

    mask: Mask
    params: Params
    is_alpha: bool = False


def inpaint(
    worker: PipelineContext, job: JobContext, image: DecodedImage, passes: Sequence[MaskedPass]
) -> DecodedImage:
    """Run every pass; if a quality gate fails, run them again with a second seed.

    Keeps the result with the higher score. An engine without seeds runs once. Raises GateError
    if no result passes its gates, unless ``params.gate`` has it published: ``review`` then
    stores the gate's code in the record.
    """
    gate = job.params.gate if job.apply_gates else "off"
    candidates: list[_Candidate] = []
    errors: list[GateError] = []
    for number, seed in enumerate(_seeds(worker.engine, job.params.seed)):
        job.record.reseeds = number
        try:
            candidate = _run_passes(worker, job, image, passes, seed=seed)
        except GateError as error:
            errors.append(error)
            continue
        candidates.append(candidate)
        if candidate.gate_error is None or gate == "off":
            break
        log.info("job %s: seed %s: %s", job.id, seed, candidate.gate_error)
    if not candidates:
        raise errors[-1]
    return _accept(job, max(candidates, key=lambda candidate: candidate.score), gate)


def _seeds(engine: Engine, seed: int) -> list[int]:
    second = [(seed + RESEED) % (MAX_SEED + 1)] if engine_spec(engine.name).has_seeds else []
    return [seed, *second]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A result and how good it is.

    scores: those of the pass with the lowest score; None if no pixel was repainted.
    gate_error: of the first pass that failed a gate.
    """

    image: DecodedImage
    seed: int
    scores: Scores | None = None
    gate_error: GateError | None = None

    @property
    def score(self) -> float:
        return self.scores.score if self.scores else 1.0


def _accept(job: JobContext, candidate: _Candidate, gate: str) -> DecodedImage:
    """Record a candidate's seed and scores; raises its GateError if ``gate`` is ``fail``."""
    record, error = job.record, candidate.gate_error
    record.seed = candidate.seed
    if candidate.scores:
        record.scores, record.score = candidate.scores.to_json(), candidate.scores.score
    if error and gate == "fail":
        raise error
    if error and gate == "review":
        record.review = error.code
    return candidate.image


def _run_passes(
    worker: PipelineContext,
    job: JobContext,
    image: DecodedImage,
    passes: Sequence[MaskedPass],
    *,
    seed: int,
) -> _Candidate:
    job.record.regions = job.record.windows = 0
    candidate = _Candidate(image=image, seed=seed)
    for masked_pass in passes:
        candidate = _run_pass(worker, job, candidate, masked_pass)
    return candidate


def _run_pass(
    worker: PipelineContext, job: JobContext, before: _Candidate, masked_pass: MaskedPass
) -> _Candidate:
    """Plan, inpaint, refine, composite and score one pass on the image of those before it."""
    image, spec = before.image, engine_spec(worker.engine.name)
    mask, params = masked_pass.mask, masked_pass.params
    with job.stage("plan"):
        # Refinements are planned here too: a mask that cannot be planned fails at no cost.
        regions = plan_pass(mask, params, any_size=spec.any_size)
        refinements = list(coarse_to_fine.plan_refinements(mask, regions, params))
    if not regions:
        return before
    results = _inpaint_regions(worker, job, image, masked_pass, regions, seed=before.seed)
    after = _composite(job, image, masked_pass, regions, results)
    finer_params = replace(params, strength=params.refine_strength)
    for refinement in refinements:
        finer = MaskedPass(mask=refinement.mask, params=finer_params, is_alpha=masked_pass.is_alpha)
        finer_results = _inpaint_regions(
            worker, job, after, finer, refinement.regions, seed=before.seed
        )
        # Not onto the coarse result: a feather over a feather falls off twice as fast.
        unrefined_regions = [regions[index] for index in refinement.unrefined]
        unrefined_results = [results[index] for index in refinement.unrefined]
        base = _composite(job, image, masked_pass, unrefined_regions, unrefined_results)
        after = _composite(job, base, finer, refinement.regions, finer_results)
    with job.stage("examine"):
        scores = quality_gates.examine(
            image, after, mask, regions, results, feather_px=params.mask_feather
        )
    return _scored(before, after, scores, remedy=spec.gate_remedy)


def _scored(before: _Candidate, image: DecodedImage, scores: Scores, *, remedy: str) -> _Candidate:
    """The candidate after one more pass: the lower scores, the earlier gate error."""
    is_lower = before.scores is None or scores.score < before.score
    return replace(
        before,
        image=image,
        scores=scores if is_lower else before.scores,
        gate_error=before.gate_error or quality_gates.verdict(scores, remedy=remedy),
    )


def _inpaint_regions(
    worker: PipelineContext,
    job: JobContext,
    image: DecodedImage,
    masked_pass: MaskedPass,
    regions: Sequence[Region],
    *,
    seed: int,
) -> list[Pixels]:
    """Fill every region with the engine; (h, w, 3) uint8 RGB for each, in the engine's pixels.

    seed: the job's. Its regions count up from it, over all passes.
    """
    record, report = job.record, Report()
    first_region = record.regions or 0
    record.regions = first_region + len(regions)
    record.windows = (record.windows or 0) + sum(len(region.windows) for region in regions)
    with job.stage("inpaint"):
        rgb = image.rgb()
        # All are submitted before the first is awaited, so that they share batches.
        futures = [
            worker.engine.submit(
                _region_work(job, rgb, masked_pass, region, seed=seed + number, report=report)
            )
            for number, region in enumerate(regions, first_region)
        ]
        # A region that fails leaves the others running; none may outlive its job.
        wait(futures)
        record.memory_mode = report.memory or record.memory_mode
        return [np.asarray(future.result()) for future in futures]


def _region_work(
    job: JobContext,
    rgb: Pixels,
    masked_pass: MaskedPass,
    region: Region,
    *,
    seed: int,
    report: Report,
) -> RegionWork:
    image, mask = compositing.cut(rgb, masked_pass.mask, region)
    return RegionWork(
        image=image,
        mask=mask,
        windows=region.windows,
        params=masked_pass.params,
        seed=seed % (MAX_SEED + 1),
        priority=job.leased.priority,
        interruption=job.interruption,
        report=report,
    )


def _composite(
    job: JobContext,
    image: DecodedImage,
    masked_pass: MaskedPass,
    regions: Sequence[Region],
    results: Sequence[Pixels],
) -> DecodedImage:
    with job.stage("composite"):
        return compositing.composite(
            image,
            masked_pass.mask,
            regions,
            results,
            masked_pass.params,
            fill_alpha=masked_pass.is_alpha,
        )
