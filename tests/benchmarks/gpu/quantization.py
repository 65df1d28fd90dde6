"""Weights of 8 bits: the UNet's size, a forward's time, and how the picture changes."""

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
    pictures = quantized_pictures(bench)
    return [[*one, *other[1:]] for one, other in zip(forwards, pictures, strict=True)]


def quantized_forwards(
    model: BenchmarkModel, *, rows: int, compile: Any = "off", repeats: int = REPEATS
) -> list[list[str]]:
    """The best of some turns, in which all kinds take part; the change is of predicted noise."""
    options = _options(model, compile)
    kinds = _kinds(model, options)
    forwards = {
        kind: UNetRunner(
            one.components, attention=options.attention, compile=options.compile, graphs=True
        )
        for kind, one in kinds.items()
    }
    times = {kind: float("inf") for kind in kinds}
    for _ in range(REPETITIONS):
        for kind, forward in forwards.items():
            times[kind] = min(times[kind], forward_ms(kinds[kind], forward, rows, repeats=repeats))
    plain = _prediction(model, forwards["off"], rows)
    found = [["weights", "UNet, MB", "ms a forward", "speed", "change of the noise"]]
    for kind, spent in times.items():
        size = sum(map(_bytes, kinds[kind].components.unet.parameters())) / 1e6
        noise = _prediction(model, forwards[kind], rows)
        change = float((noise - plain).abs().mean() / plain.abs().mean())
        speed = f"{times['off'] / spent:.2f}x"
        found.append([kind, f"{size:.4g}", f"{spent:.4g}", speed, f"{change:.2%}"])
    return found


def quantized_pictures(bench: GpuBenchmark) -> list[list[str]]:
    """The change of a pixel, of 255, in some pictures."""
    options = _options(bench.model, bench.compile)
    found = [["weights", "mean change", "largest change"]]
    first = None
    for kind, model in _kinds(bench.model, options).items():
        own = GpuBenchmark(model, bench.flop_counts, seconds=0, compile=options.compile)
        with own.engine(attention=options.attention, max_batch=IMAGES) as engine:
            pictures = np.stack(run_jobs(own, engine, [own.uniform(n) for n in range(IMAGES)]))
        first = pictures if first is None else first
        change = np.abs(pictures.astype(int) - first)
        found.append([kind, f"{change.mean():.2f}", f"{change.max()}"])
    return found


def _options(model: BenchmarkModel, compile: Any) -> EngineOptions:
    is_on_cuda = model.device.type == "cuda"
    return EngineOptions(attention="flash" if is_on_cuda else "auto", compile=compile)


def _kinds(model: BenchmarkModel, options: EngineOptions) -> Mapping[Quantization, BenchmarkModel]:
    """The model with each kind of weights that runs here, unquantized first."""
    found: dict[Quantization, BenchmarkModel] = {}
    for kind in get_args(Quantization):
        try:
            found[kind] = _quantized(model, replace(options, quantization=kind))
        except EngineUnavailable as error:
            print(f"left out: {error}")
    return found


def _quantized(model: BenchmarkModel, options: EngineOptions) -> BenchmarkModel:
    parts, kind = model.components, options.quantization
    check_quantization(options, parts.device)
    if kind == "off":
        return model
    unet = copy.deepcopy(parts.unet)
    if (dtype := unet_dtype(parts.dtype, kind)) != parts.dtype:
        unet.to(dtype)
    quantize(unet, options, parts.device)
    return replace(model, components=replace(parts, unet=unet, quantization=kind))


def _prediction(model: BenchmarkModel, forward: UNetRunner, rows: int) -> Tensor:
    with torch.inference_mode():
        return forward(*forward_inputs(model, rows))


def _bytes(weight: Tensor) -> int:
    """A quantized weight is several tensors."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)
