"""One window equals diffusers' own pipeline with the same seed: latents and picture, bit for bit.

The masks are aligned to the VAE's 8 px blocks. There diffusers' nearest-neighbour mask and
our max-pooled one agree; elsewhere ours keeps thin strokes that diffusers loses, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.geometry.box import Box
from shared.params import Scheduler
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    components,
    engine,
    region,
)
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.engine import DiffusionEngine

pytestmark = IGNORE_DIFFUSERS_WARNING

REFERENCE = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}


class Decodings:
    """What a VAE is asked to decode, and its float answer, last call only."""

    def __init__(self, vae: Any) -> None:
        self.latents = self.picture = torch.empty(0)
        vae.post_quant_conv.register_forward_pre_hook(self._keep_latents)
        vae.decoder.register_forward_hook(self._keep_picture)

    def _keep_latents(self, module: Any, args: tuple[Any, ...]) -> None:
        self.latents = args[0].clone()

    def _keep_picture(self, module: Any, args: tuple[Any, ...], picture: Tensor) -> None:
        self.picture = picture.clone()


class Pair:
    """The pipeline and our engine over the same weights, both watched."""

    def __init__(self, folder: Path, ours: DiffusionEngine, parts: Components) -> None:
        kind: Any = diffusers.StableDiffusionInpaintPipeline
        self.pipeline = kind.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler_config = self.pipeline.scheduler.config
        self.ours = ours
        self.our_decodings = Decodings(parts.vae)
        self.their_decodings = Decodings(self.pipeline.vae)

    def run_theirs(self, work: RegionWork) -> Pixels:
        wanted = work.params
        kind = REFERENCE[wanted.scheduler]
        self.pipeline.scheduler = kind.from_config(self.scheduler_config)
        found = self.pipeline(
            prompt=wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            image=Image.fromarray(work.image),
            mask_image=Image.fromarray(work.mask),
            height=wanted.height,
            width=wanted.width,
            strength=wanted.strength,
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            eta=wanted.eta,
            generator=torch.Generator().manual_seed(work.seed),
        )
        return np.asarray(found.images[0])

    def assert_same(self, work: RegionWork) -> None:
        ours = self.ours.submit(work).result(60)
        theirs = self.run_theirs(work)
        assert torch.isfinite(self.their_decodings.latents).all()
        assert torch.equal(self.our_decodings.latents, self.their_decodings.latents)
        assert torch.equal(self.our_decodings.picture, self.their_decodings.picture)
        assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    parts = components(tiny_model)
    with engine(parts) as ours:
        yield Pair(tiny_model, ours, parts)


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_every_scheduler_equals_diffusers(
    pair: Pair, scheduler: str, strength: float, guidance_scale: float
) -> None:
    pair.assert_same(
        region(
            scheduler=scheduler,
            strength=strength,
            guidance_scale=guidance_scale,
            negative_prompt="blurry background",
            num_inference_steps=7,
        )
    )


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_ddim_with_eta_draws_the_same_noise(pair: Pair, strength: float) -> None:
    pair.assert_same(region(scheduler="ddim", eta=0.3, strength=strength))


def test_fifty_steps_of_the_default_parameters(pair: Pair) -> None:
    pair.assert_same(region(num_inference_steps=50, strength=0.8, seed=2**63 - 1))


@pytest.mark.parametrize("size", [(128, 64), (1024, 576)], ids=str)
def test_a_window_that_is_not_square(pair: Pair, size: tuple[int, int]) -> None:
    width, height = size
    windows = (Box(0, 0, width, height),)
    sizes = {"width": width, "height": height}
    pair.assert_same(region(windows=windows, num_inference_steps=1, strength=1.0, **sizes))


def test_a_mask_of_the_whole_window_and_none_at_all(pair: Pair) -> None:
    for value in (0, 255):
        pair.assert_same(region(mask=np.full((64, 64), value, dtype=np.uint8)))


def test_a_prompt_longer_than_the_text_encoder_reads(pair: Pair) -> None:
    pair.assert_same(region(prompt="a red cat " * 60))
