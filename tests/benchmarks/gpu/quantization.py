"""8-bit weights: the UNet's size, the time of a forward pass, and the change of the image."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from shared.errors import EngineUnavailable
from shared.settings import Quantization
from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.models import BenchmarkModel
from tests.benchmarks.gpu.tables import REPEATS, REPETITIONS, forward_inputs, forward_ms, run_jobs
from workers.engines.options import EngineOptions
from workers.engines.stable_diffusion.quantization import check_quantization, quantize, unet_dtype
from workers.engines.stable_diffusion.unet_runner import UNetRunner

IMAGES = 8


def quantization(bench: GpuBenchmark) -> list[list[str]]:
    """Both tables side by side."""
    rows = 2 if bench.model.is_tiny else 32
    forwards = quantized_forwards(bench.model, rows=rows, compile=bench.compile)
    images = quantized_images(bench)
    return [[*left, *right[1:]] for left, right in zip(forwards, images, strict=True)]


def quantized_forwards(
    model: BenchmarkModel, *, rows: int, compile: Any = "off", repeats: int = REPEATS
) -> list[list[str]]:
    """The best of three repetitions over all kinds; the change is that of the predicted noise."""
    options = _options(model, compile)
    kinds = _kinds(model, options)
    runners = {
        kind: UNetRunner(
            model.components, attention=options.attention, compile=options.compile, graphs=True
        )
        for kind, model in kinds.items()
    }
    times = {kind: float("inf") for kind in kinds}
    for _ in range(REPETITIONS):
        for kind, runner in runners.items():
            times[kind] = min(times[kind], forward_ms(kinds[kind], runner, rows, repeats=repeats))
    plain = _prediction(model, runners["off"], rows)
    table = [["weights", "UNet, MB", "ms a forward", "speed", "change of the noise"]]
    for kind, spent in times.items():
        size = sum(map(_bytes, kinds[kind].components.unet.parameters())) / 1e6
        noise = _prediction(model, runners[kind], rows)
        change = float((noise - plain).abs().mean() / plain.abs().mean())
        speed = f"{times['off'] / spent:.2f}x"
        table.append([kind, f"{size:.4g}", f"{spent:.4g}", speed, f"{change:.2%}"])
    return table


def quantized_images(bench: GpuBenchmark) -> list[list[str]]:
    """The change of a pixel, of 255, over IMAGES images."""
    options = _options(bench.model, bench.compile)
    table = [["weights", "mean change", "largest change"]]
    first = None
    for kind, model in _kinds(bench.model, options).items():
        quantized = GpuBenchmark(model, bench.flop_counts, seconds=0, compile=options.compile)
        with quantized.engine(attention=options.attention, max_batch=IMAGES) as engine:
            images = np.stack(
                run_jobs(quantized, engine, [quantized.uniform(n) for n in range(IMAGES)])
            )
        first = images if first is None else first
        change = np.abs(images.astype(int) - first)
        table.append([kind, f"{change.mean():.2f}", f"{change.max()}"])
    return table


def _options(model: BenchmarkModel, compile: Any) -> EngineOptions:
    is_on_cuda = model.device.type == "cuda"
    return EngineOptions(attention="flash" if is_on_cuda else "auto", compile=compile)


def _kinds(model: BenchmarkModel, options: EngineOptions) -> Mapping[Quantization, BenchmarkModel]:
    """The model with each kind of weights that runs here, unquantized first."""
    table: dict[Quantization, BenchmarkModel] = {}
    for kind in get_args(Quantization):
        try:
            table[kind] = _quantized(model, replace(options, quantization=kind))
        except EngineUnavailable as error:
            print(f"skipped: {error}")
    return table


def _quantized(model: BenchmarkModel, options: EngineOptions) -> BenchmarkModel:
    components, kind = model.components, options.quantization
    check_quantization(options, components.device)
    if kind == "off":
        return model
    unet = copy.deepcopy(components.unet)
    if (dtype := unet_dtype(components.dtype, kind)) != components.dtype:
        unet.to(dtype)
    quantize(unet, options, components.device)
    return replace(model, components=replace(components, unet=unet, quantization=kind))


def _prediction(model: BenchmarkModel, runner: UNetRunner, rows: int) -> Tensor:
    with torch.inference_mode():
        return runner(*forward_inputs(model, rows))


def _bytes(weight: Tensor) -> int:
    """A quantized weight wraps several tensors."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)
