"""The UNet in two ways that share its deep part between steps: DeepCache (Ma et al. 2023).

From one step to the next the deep features of a UNet hardly change. So a whole forward may keep
the state that enters the last layer of the last up block, and the forwards after it run that
layer alone, on the kept state and on fresh latents and timestep (the paper's first skip branch).

The state travels as further channels behind the latents' own: a forward has one input and one
output whatever it does. Run eagerly, each is what the UNet itself computes, to the last bit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.errors import ParameterError

# whole: the UNet itself. keeping: its state is an output, too. reusing: the last layer alone.
ForwardKind = Literal["full", "cache_write", "cache_read"]

SUPPORTED_LAST_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
# What SD2 has none of, and what is computed from more than latents, timestep and words.
UNSUPPORTED_CONFIG = (
    *("center_input_sample", "class_embed_type", "num_class_embeds", "addition_embed_type"),
    *("encoder_hid_dim_type", "encoder_hid_dim", "time_embedding_act_fn"),
)


def kind_of_step(step: int, cache_interval: int) -> ForwardKind:
    """What the forwards of a region's step are; its first step is 0."""
    if cache_interval == 1:
        return "full"
    return "cache_read" if step % cache_interval else "cache_write"


def check_cache_interval(unet: Any, cache_interval: int) -> None:
    """Raises ParameterError where steps are to share a state and the UNet is laid out otherwise."""
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
    """What runs forwards of a kind, called as the UNet is; the weights are the UNet's own."""
    if kind == "full":
        return unet
    return CacheWriteUNet(unet) if kind == "cache_write" else CacheReadUNet(unet)


class CacheWriteUNet(nn.Module):
    """The whole UNet: (N, in, h, w) to (N, out + state, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        unet, embeddings = self.unet, encoder_hidden_states
        time = _embed_time(unet, sample, timestep)
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, further = block(
                hidden_states=hidden, temb=time, **_prompt_kwargs(block, embeddings)
            )
            skips += further
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, time, **_prompt_kwargs(unet.mid_block, embeddings))
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            skips, given = skips[:-count], skips[-count:]
            hidden = block(
                hidden_states=hidden,
                temb=time,
                res_hidden_states_tuple=tuple(given),
                upsample_size=skips[-1].shape[2:],
                **_prompt_kwargs(block, embeddings),
            )
        last = unet.up_blocks[-1]
        for layer in range(len(last.resnets) - 1):
            hidden = _run_up_layer(last, layer, hidden, skips.pop(), time, embeddings)
        return (
            torch.cat(
                [_run_output_layers(unet, hidden, skips.pop(), time, embeddings), hidden], dim=1
            ),
        )


class CacheReadUNet(nn.Module):
    """The last layer alone: (N, in + state, h, w) to (N, out, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        unet = self.unet
        sample, state = sample.tensor_split([unet.config.in_channels], dim=1)
        time = _embed_time(unet, sample, timestep)
        return (_run_output_layers(unet, state, unet.conv_in(sample), time, encoder_hidden_states),)


def _embed_time(unet: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    found: Tensor = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    return found


def _prompt_kwargs(block: Any, embeddings: Tensor) -> dict[str, Tensor]:
    """The prompt, for a block that reads it."""
    return (
        {"encoder_hidden_states": embeddings}
        if getattr(block, "has_cross_attention", False)
        else {}
    )


def _run_output_layers(
    unet: Any, state: Tensor, first: Tensor, time: Tensor, embeddings: Tensor
) -> Tensor:
    """The last up layer and what follows. first: what ``conv_in`` made."""
    hidden = _run_up_layer(unet.up_blocks[-1], -1, state, first, time, embeddings)
    if unet.conv_norm_out:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    found: Tensor = unet.conv_out(hidden)
    return found


def _run_up_layer(
    block: Any, layer: int, hidden: Tensor, skip: Tensor, time: Tensor, embeddings: Tensor
) -> Tensor:
    hidden = block.resnets[layer](torch.cat([hidden, skip], dim=1), time)
    if _prompt_kwargs(block, embeddings):
        hidden = block.attentions[layer](
            hidden, encoder_hidden_states=embeddings, return_dict=False
        )[0]
    return hidden
