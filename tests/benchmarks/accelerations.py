"""Ways to compute less, on the CPU with the tiny pipeline: their speed and how the picture changes.

With random weights a change says that the picture is another one, not that it is a worse one.
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
from tests.benchmarks.simulated_device import state_channels
from workers.engines.stable_diffusion.deepcache import unet_for_kind

STEPS, SIDE = 50, 128
SIDES = (512, 768, 1024)  # pixels of SD2's windows
INTERVALS = (3, 5)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = replace(load_tiny_model(torch.device("cpu")), steps=STEPS, side=SIDE, max_batch=16)
    bench = GpuBenchmark(model, count_flop(model), seconds=0, compile="off")
    head, *rows = accelerations(bench)
    print_table(f"Accelerations, {STEPS} steps, {SIDE}x{SIDE}", head, rows)
    head, *rows = sd2_forwards()
    print_table("TFLOP of a row in SD2's UNet, and its speed where steps reuse", head, rows)


def sd2_forwards() -> list[list[str]]:
    """Counted on shapes alone, so without weights: a whole forward, and one that reuses a state."""
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel(**UNET)  # type: ignore[arg-type]
        found = [["window", "full", "cache_read", *(f"cache_interval={n}" for n in INTERVALS)]]
        for side in SIDES:
            whole = _flop(unet, UNET["in_channels"], side)
            reusing = _flop(
                unet_for_kind(unet, "cache_read"), UNET["in_channels"] + state_channels(unet), side
            )
            speeds = (n * whole / (whole + (n - 1) * reusing) for n in INTERVALS)
            found.append(
                [str(side), f"{whole:.3f}", f"{reusing:.3f}", *(f"{one:.2f}x" for one in speeds)]
            )
    return found


def _flop(model: Any, channels: int, side: int) -> float:
    """In units of 10**12."""
    inputs, words = torch.zeros(1, channels, side // 8, side // 8), torch.zeros(1, 77, 1024)
    time = torch.zeros(1)
    named = {"encoder_hidden_states": words, "return_dict": False}
    return flop(lambda: model(inputs, time, **named)) / 1e12


if __name__ == "__main__":
    sys.exit(main())
