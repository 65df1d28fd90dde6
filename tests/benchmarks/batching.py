"""Continuous batching on a CPU, with the tiny pipeline and 16x16 latents.

Mixed jobs (steps, guidance, strength, scheduler, prompt) through the engine, compared with one
diffusers call per job: speed, and the number of calls of each component.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.geometry.box import Box
from shared.params import Params
from tests.benchmarks.side_by_side import measure_alternately, measure_seconds, print_row
from tests.tiny_pipeline import build
from workers.engines.options import EngineOptions
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components, load_components
from workers.engines.stable_diffusion.engine import DiffusionEngine
from workers.engines.stable_diffusion.schedulers import SCHEDULER_CLASSES

SIDE, JOBS, REPEATS, MAX_BATCH = 128, 24, 3, 16
PROMPTS = ("a red cat", "blue sky", "wooden table")
SCHEDULERS = ("ddim", "euler", "dpmpp_2m", "unipc")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        model = build(Path(name) / "model")
        components = load_components(str(model), None, EngineOptions(device="cpu"))
        _compare(components, _pipeline(model))


def _compare(components: Components, pipeline: Any) -> None:
    works = [_work(n) for n in range(JOBS)]
    our_calls, their_calls = _count_calls(components), _count_calls(pipeline)
    engine = DiffusionEngine(
        name="tiny", components=components, options=EngineOptions(max_batch=MAX_BATCH)
    )
    ours: list[Pixels] = []
    theirs: list[Pixels] = []
    # Warm up the caches on both sides.
    _run_batched(engine, works)
    _one_by_one(pipeline, works)
    our_calls.clear()
    their_calls.clear()
    pair = measure_alternately(
        lambda: measure_seconds(lambda: ours.extend(_run_batched(engine, works))),
        lambda: measure_seconds(lambda: theirs.extend(_one_by_one(pipeline, works))),
        repeats=REPEATS,
    )
    engine.close()
    print_row(f"{JOBS} mixed jobs, {SIDE}x{SIDE}", "ours", "diffusers, one by one", "ratio")
    rates = [f"{JOBS / min(spent):.1f}" for spent in (pair.ours, pair.theirs)]
    print_row("  images a second", *rates, f"{pair.ratio:.1f}x")
    for component in ("UNet forwards", "VAE encodings", "VAE decodings", "prompts encoded"):
        spent, saved = our_calls[component] // REPEATS, their_calls[component] // REPEATS
        print_row(f"  {component}", spent, saved, f"{saved / max(spent, 1):.1f}x")
    worst = max(np.abs(a.astype(int) - b).max() for a, b in zip(ours, theirs, strict=True))
    identical = sum(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    print_row("  bit-identical images", f"{identical} of {len(ours)}")
    print_row("  largest difference of a pixel, of 255", worst)


def _work(n: int) -> RegionWork:
    """The mask is aligned to the latents' grid, where diffusers' mask equals the engine's."""
    image = np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[32:96, 24:104] = 255
    params = Params(
        prompt=PROMPTS[n % 3],
        num_inference_steps=(10, 20, 30)[n % 3],
        guidance_scale=(7.5, 5.0, 1.0, 9.0)[n % 4],
        strength=(1.0, 0.8, 0.6)[n // 2 % 3],
        scheduler=SCHEDULERS[n // 3 % 4],
        width=SIDE,
        height=SIDE,
    )
    return RegionWork(
        image=image, mask=mask, windows=(Box(0, 0, SIDE, SIDE),), params=params, seed=n
    )


def _pipeline(model: Path) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _count_calls(model: Any) -> Counter[str]:
    """Count the calls of a model's components from now on."""
    calls = Counter[str]()
    components = {
        "UNet forwards": model.unet,
        "VAE encodings": model.vae.encoder,
        "VAE decodings": model.vae.decoder,
        "prompts encoded": model.text_encoder,
    }
    for name, module in components.items():
        module.register_forward_pre_hook(
            lambda *_, name=name: calls.update([name]), with_kwargs=name == "prompts encoded"
        )
    return calls


def _run_batched(engine: DiffusionEngine, works: list[RegionWork]) -> list[Pixels]:
    futures: list[Future[Pixels]] = [engine.submit(work) for work in works]
    return [future.result() for future in futures]


def _one_by_one(pipeline: Any, works: list[RegionWork]) -> list[Pixels]:
    import diffusers

    config, images = pipeline.scheduler.config, []
    for work in works:
        params = work.params
        pipeline.scheduler = getattr(diffusers, SCHEDULER_CLASSES[params.scheduler]).from_config(
            config
        )
        output = pipeline(
            prompt=params.prompt,
            negative_prompt="",
            image=Image.fromarray(work.image),
            mask_image=Image.fromarray(work.mask),
            height=SIDE,
            width=SIDE,
            strength=params.strength,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator().manual_seed(work.seed),
        )
        images.append(np.asarray(output.images[0]))
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(config)
    return images


if __name__ == "__main__":
    sys.exit(main())
