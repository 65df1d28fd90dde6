"""Accelerations on the CPU with the tiny pipeline: their speed and the change of the image.

With random weights a change means another image, not a worse one.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import diffusers
import torch

from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.measure import count_flop, flop, print_table
from tests.benchmarks.gpu.models import UNET, load_tiny_model
from tests.benchmarks.gpu.tables import accelerations
from tests.benchmarks.simulated_device import feature_channels
from workers.engines.stable_diffusion.deepcache import unet_for_kind

STEPS, SIDE = 50, 128
SIDES = (512, 768, 1024)  # pixels of SD2's windows
INTERVALS = (3, 5)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = replace(load_tiny_model(torch.device("cpu")), steps=STEPS, side=SIDE, max_batch=16)
    bench = GpuBenchmark(model, count_flop(model), seconds=0, compile="off")
    header, *rows = accelerations(bench)
    print_table(f"Accelerations, {STEPS} steps, {SIDE}x{SIDE}", header, rows)
    header, *rows = sd2_forwards()
    print_table("TFLOP of a row in SD2's UNet, and its speed with DeepCache", header, rows)


def sd2_forwards() -> list[list[str]]:
    """A full forward pass and one that reads the cache, counted on shapes without weights."""
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel(**UNET)  # type: ignore[arg-type]
        table = [["window", "full", "cached", *(f"cache_interval={n}" for n in INTERVALS)]]
        for side in SIDES:
            full = _tflop(unet, UNET["in_channels"], side)
            cached = _tflop(
                unet_for_kind(unet, "cache_read"),
                UNET["in_channels"] + feature_channels(unet),
                side,
            )
            speeds = (n * full / (full + (n - 1) * cached) for n in INTERVALS)
            table.append(
                [str(side), f"{full:.3f}", f"{cached:.3f}", *(f"{speed:.2f}x" for speed in speeds)]
            )
    return table


def _tflop(model: Any, channels: int, side: int) -> float:
    """TFLOP of one row."""
    sample, embeddings = torch.zeros(1, channels, side // 8, side // 8), torch.zeros(1, 77, 1024)
    timestep = torch.zeros(1)
    kwargs = {"encoder_hidden_states": embeddings, "return_dict": False}
    return flop(lambda: model(sample, timestep, **kwargs)) / 1e12


if __name__ == "__main__":
    sys.exit(main())
