"""Choices of the engine measured one by one: forwards, kernels, memory modes, less work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor

from shared.params import Params
from shared.settings import MemoryMode
from tests.benchmarks.gpu.cases import GpuBenchmark
from tests.benchmarks.gpu.measure import GIB, CaseResult, measure_case, synchronize
from tests.benchmarks.gpu.models import BenchmarkModel
from workers.engines.protocol import Pixels
from workers.engines.stable_diffusion.unet_runner import UNetRunner

ROWS = (2, 8, 16, 32, 64)
REPEATS = 5
REPETITIONS = 3
ACCELERATIONS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("ddim, all steps", 1.0, {}),
    ("ddim, guidance in the first half", 1.0, {"guidance_end": 0.5}),
    ("ddim, whole every 3rd step", 1.0, {"cache_interval": 3}),
    ("ddim, whole every 5th step", 1.0, {"cache_interval": 5}),
    ("dpmpp_2m, half the steps", 0.5, {"scheduler": "dpmpp_2m"}),
    ("unipc, half the steps", 0.5, {"scheduler": "unipc"}),
    ("dpmpp_2m, 0.4 of the steps", 0.4, {"scheduler": "dpmpp_2m"}),
)


def forwards(bench: GpuBenchmark) -> list[list[str]]:
    """Milliseconds of a UNet forward for each batch size, one way and another."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("eager", {"graphs": False, "compile": "off"}),
        ("CUDA graphs", {"graphs": True, "compile": "off"}),
    ]
    if bench.compile != "off":
        ways.append(("compiled, CUDA graphs", {"graphs": True, "compile": bench.compile}))
    rows = ROWS[:2] if bench.model.is_tiny else ROWS
    found = []
    for name, options in ways:
        forward = UNetRunner(bench.model.components, attention="auto", **options)
        found.append([name, *(f"{forward_ms(bench.subject, forward, n):.1f}" for n in rows)])
        forward.drop_graphs()
    return [["rows", *map(str, rows)], *found]


def kernels(bench: GpuBenchmark) -> list[list[str]]:
    """Milliseconds of a forward under each attention kernel that runs here."""
    names = ("auto", "math") if bench.model.device.type == "cpu" else _KERNELS
    rows = 2 if bench.model.is_tiny else 32
    found = []
    for name in names:
        forward = UNetRunner(bench.model.components, attention=name, compile="off", graphs=False)
        found.append([name, f"{forward_ms(bench.subject, forward, rows):.1f}"])
    return [["attention", f"ms, {rows} rows"], *found]


_KERNELS: tuple[Any, ...] = ("auto", "flash", "cudnn", "efficient", "math")


def memory_modes(bench: GpuBenchmark) -> list[list[str]]:
    """Four jobs of four steps in each mode."""
    found = [["memory mode", "peak GiB", "images/s"]]
    for mode in (None, *get_args(MemoryMode)):
        run = CaseResult(name=mode or "none")
        memory = (mode,) if mode else ()
        with (
            _restored(bench.model),
            _small(bench, memory) as engine,
            measure_case(run, bench.model.device),
        ):
            run_jobs(bench, engine, [_few(bench, n) for n in range(4)])
        found.append([run.name, f"{run.peak_bytes / GIB:.2f}", f"{4 / run.seconds:.2f}"])
    return found


def accelerations(bench: GpuBenchmark) -> list[list[str]]:
    """Fewer steps or rows: speed in the best of some turns, and the change of a pixel, of 255."""
    seconds: dict[str, list[float]] = {name: [] for name, *_ in ACCELERATIONS}
    pictures: dict[str, list[Pixels]] = {}
    with bench.engine(compile="off") as engine:
        run_jobs(bench, engine, [_few(bench, n) for n in range(8)])
        for _ in range(REPETITIONS):
            for name, share, values in ACCELERATIONS:
                jobs = [_accelerated_params(bench, n, share, values) for n in range(8)]
                start = time.perf_counter()
                pictures[name] = run_jobs(bench, engine, jobs)
                seconds[name].append(time.perf_counter() - start)
    found = [["way", "images/s", "speed", "mean change", "largest change"]]
    first = ACCELERATIONS[0][0]
    for name, spent in seconds.items():
        changes = np.abs(np.stack(pictures[name]).astype(int) - np.stack(pictures[first]))
        speed, ratio = f"{8 / min(spent):.2f}", f"{min(seconds[first]) / min(spent):.2f}x"
        found.append([name, speed, ratio, f"{changes.mean():.1f}", f"{changes.max()}"])
    return found


def _accelerated_params(
    bench: GpuBenchmark, n: int, share: float, values: dict[str, Any]
) -> Params:
    steps = max(2, int(share * bench.model.steps))
    return Params(**{**vars(bench.uniform(n)), "num_inference_steps": steps, **values})


def determinism(bench: GpuBenchmark) -> list[list[str]]:
    """One job alone and beside seven others: are the pixels the same to the last bit?"""
    found = [["engine", "alone and in company"]]
    for is_deterministic in (False, True):
        options = {"compile": "off", "max_batch": 8, "deterministic": is_deterministic}
        with bench.engine(**options) as engine:
            jobs = [bench.mixed(n) for n in range(8)]
            alone = run_jobs(bench, engine, jobs[:1])[0]
            beside = run_jobs(bench, engine, jobs)[0]
        difference = int(abs(alone.astype(int) - beside).max())
        verdict = "the same bits" if difference == 0 else f"differ by up to {difference} of 255"
        found.append(["deterministic" if is_deterministic else "default", verdict])
    return found


def forward_ms(
    model: BenchmarkModel, forward: UNetRunner, rows: int, *, repeats: int = REPEATS
) -> float:
    """The mean of some forwards, after two to warm up."""
    given = forward_inputs(model, rows)
    with torch.inference_mode():
        for _ in range(2):
            forward(*given)
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(repeats):
            forward(*given)
        synchronize(model.device)
    return (time.perf_counter() - start) / repeats * 1000


def forward_inputs(model: BenchmarkModel, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise for latents and for words, the same each time; the step in the middle."""
    parts, device = model.components, model.device
    side = model.side // parts.vae_factor
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 9, side, side, generator=generator)
    words = torch.randn(rows, 77, parts.unet.config.cross_attention_dim, generator=generator)
    timesteps = torch.full((rows,), 500.0)
    return inputs.to(device), timesteps.to(device), words.to(device, parts.dtype)


def _few(bench: GpuBenchmark, n: int) -> Params:
    return Params(**{**vars(bench.uniform(n)), "num_inference_steps": 4})


def _small(bench: GpuBenchmark, memory: tuple[str, ...]) -> Any:
    return bench.engine(memory=memory, compile="off", graphs=False, max_batch=8)


def run_jobs(bench: GpuBenchmark, engine: Any, jobs: list[Params]) -> list[Pixels]:
    futures = [engine.submit(bench.region(n, params)) for n, params in enumerate(jobs)]
    return [future.result() for future in futures]


@contextmanager
def _restored(model: BenchmarkModel) -> Iterator[None]:
    """The model as it was, whatever an engine's modes did to it."""
    parts = model.components
    processors = dict(parts.unet.attn_processors)
    yield
    parts.vae.disable_tiling()
    parts.vae.disable_slicing()
    for part in (parts.unet, parts.vae, parts.text_encoder):
        remove_hook_from_module(part, recurse=True)
        part.to(model.device)
    parts.unet.set_attn_processor(processors)
