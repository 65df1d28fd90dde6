"""Whether the engine's host side keeps a GPU busy, measured with a simulated device.

Jobs have 50 steps at 512x512. The device takes the time that SD2 would take at a given TFLOP/s;
tensors, queues, schedulers and threads are real. H200s reach some 400 TFLOP/s here, and 790 in
plain matrix products.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from shared.params import Params
from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.measure import CaseResult, FlopCounts
from tests.benchmarks.gpu.models import load_tiny_model
from tests.benchmarks.side_by_side import print_row
from tests.benchmarks.simulated_device import UNET_ROW, VAE_DECODING, VAE_ENCODING, simulate
from workers.worker_process import SWITCH_SECONDS

WORK = FlopCounts(
    unet_row=UNET_ROW * 1e12, vae_encode=VAE_ENCODING * 1e12, vae_decode=VAE_DECODING * 1e12
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="duration of each run")
    parser.add_argument("--tflops", type=float, nargs="+", default=(400.0, 800.0))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    model = replace(load_tiny_model(torch.device("cpu")), steps=50, side=512, max_batch=64)
    bench = GpuBenchmark(model, WORK, seconds=options.seconds, compile="off")
    print_row("64 rows, 50 steps, 512x512", "images a second", "device idle", "longest gap, ms")
    for tflops in options.tflops:
        _measure(bench, tflops)


def _measure(bench: GpuBenchmark, tflops: float) -> None:
    workloads: list[tuple[str, Callable[[int], Params]]] = [
        ("uniform jobs", bench.uniform),
        ("mixed jobs", bench.mixed),
        *((f"mixed jobs, cache_interval={n}", partial(_with_deepcache, bench, n)) for n in (3, 5)),
    ]
    for name, params in workloads:
        with bench.engine() as engine:
            clock = simulate(engine, tflops=tflops)
            run = bench.run_engine(CaseResult(name=name), engine, params)
        cells = f"{run.images / run.seconds:.2f}", f"{clock.idle_share:.1%}"
        print_row(f"  {tflops:g} TFLOP/s, {name}", *cells, f"{1000 * max(clock.gaps):.0f}")


def _with_deepcache(bench: GpuBenchmark, cache_interval: int, n: int) -> Params:
    return replace(bench.mixed(n), cache_interval=cache_interval)


if __name__ == "__main__":
    main()
