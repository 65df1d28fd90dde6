"""DeepCache (Ma et al. 2023): reuse the UNet's deep features for several steps.

Deep features change little from one step to the next. A full forward pass caches the features
that enter the last layer of the last up block. The passes after it run that layer alone, on the
cached features and the current latents and timestep (the paper's first skip branch).

Features travel as extra channels behind the latents, so that a forward pass always has one input
and one output. Run eagerly, each pass is bit-identical to the same part of the UNet.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.errors import ParameterError

# full: the UNet itself. cache_write: the UNet, which also outputs its features.
# cache_read: the last layer alone, on cached features.
ForwardKind = Literal["full", "cache_write", "cache_read"]

SUPPORTED_LAST_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
# SD2 has none of these, and the wrappers below do not compute them.
UNSUPPORTED_CONFIG = (
    *("center_input_sample", "class_embed_type", "num_class_embeds", "addition_embed_type"),
    *("encoder_hid_dim_type", "encoder_hid_dim", "time_embedding_act_fn"),
)


def kind_of_step(step: int, cache_interval: int) -> ForwardKind:
    """Every ``cache_interval``-th step, from step 0, writes the cache; the others read it."""
    if cache_interval == 1:
        return "full"
    return "cache_read" if step % cache_interval else "cache_write"


def check_cache_interval(unet: Any, cache_interval: int) -> None:
    """Raises ParameterError if the UNet's architecture does not support an interval above 1."""
    config = unet.config
    names = [name for name in UNSUPPORTED_CONFIG if config.get(name) not in (None, False)]
    reasons = [f"has {name}" for name in names]
    if (block := config.up_block_types[-1]) not in SUPPORTED_LAST_BLOCKS:
        reasons.append(f"ends with {block}")
    if cache_interval > 1 and reasons:
        raise ParameterError(
            f"cache_interval: {cache_interval} is not possible with this model, whose UNet "
            f"{' and '.join(reasons)}; use 1"
        )


def unet_for_kind(unet: Any, kind: ForwardKind) -> Any:
    """Return a module called like the UNet that runs this kind of pass on the UNet's weights."""
    if kind == "full":
        return unet
    return CacheWriteUNet(unet) if kind == "cache_write" else CacheReadUNet(unet)


class CacheWriteUNet(nn.Module):
    """The whole UNet: (N, in, h, w) to (N, out + features, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        # The same operations as UNet2DConditionModel.forward, up to its last layer.
        unet, prompt = self.unet, encoder_hidden_states
        time = _embed_time(unet, sample, timestep)
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, block_skips = block(
                hidden_states=hidden, temb=time, **_prompt_kwargs(block, prompt)
            )
            skips += block_skips
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, time, **_prompt_kwargs(unet.mid_block, prompt))
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            skips, block_skips = skips[:-count], skips[-count:]
            hidden = _run_up_block(block, hidden, block_skips, skips[-1], time, prompt)
        last = unet.up_blocks[-1]
        for layer in range(len(last.resnets) - 1):
            hidden = _run_up_layer(last, layer, hidden, skips.pop(), time, prompt)
        output = _run_output_layers(unet, hidden, skips.pop(), time, prompt)
        return (torch.cat([output, hidden], dim=1),)


class CacheReadUNet(nn.Module):
    """The last layer alone: (N, in + features, h, w) to (N, out, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        unet = self.unet
        sample, features = sample.tensor_split([unet.config.in_channels], dim=1)
        time = _embed_time(unet, sample, timestep)
        skip = unet.conv_in(sample)
        return (_run_output_layers(unet, features, skip, time, encoder_hidden_states),)


def _embed_time(unet: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    embedding: Tensor = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    return embedding


def _prompt_kwargs(block: Any, prompt: Tensor) -> dict[str, Tensor]:
    """The prompt embeddings, for a block with cross-attention."""
    has_attention = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": prompt} if has_attention else {}


def _run_up_block(
    block: Any,
    hidden: Tensor,
    skips: list[Tensor],
    next_skip: Tensor,
    time: Tensor,
    prompt: Tensor,
) -> Tensor:
    """Run a whole up block. next_skip: the first one of the next block, which has its size."""
    output: Tensor = block(
        hidden_states=hidden,
        temb=time,
        res_hidden_states_tuple=tuple(skips),
        upsample_size=next_skip.shape[2:],  # for sides that do not halve exactly
        **_prompt_kwargs(block, prompt),
    )
    return output


def _run_output_layers(
    unet: Any, features: Tensor, skip: Tensor, time: Tensor, prompt: Tensor
) -> Tensor:
    """Run the last up layer and the output convolution. skip: the output of ``conv_in``."""
    hidden = _run_up_layer(unet.up_blocks[-1], -1, features, skip, time, prompt)
    if unet.conv_norm_out:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    output: Tensor = unet.conv_out(hidden)
    return output


def _run_up_layer(
    block: Any, layer: int, hidden: Tensor, skip: Tensor, time: Tensor, prompt: Tensor
) -> Tensor:
    """Run one resnet of an up block, and the attention behind it if the block has any."""
    hidden = block.resnets[layer](torch.cat([hidden, skip], dim=1), time)
    if kwargs := _prompt_kwargs(block, prompt):
        hidden = block.attentions[layer](hidden, **kwargs, return_dict=False)[0]
    return hidden
