"""8-bit weights on the CPU: a forward pass of SD2's UNet, and images of the tiny pipeline.

With random weights a change means another image, not a worse one.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import torch

from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.measure import count_flop, print_table
from tests.benchmarks.gpu.models import load_tiny_model, with_full_unet
from tests.benchmarks.gpu.quantization import quantized_forwards, quantized_images

STEPS, SIDE = 50, 128


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = replace(load_tiny_model(torch.device("cpu")), steps=STEPS, side=SIDE, max_batch=16)
    header, *rows = quantized_forwards(with_full_unet(model), rows=1, repeats=1)
    print_table("Quantization, SD2's UNet, float32, 256x256", header, rows)
    bench = GpuBenchmark(model, count_flop(model), seconds=0, compile="off")
    header, *rows = quantized_images(bench)
    print_table(f"Quantization, {STEPS} steps, {SIDE}x{SIDE}", header, rows)


if __name__ == "__main__":
    sys.exit(main())
