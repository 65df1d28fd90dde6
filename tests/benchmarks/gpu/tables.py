"""One table per option of the engine: batch size, kernels, memory modes, accelerations."""

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
    ("ddim, full every 3rd step", 1.0, {"cache_interval": 3}),
    ("ddim, full every 5th step", 1.0, {"cache_interval": 5}),
    ("dpmpp_2m, half the steps", 0.5, {"scheduler": "dpmpp_2m"}),
    ("unipc, half the steps", 0.5, {"scheduler": "unipc"}),
    ("dpmpp_2m, 0.4 of the steps", 0.4, {"scheduler": "dpmpp_2m"}),
)


def forwards(bench: GpuBenchmark) -> list[list[str]]:
    """Milliseconds of a UNet forward pass for each batch size: eager, graphs, compiled."""
    modes: list[tuple[str, dict[str, Any]]] = [
        ("eager", {"graphs": False, "compile": "off"}),
        ("CUDA graphs", {"graphs": True, "compile": "off"}),
    ]
    if bench.compile != "off":
        modes.append(("compiled, CUDA graphs", {"graphs": True, "compile": bench.compile}))
    rows = ROWS[:2] if bench.model.is_tiny else ROWS
    table = []
    for name, options in modes:
        runner = UNetRunner(bench.model.components, attention="auto", **options)
        table.append([name, *(f"{forward_ms(bench.model, runner, n):.1f}" for n in rows)])
        runner.drop_graphs()
    return [["rows", *map(str, rows)], *table]


def kernels(bench: GpuBenchmark) -> list[list[str]]:
    """Milliseconds of a forward pass with each attention kernel that runs here."""
    names = ("auto", "math") if bench.model.device.type == "cpu" else _KERNELS
    rows = 2 if bench.model.is_tiny else 32
    table = []
    for name in names:
        runner = UNetRunner(bench.model.components, attention=name, compile="off", graphs=False)
        table.append([name, f"{forward_ms(bench.model, runner, rows):.1f}"])
    return [["attention", f"ms, {rows} rows"], *table]


_KERNELS: tuple[Any, ...] = ("auto", "flash", "cudnn", "efficient", "math")


def memory_modes(bench: GpuBenchmark) -> list[list[str]]:
    """Peak memory and speed of four jobs of four steps in each mode."""
    table = [["memory mode", "peak GiB", "images/s"]]
    for mode in (None, *get_args(MemoryMode)):
        run = CaseResult(name=mode or "none")
        memory = (mode,) if mode else ()
        with (
            _restored(bench.model),
            _eager_engine(bench, memory) as engine,
            measure_case(run, bench.model.device),
        ):
            run_jobs(bench, engine, [_four_steps(bench, n) for n in range(4)])
        table.append([run.name, f"{run.peak_bytes / GIB:.2f}", f"{4 / run.seconds:.2f}"])
    return table


def accelerations(bench: GpuBenchmark) -> list[list[str]]:
    """Fewer steps or rows: speed, the best of three, and the change of a pixel, of 255."""
    seconds: dict[str, list[float]] = {name: [] for name, *_ in ACCELERATIONS}
    images: dict[str, list[Pixels]] = {}
    with bench.engine(compile="off") as engine:
        run_jobs(bench, engine, [_four_steps(bench, n) for n in range(8)])
        for _ in range(REPETITIONS):
            for name, share, values in ACCELERATIONS:
                jobs = [_accelerated_params(bench, n, share, values) for n in range(8)]
                start = time.perf_counter()
                images[name] = run_jobs(bench, engine, jobs)
                seconds[name].append(time.perf_counter() - start)
    table = [["acceleration", "images/s", "speed", "mean change", "largest change"]]
    first = ACCELERATIONS[0][0]
    for name, spent in seconds.items():
        changes = np.abs(np.stack(images[name]).astype(int) - np.stack(images[first]))
        speed, ratio = f"{8 / min(spent):.2f}", f"{min(seconds[first]) / min(spent):.2f}x"
        table.append([name, speed, ratio, f"{changes.mean():.1f}", f"{changes.max()}"])
    return table


def _accelerated_params(
    bench: GpuBenchmark, n: int, share: float, values: dict[str, Any]
) -> Params:
    steps = max(2, int(share * bench.model.steps))
    return Params(**{**vars(bench.uniform(n)), "num_inference_steps": steps, **values})


def determinism(bench: GpuBenchmark) -> list[list[str]]:
    """Whether one job's pixels are bit-identical alone and in a batch with seven others."""
    table = [["engine", "alone and in a batch"]]
    for is_deterministic in (False, True):
        options = {"compile": "off", "max_batch": 8, "deterministic": is_deterministic}
        with bench.engine(**options) as engine:
            jobs = [bench.mixed(n) for n in range(8)]
            alone = run_jobs(bench, engine, jobs[:1])[0]
            batched = run_jobs(bench, engine, jobs)[0]
        difference = int(abs(alone.astype(int) - batched).max())
        verdict = "bit-identical" if difference == 0 else f"differ by up to {difference} of 255"
        table.append(["deterministic" if is_deterministic else "default", verdict])
    return table


def forward_ms(
    model: BenchmarkModel, runner: UNetRunner, rows: int, *, repeats: int = REPEATS
) -> float:
    """The mean of ``repeats`` forward passes, after two to warm up."""
    inputs = forward_inputs(model, rows)
    with torch.inference_mode():
        for _ in range(2):
            runner(*inputs)
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(repeats):
            runner(*inputs)
        synchronize(model.device)
    return (time.perf_counter() - start) / repeats * 1000


def forward_inputs(model: BenchmarkModel, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents and embeddings, the same each time, at the middle timestep."""
    components, device = model.components, model.device
    side = model.side // components.vae_factor
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, 9, side, side, generator=generator)
    embeddings = torch.randn(
        rows, 77, components.unet.config.cross_attention_dim, generator=generator
    )
    timesteps = torch.full((rows,), 500.0)
    return sample.to(device), timesteps.to(device), embeddings.to(device, components.dtype)


def _four_steps(bench: GpuBenchmark, n: int) -> Params:
    return Params(**{**vars(bench.uniform(n)), "num_inference_steps": 4})


def _eager_engine(bench: GpuBenchmark, memory: tuple[str, ...]) -> Any:
    return bench.engine(memory=memory, compile="off", graphs=False, max_batch=8)


def run_jobs(bench: GpuBenchmark, engine: Any, jobs: list[Params]) -> list[Pixels]:
    futures = [engine.submit(bench.region(n, params)) for n, params in enumerate(jobs)]
    return [future.result() for future in futures]


@contextmanager
def _restored(model: BenchmarkModel) -> Iterator[None]:
    """Undo on exit what an engine's memory modes changed in the model."""
    components = model.components
    processors = dict(components.unet.attn_processors)
    yield
    components.vae.disable_tiling()
    components.vae.disable_slicing()
    for module in (components.unet, components.vae, components.text_encoder):
        remove_hook_from_module(module, recurse=True)
        module.to(model.device)
    components.unet.set_attn_processor(processors)
