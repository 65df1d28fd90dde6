"""8-bit weights for the UNet's linear layers, with torchao."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from shared.errors import EngineUnavailable
from shared.settings import Quantization
from workers.engines.options import EngineOptions

MIN_CAPABILITY: Mapping[Quantization, tuple[int, int]] = {
    "int8_weights": (8, 0),  # for bfloat16 arithmetic
    "int8": (8, 0),
    "fp8": (8, 9),
}
WEIGHT_MULTIPLE = 16  # the kernels need both sides of a weight to be multiples of it


def check_quantization(options: EngineOptions, device: torch.device) -> None:
    """Raises EngineUnavailable if the choice cannot run here; called before any file is read."""
    if options.quantization == "off":
        return
    if find_spec("torchao") is None:
        raise EngineUnavailable(
            "torchao is not installed; pip install 'inpaint-batch[quantization]'"
        )
    if reason := _unsupported_reason(options, device):
        raise EngineUnavailable(f"quantization {options.quantization} {reason}")


def unet_dtype(dtype: torch.dtype, quantization: Quantization) -> torch.dtype:
    """Return bfloat16 instead of float16 for a quantized UNet.

    Products with int8 weights are summed before they are scaled: a weight of 0.05 may be stored
    as 127, and the sums exceed float16's largest value, 65504.
    """
    is_quantized = quantization != "off"
    return torch.bfloat16 if is_quantized and dtype == torch.float16 else dtype


def quantize(unet: Any, options: EngineOptions, device: torch.device) -> None:
    """Quantize the UNet's attention blocks in place, on the host. device: where they will run.

    The linear layers of these blocks (projections, queries, keys, values, outputs, feed-forward)
    hold 273 of SD2's 866 million parameters. Not quantized: convolutions; the time embedding,
    whose rows are too few for CUDA's int8 products; layers with a side that is no multiple of 16.
    Each output channel of a weight and each row of activations has a scale of its own, so that a
    window's pixels do not depend on the rest of its batch.

    Raises EngineUnavailable if the model has no such layer.
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
    """Why the choice cannot run here, and the remedy; None if it can."""
    quantization = options.quantization
    if "sequential_offload" in options.memory:
        return "cannot be combined with memory sequential_offload; use memory model_offload"
    if options.dtype == "float16":
        return "overflows float16's range; use dtype auto or bfloat16"
    if quantization == "fp8" and options.dtype == "float32":
        return "computes in bfloat16; use dtype auto or bfloat16"
    if device.type == "cpu":
        needs_cuda = "needs a CUDA device; use int8_weights, int8 or off"
        return needs_cuda if quantization == "fp8" else None
    required, actual = MIN_CAPABILITY[quantization], torch.cuda.get_device_capability(device)
    if actual < required:
        alternative = "int8_weights" if actual >= MIN_CAPABILITY["int8_weights"] else "off"
        return (
            f"needs compute capability {required[0]}.{required[1]}, and {device} has "
            f"{actual[0]}.{actual[1]}; use {alternative}"
        )
    return _uncompiled_reason(options) if quantization == "int8" else None


def _uncompiled_reason(options: EngineOptions) -> str | None:
    """torchao's int8 product on CUDA must be compiled: eager, it reads values on the host.

    A CUDA graph cannot capture that. Autotuning (attention ``auto``, compile ``auto``) runs the
    eager model too.
    """
    is_autotuned = options.attention == "auto" and not options.deterministic
    if options.compile in ("default", "max-autotune") and not is_autotuned:
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

    # True: torchao sets process-wide flags of torch's compiler, which then searches longer.
    sets_compiler = options.compile == "max-autotune"
    if options.quantization == "int8_weights":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=sets_compiler)
    if options.quantization == "int8":
        return torchao.Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=sets_compiler, reduce_range=should_reduce_range(device)
        )
    return torchao.Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        kernel_preference=KernelPreference.TORCH,  # independent of what else is installed
        set_inductor_config=sets_compiler,
    )
