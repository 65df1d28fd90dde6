"""A region of one window is bit-identical to diffusers' pipeline with the same seed.

Latents and pixels are compared. The masks are aligned to the VAE's 8 px blocks, where diffusers'
nearest-neighbour mask equals the engine's max-pooled one. Elsewhere the engine keeps thin strokes
that diffusers loses, on purpose.
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
    load_tiny,
    open_engine,
    region_work,
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


class DecodeRecorder:
    """The latents and the float image of a VAE's latest decode."""

    def __init__(self, vae: Any) -> None:
        self.latents = self.image = torch.empty(0)
        vae.post_quant_conv.register_forward_pre_hook(self._store_latents)
        vae.decoder.register_forward_hook(self._store_image)

    def _store_latents(self, module: Any, args: tuple[Any, ...]) -> None:
        self.latents = args[0].clone()

    def _store_image(self, module: Any, args: tuple[Any, ...], image: Tensor) -> None:
        self.image = image.clone()


class Pair:
    """diffusers' pipeline and our engine with the same weights, both recorded."""

    def __init__(self, folder: Path, engine: DiffusionEngine, components: Components) -> None:
        pipeline_class: Any = diffusers.StableDiffusionInpaintPipeline
        self.pipeline = pipeline_class.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler_config = self.pipeline.scheduler.config
        self.engine = engine
        self.our_decode = DecodeRecorder(components.vae)
        self.their_decode = DecodeRecorder(self.pipeline.vae)

    def run_diffusers(self, work: RegionWork) -> Pixels:
        params = work.params
        scheduler_class = REFERENCE[params.scheduler]
        self.pipeline.scheduler = scheduler_class.from_config(self.scheduler_config)
        output = self.pipeline(
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            image=Image.fromarray(work.image),
            mask_image=Image.fromarray(work.mask),
            height=params.height,
            width=params.width,
            strength=params.strength,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            eta=params.eta,
            generator=torch.Generator().manual_seed(work.seed),
        )
        return np.asarray(output.images[0])

    def assert_bit_identical(self, work: RegionWork) -> None:
        ours = self.engine.submit(work).result(60)
        theirs = self.run_diffusers(work)
        assert torch.isfinite(self.their_decode.latents).all()
        assert torch.equal(self.our_decode.latents, self.their_decode.latents)
        assert torch.equal(self.our_decode.image, self.their_decode.image)
        assert np.array_equal(ours, theirs)


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    components = load_tiny(tiny_model)
    with open_engine(components) as engine:
        yield Pair(tiny_model, engine, components)


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_every_scheduler_is_bit_identical_to_diffusers(
    pair: Pair, scheduler: str, strength: float, guidance_scale: float
) -> None:
    pair.assert_bit_identical(
        region_work(
            scheduler=scheduler,
            strength=strength,
            guidance_scale=guidance_scale,
            negative_prompt="blurry background",
            num_inference_steps=7,
        )
    )


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_ddim_with_eta_draws_the_same_noise(pair: Pair, strength: float) -> None:
    pair.assert_bit_identical(region_work(scheduler="ddim", eta=0.3, strength=strength))


def test_fifty_steps_with_default_parameters_are_bit_identical(pair: Pair) -> None:
    pair.assert_bit_identical(region_work(num_inference_steps=50, strength=0.8, seed=2**63 - 1))


@pytest.mark.parametrize("size", [(128, 64), (1024, 576)], ids=str)
def test_a_window_that_is_not_square_is_bit_identical(pair: Pair, size: tuple[int, int]) -> None:
    width, height = size
    windows = (Box(0, 0, width, height),)
    sizes = {"width": width, "height": height}
    pair.assert_bit_identical(
        region_work(windows=windows, num_inference_steps=1, strength=1.0, **sizes)
    )


def test_an_empty_and_a_full_mask_are_bit_identical(pair: Pair) -> None:
    for value in (0, 255):
        pair.assert_bit_identical(region_work(mask=np.full((64, 64), value, dtype=np.uint8)))


def test_a_truncated_prompt_is_bit_identical(pair: Pair) -> None:
    pair.assert_bit_identical(region_work(prompt="a red cat " * 60))
