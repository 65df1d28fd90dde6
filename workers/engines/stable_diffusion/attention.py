"""Which kernel computes the UNet's attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import EngineUnavailable
from shared.settings import Attention, Compile
from workers.engines.stable_diffusion.components import Components, one_line

KERNELS: Mapping[Attention, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CUDA_ONLY: frozenset[Attention] = frozenset({"cudnn", "efficient", "xformers"})


def set_attention(components: Components, attention: Attention, compile: Compile) -> None:
    """Sets the UNet's processors. Raises EngineUnavailable where a kernel cannot run here."""
    if attention == "sliced" and compile not in ("off", "auto"):
        raise EngineUnavailable(
            "attention sliced does not compile; use attention auto or compile off"
        )
    if attention in CUDA_ONLY and components.device.type != "cuda":
        raise EngineUnavailable(f"attention {attention} needs a CUDA device; use auto")
    if attention == "sliced":
        components.unet.set_attention_slice("auto")
    if attention == "xformers":
        _use_xformers(components)


def attention_kernel(attention: Attention) -> AbstractContextManager[object]:
    """Inside it torch's scaled dot product uses this kernel alone; any for the other names."""
    if attention in KERNELS:
        return sdpa_kernel(KERNELS[attention])
    return nullcontext()


def _use_xformers(components: Components) -> None:
    if find_spec("xformers") is None:
        raise EngineUnavailable("xformers is not installed; pip install 'inpaint-batch[xformers]'")
    try:
        components.unet.enable_xformers_memory_efficient_attention()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise EngineUnavailable(
            f"xformers does not run on {components.device}: {one_line(error)}; leave it out"
        ) from error
