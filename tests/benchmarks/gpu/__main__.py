"""``python -m tests.benchmarks.gpu [--tiny]``: every case and table, on this machine's first GPU.

``--tiny`` runs the same with the tests' pipeline, also on a CPU, to check the benchmark itself.
"""

from __future__ import annotations

import argparse
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

from tests.benchmarks.gpu import models, tables
from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.measure import (
    CASE_COLUMNS,
    CaseResult,
    count_flop,
    peak_flops,
    print_table,
)
from tests.benchmarks.gpu.quantization import quantization

# The engine first and the longest compilation last, in case time runs out.
CASES: dict[str, Callable[[GpuBenchmark], CaseResult]] = {
    "a": GpuBenchmark.diffusers_float16,
    "e": GpuBenchmark.engine_uniform,
    "f": GpuBenchmark.engine_mixed,
    "d": GpuBenchmark.static_batch,
    "g": GpuBenchmark.grouped,
    "c": GpuBenchmark.compiled,
    "b": GpuBenchmark.xformers,
}
TABLES: dict[str, Callable[[GpuBenchmark], list[list[str]]]] = {
    "UNet forwards in ms": tables.forwards,
    "Attention": tables.kernels,
    "Memory modes": tables.memory_modes,
    "Accelerations": tables.accelerations,
    "Determinism": tables.determinism,
    "Quantization": quantization,
}
MIN_SECONDS = 20.0  # of what is left, for a case to start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the tests' pipeline; takes seconds")
    parser.add_argument(
        "--minutes", type=float, default=6.5, help="start no case or table after this"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each case")
    parser.add_argument("--only", default="", help="cases and tables to run, such as a,e,Attention")
    parser.add_argument("--compile", default="default", choices=("off", "default", "max-autotune"))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * options.minutes
    bench = _bench(options)
    peak = peak_flops(bench.model)
    print(
        f"matrix peak {peak / 1e12:.4g} TFLOP/s, an image of {bench.model.steps} steps takes "
        f"{bench.flop_counts.of(bench.uniform(0)) / 1e12:.4g} TFLOP",
        flush=True,
    )
    selected = set(options.only.split(",")) if options.only else {*CASES, *TABLES}
    runs = [_run(name, bench, end) for name in CASES if name in selected]
    for title, measure in TABLES.items():
        if title not in selected:
            continue
        if time.monotonic() < end:
            print_table(title, *_measure(measure, bench))
        else:
            print(f"out of time; run it alone: --only {title!r}", flush=True)
    ordered = sorted(runs, key=lambda run: run.name)
    print_table("Cases", CASE_COLUMNS, [run.cells(peak) for run in ordered])


def _measure(
    measure: Callable[[GpuBenchmark], list[list[str]]], bench: GpuBenchmark
) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows; a failure becomes the table, and the next one still runs."""
    try:
        header, *rows = measure(bench)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return ["failed"], [[type(error).__name__]]
    return header, rows


def _bench(options: argparse.Namespace) -> GpuBenchmark:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not options.tiny and device.type == "cpu":
        raise SystemExit("there is no CUDA device; --tiny checks the benchmark itself on a CPU")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    if options.tiny:
        torch.set_num_threads(1)
    model = models.load_tiny_model(device) if options.tiny else models.load_sd2(device)
    return GpuBenchmark(
        model,
        count_flop(model),
        seconds=0.2 if options.tiny else options.seconds,
        compile="off" if options.tiny else options.compile,
    )


def _run(name: str, bench: GpuBenchmark, end: float) -> CaseResult:
    remaining = end - time.monotonic()
    if remaining < MIN_SECONDS:
        return CaseResult(name=f"({name})", note="out of time")
    start = time.monotonic()
    try:
        run = CASES[name](bench)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        run = CaseResult(name=f"({name})", note=f"failed: {type(error).__name__}")
    spent = time.monotonic() - start
    print(
        f"{run.name}: {run.images} images in {run.seconds:.1f} s, {spent:.0f} s with warm-up",
        flush=True,
    )
    return run


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("workers").setLevel(logging.INFO)  # shows the autotuner's choices
    main()
