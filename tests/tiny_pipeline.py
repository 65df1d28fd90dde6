"""A tiny pipeline with Stable Diffusion v2's architecture and seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("a", "red", "cat", "blue", "sky", "wooden", "table", "clean", "background", "blurry")
PROMPT_TOKENS = 77
EMBEDDING = 32


def build(folder: Path) -> Path:
    """Write the pipeline with ``save_pretrained``, as safetensors only; return ``folder``.

    The weights are the same each time. As in the real model: VAE factor 8, 9 input channels,
    linear projections, a head count per level. A window of 64 px is 8 latents wide.
    """
    import diffusers
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(20221124)
        pipeline = _untyped(diffusers.StableDiffusionInpaintPipeline)(
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=tokenizer(),
            unet=_unet(),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def change_config(folder: Path, name: str, **values: object) -> None:
    """Overwrite keys in one of the pipeline's JSON files, such as ``unet/config.json``."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _untyped(constructor: Any) -> Any:
    """The libraries annotate their constructors wrongly or not at all."""
    return constructor


def _unet() -> Any:
    import diffusers

    return _untyped(diffusers.UNet2DConditionModel)(
        sample_size=8,
        in_channels=9,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=[2, 4],
        cross_attention_dim=EMBEDDING,
        use_linear_projection=True,
    )


def _vae() -> Any:
    import diffusers

    return _untyped(diffusers.AutoencoderKL)(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=EMBEDDING,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=PROMPT_TOKENS,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def tokenizer() -> Any:
    """One token for each of WORDS; other text is split into letters."""
    from transformers import CLIPTokenizer

    return _untyped(CLIPTokenizer)(
        vocab=_vocabulary(), merges=_merges(), pad_token="!", model_max_length=PROMPT_TOKENS
    )


def _vocabulary() -> dict[str, int]:
    """Byte-pair tokens: three special ones, single letters, and the results of the merges."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *letters, *(c + "</w>" for c in letters)]
    tokens += ["".join(pair) for pair in _merges()]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _merges() -> list[tuple[str, str]]:
    """Merges that build each of WORDS letter by letter from the left."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    return list(merges)


def _scheduler() -> Any:
    import diffusers

    return _untyped(diffusers.PNDMScheduler).from_config(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        }
    )
