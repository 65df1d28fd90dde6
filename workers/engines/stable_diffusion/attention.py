"""The kernel that computes the UNet's attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import EngineUnavailable, one_line
from shared.settings import Attention, Compile
from workers.engines.stable_diffusion.components import Components

# UNet2DConditionModel ignores diffusers' set_attention_backend, so torch's own switch is used.
KERNELS: Mapping[Attention, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CUDA_ONLY: frozenset[Attention] = frozenset({"cudnn", "efficient", "xformers"})


def set_attention(components: Components, attention: Attention, compile: Compile) -> None:
    """Set the UNet's attention processors.

    Raises EngineUnavailable if the choice cannot run on this device or with this ``compile``.
    """
    if attention == "sliced" and compile not in ("off", "auto"):
        raise EngineUnavailable(
            "attention sliced does not compile; use attention auto or compile off"
        )
    if attention in CUDA_ONLY and components.device.type != "cuda":
        raise EngineUnavailable(f"attention {attention} needs a CUDA device; use attention auto")
    if attention == "sliced":
        components.unet.set_attention_slice("auto")
    if attention == "xformers":
        _enable_xformers(components)


def attention_kernel(attention: Attention) -> AbstractContextManager[object]:
    """Restrict scaled_dot_product_attention to one kernel; other names leave it to torch."""
    if attention in KERNELS:
        return sdpa_kernel(KERNELS[attention])
    return nullcontext()


def _enable_xformers(components: Components) -> None:
    if find_spec("xformers") is None:
        raise EngineUnavailable("xformers is not installed; pip install 'inpaint-batch[xformers]'")
    try:
        components.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        # diffusers runs one attention call to test xformers, which fails in many ways.
        raise EngineUnavailable(
            f"xformers does not run on {components.device}: {one_line(error)}; use attention auto"
        ) from error
