"""Measures speed, memory and idle time, and prints them as tables."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.params import Params
from tests.benchmarks.gpu.models import BenchmarkModel

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class FlopCounts:
    """FLOP of one call of each component; a multiply-add counts as two."""

    unet_row: float
    vae_encode: float
    vae_decode: float

    def of(self, params: Params) -> float:
        """FLOP of one window with these parameters, however it is computed."""
        steps = min(int(params.num_inference_steps * params.strength), params.num_inference_steps)
        rows = 2 if params.guidance_scale > 1 else 1
        encodings = 1 if params.strength == 1 else 2
        return steps * rows * self.unet_row + encodings * self.vae_encode + self.vae_decode


@dataclass(kw_only=True)
class CaseResult:
    """seconds: of the whole case. latencies: seconds of each image. idle: share, 0 to 1."""

    name: str
    images: int = 0
    seconds: float = 0.0
    flop: float = 0.0
    peak_bytes: int = 0
    idle: float | None = None
    latencies: list[float] = field(default_factory=list)
    note: str = ""

    def cells(self, peak_flops: float) -> list[str]:
        if not self.images:
            return [self.name, "-", "-", "-", "-", "-", "-", "-", self.note]
        flops = self.flop / self.seconds
        ordered = sorted(self.latencies)
        return [
            self.name,
            f"{self.images / self.seconds:.3f}",
            f"{flops / 1e12:.4g}",
            f"{flops / peak_flops:.1%}",
            f"{self.peak_bytes / GIB:.2f}",
            "-" if self.idle is None else f"{self.idle:.0%}",
            f"{statistics.median(ordered):.3f}",
            f"{ordered[int(0.95 * (len(ordered) - 1))]:.3f}",
            self.note,
        ]


CASE_COLUMNS = [
    *("case", "images/s", "TFLOP/s", "of peak", "peak GiB", "idle", "p50 s", "p95 s", "note"),
]


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """As Markdown, to be pasted into the documents."""
    print(f"\n## {title}\n")
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)


def count_flop(model: BenchmarkModel) -> FlopCounts:
    """Count the operations of one call of each component with torch's counter."""
    components, device = model.components, model.device
    side = model.side // components.vae_factor
    latents = torch.zeros(1, 4, side, side, device=device, dtype=components.dtype)
    inputs = torch.zeros(1, 9, side, side, device=device, dtype=components.dtype)
    embeddings = torch.zeros(
        1, 77, components.unet.config.cross_attention_dim, device=device, dtype=components.dtype
    )
    image = torch.zeros(1, 3, model.side, model.side, device=device, dtype=components.dtype)
    return FlopCounts(
        unet_row=flop(lambda: components.unet(inputs, 1, encoder_hidden_states=embeddings)),
        vae_encode=flop(lambda: components.vae.encode(image)),
        vae_decode=flop(lambda: components.vae.decode(latents)),
    )


def flop(call: Callable[[], object]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak_flops(model: BenchmarkModel) -> float:
    """FLOP/s of a large matrix product in the model's dtype, the best of five."""
    n = 256 if model.is_tiny else 8192
    a, b = (torch.randn(n, n, device=model.device).to(model.components.dtype) for _ in "ab")
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        synchronize(model.device)
        times.append(time.perf_counter() - start)
    return 20 * 2 * n**3 / min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def measure_case(run: CaseResult, device: torch.device) -> Iterator[None]:
    """Fill in the result's seconds, peak memory and idle share."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with _measure_idle_share(run, device):
        start = time.perf_counter()
        yield
        synchronize(device)
        run.seconds = time.perf_counter() - start
    if device.type == "cuda":
        run.peak_bytes = torch.cuda.max_memory_reserved(device)


@contextmanager
def _measure_idle_share(run: CaseResult, device: torch.device) -> Iterator[None]:
    """The share of time without a kernel, by nvidia-smi, sampled ten times a second."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield
        return
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as out:
        command = ["nvidia-smi", *query, f"--id={device.index or 0}", "-lms", "100"]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)
        out.seek(0)
        shares = [float(line) for line in out if line.strip().isdigit()]
    if len(shares) > 2:
        run.idle = 1 - statistics.mean(shares[1:]) / 100
