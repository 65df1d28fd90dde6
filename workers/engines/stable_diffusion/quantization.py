"""The UNet's linear layers with weights of 8 bits, through torchao."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from shared.errors import EngineUnavailable
from shared.settings import Quantization
from workers.engines.options import EngineOptions

MIN_CAPABILITY: Mapping[Quantization, tuple[int, int]] = {
    "int8_weights": (8, 0),  # for bfloat16
    "int8": (8, 0),
    "fp8": (8, 9),
}
WEIGHT_MULTIPLE = 16  # of both sides of a weight, as the kernels want them


def check_quantization(options: EngineOptions, device: torch.device) -> None:
    """Before anything is read. Raises EngineUnavailable where the choice cannot run here."""
    if options.quantization == "off":
        return
    if find_spec("torchao") is None:
        raise EngineUnavailable(
            "torchao is not installed; pip install 'inpaint-batch[quantization]'"
        )
    if obstacle := _unsupported_reason(options, device):
        raise EngineUnavailable(f"quantization {options.quantization} {obstacle}")


def unet_dtype(dtype: torch.dtype, quantization: Quantization) -> torch.dtype:
    """bfloat16 in place of float16: sums of products with whole numbers leave float16's range.

    They are scaled only afterwards: float16 ends at 65504, and a weight of 0.05 may be 127.
    """
    is_quantized = quantization != "off"
    return torch.bfloat16 if is_quantized and dtype == torch.float16 else dtype


def quantize(unet: Any, options: EngineOptions, device: torch.device) -> None:
    """Replaces weights in place, on the host; ``device`` is where they will run.

    Those of the attention blocks' linear layers: projections, queries, keys, values, outputs and
    feed-forward, 273 of SD2's 866 million parameters. Left as they are: convolutions; layers
    of the time step, whose rows are too few for CUDA's int8 products; sides that are no
    multiple of 16. Each output channel of a weight has a scale, and each row of activations
    its own, so that no window's pixels depend on what else is in its batch.

    Raises EngineUnavailable where the model has no such layer.
    """
    if not any(is_quantizable(module, name) for name, module in unet.named_modules()):
        raise EngineUnavailable("the model has no layers to quantize; use quantization off")
    from torchao.quantization import quantize_

    quantize_(unet, _config(options, device), filter_fn=is_quantizable)


def is_quantizable(module: torch.nn.Module, name: str) -> bool:
    return (
        isinstance(module, torch.nn.Linear)
        and "attentions" in name.split(".")
        and module.in_features % WEIGHT_MULTIPLE == 0
        and module.out_features % WEIGHT_MULTIPLE == 0
    )


def _unsupported_reason(options: EngineOptions, device: torch.device) -> str | None:
    """What stands against it, with the remedy."""
    chosen = options.quantization
    if "sequential_offload" in options.memory:
        return "does not go with memory sequential_offload; use memory model_offload"
    if options.dtype == "float16":
        return "would leave float16's range; use dtype auto or bfloat16"
    if chosen == "fp8" and options.dtype == "float32":
        return "computes in bfloat16; use dtype auto or bfloat16"
    if device.type == "cpu":
        return "needs a CUDA device; use int8_weights, int8 or off" if chosen == "fp8" else None
    least, found = MIN_CAPABILITY[chosen], torch.cuda.get_device_capability(device)
    if found < least:
        other = "int8_weights" if found >= MIN_CAPABILITY["int8_weights"] else "off"
        return (
            f"needs compute capability {least[0]}.{least[1]}, and {device} has "
            f"{found[0]}.{found[1]}; use {other}"
        )
    return _uncompiled_reason(options) if chosen == "int8" else None


def _uncompiled_reason(options: EngineOptions) -> str | None:
    """torchao's int8 product on CUDA looks at values unless compiled, which no graph can hold.

    Attention ``auto`` runs the plain model to choose a kernel, ``compile`` auto to compare.
    """
    is_measured = options.attention == "auto" and not options.deterministic
    if options.compile in ("default", "max-autotune") and not is_measured:
        return None
    return (
        "on CUDA needs compiled code and a named kernel; use compile default with attention "
        "flash, or quantization int8_weights"
    )


def _config(options: EngineOptions, device: torch.device) -> Any:
    from torchao import quantization as torchao
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.utils import should_reduce_range

    is_searching = options.compile == "max-autotune"  # sets torch's compiler to search longer
    if options.quantization == "int8_weights":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=is_searching)
    if options.quantization == "int8":
        return torchao.Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=is_searching, reduce_range=should_reduce_range(device)
        )
    return torchao.Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        kernel_preference=KernelPreference.TORCH,  # the same whatever else is installed
        set_inductor_config=is_searching,
    )
