"""Stable Diffusion v2 inpainting as published, with random weights: speed depends on shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tests import tiny_pipeline
from tests.tiny_pipeline import build
from workers.engines.stable_diffusion.components import Components

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
UNET = {
    "sample_size": 64,
    "in_channels": 9,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkModel:
    """A model on its device, and the size of the jobs it runs.

    side: of a window, in pixels. steps: of a uniform job. static_batch: images of diffusers' batch.
    """

    components: Components
    side: int
    steps: int
    static_batch: int
    max_batch: int | None
    is_tiny: bool

    @property
    def device(self) -> torch.device:
        return self.components.device

    def pipeline(self) -> Any:
        """diffusers' own pipeline with the same weights."""
        from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

        components = self.components
        pipeline = StableDiffusionInpaintPipeline(
            vae=components.vae,
            text_encoder=components.text_encoder,
            tokenizer=components.tokenizer,
            unet=components.unet,
            scheduler=DDIMScheduler.from_config(SCHEDULER),  # type: ignore[arg-type]
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def load_sd2(device: torch.device) -> BenchmarkModel:
    """SD2 inpainting in float16: 866 M parameters in the UNet, 84 M in the VAE."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    with device:
        unet: Any = diffusers.UNet2DConditionModel(**UNET)  # type: ignore[arg-type]
        vae: Any = diffusers.AutoencoderKL(**VAE)  # type: ignore[arg-type]
        text_encoder: Any = CLIPTextModel(CLIPTextConfig(**TEXT))
    for module in (unet, vae, text_encoder):
        module.half().eval().requires_grad_(False)
    components = Components(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_pipeline.tokenizer(),
        scheduler_config=SCHEDULER,
        revision="random",
        device=device,
        dtype=torch.float16,
    )
    return BenchmarkModel(
        components=components, side=512, steps=50, static_batch=16, max_batch=None, is_tiny=False
    )


def load_tiny_model(device: torch.device) -> BenchmarkModel:
    """The tests' pipeline, to check the benchmark itself on any machine."""
    import tempfile
    from pathlib import Path

    from workers.engines.options import EngineOptions
    from workers.engines.stable_diffusion.components import load_components

    with tempfile.TemporaryDirectory() as name:
        folder = build(Path(name) / "model")
        components = load_components(str(folder), None, EngineOptions(device=str(device)))
    for module in (components.unet, components.vae, components.text_encoder):
        module.to(device)
    return BenchmarkModel(
        components=components, side=64, steps=4, static_batch=2, max_batch=4, is_tiny=True
    )


def with_full_unet(model: BenchmarkModel) -> BenchmarkModel:
    """Replace the UNet by SD2's in float32 (3.5 GB), to time its forward passes alone."""
    import diffusers

    torch.manual_seed(0)
    unet: Any = diffusers.UNet2DConditionModel(**UNET)  # type: ignore[arg-type]
    components = replace(model.components, unet=unet.eval().requires_grad_(False))
    return replace(model, components=components, side=256)
