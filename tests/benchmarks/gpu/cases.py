"""The cases: plain diffusers in several configurations, the engine with uniform and mixed jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.geometry.box import Box
from shared.params import Params
from tests.benchmarks.gpu.measure import CaseResult, FlopCounts, measure_case
from tests.benchmarks.gpu.models import BenchmarkModel
from workers.engines.options import EngineOptions
from workers.engines.protocol import RegionWork
from workers.engines.stable_diffusion.engine import DiffusionEngine
from workers.engines.stable_diffusion.schedulers import build_scheduler

PROMPTS = ("a red cat", "blue sky", "wooden table", "a clean background")
# (share of the full number of steps, guidance, strength, scheduler), as in the presets.
MIXED_PARAMS: tuple[tuple[float, float, float, Any], ...] = (
    (1.0, 7.5, 1.0, "ddim"),
    (0.5, 7.5, 1.0, "dpmpp_2m"),
    (1.0, 8.5, 0.75, "ddim"),
    (0.5, 1.0, 1.0, "euler"),
    (0.7, 7.0, 0.9, "euler"),
    (0.5, 9.5, 0.8, "dpmpp_2m"),
)


class GpuBenchmark:
    """Cases with one model; each takes up to ``seconds`` plus its warm-up."""

    def __init__(
        self, model: BenchmarkModel, flop_counts: FlopCounts, *, seconds: float, compile: str
    ) -> None:
        self.model = model
        self.flop_counts = flop_counts
        self.seconds = seconds
        self.compile: Any = compile
        self._compiled: Any = None

    def uniform(self, n: int) -> Params:
        return Params(
            prompt=PROMPTS[n % len(PROMPTS)],
            num_inference_steps=self.model.steps,
            strength=1.0,
            width=self.model.side,
            height=self.model.side,
        )

    def mixed(self, n: int) -> Params:
        share, guidance, strength, scheduler = MIXED_PARAMS[_shuffled(n) % len(MIXED_PARAMS)]
        return Params(
            **{
                **vars(self.uniform(n)),
                "num_inference_steps": max(2, int(share * self.model.steps)),
                "guidance_scale": guidance,
                "strength": strength,
                "scheduler": scheduler,
            }
        )

    def diffusers_float16(self) -> CaseResult:
        """(a) One pipeline call per image in float16."""
        return self._one_by_one("(a) diffusers, float16", self.model.pipeline())

    def xformers(self) -> CaseResult:
        """(b)"""
        name = "(b) the same with xFormers"
        if find_spec("xformers") is None or self.model.device.type != "cuda":
            return CaseResult(name=name, note="not installed")
        pipeline = self.model.pipeline()
        before = dict(pipeline.unet.attn_processors)
        pipeline.enable_xformers_memory_efficient_attention()
        try:
            return self._one_by_one(name, pipeline)
        finally:
            pipeline.unet.set_attn_processor(before)

    def compiled(self) -> CaseResult:
        """(c) The UNet in channels_last, compiled with CUDA graphs."""
        return self._one_by_one("(c) diffusers compiled, batch 1", self._compiled_pipeline())

    def static_batch(self) -> CaseResult:
        """(d)"""
        size = self.model.static_batch
        pipeline = self._compiled_pipeline()
        run = CaseResult(name=f"(d) diffusers compiled, batch {size}")
        self._run_pipeline(pipeline, [self.uniform(0)] * size)
        with measure_case(run, self.model.device):
            for _ in self._while_time():
                self._timed_batch(run, pipeline, [self.uniform(n) for n in range(size)])
        return run

    def grouped(self) -> CaseResult:
        """(g) As many open jobs as the engine has, grouped by parameters, padded to (d)'s batch."""
        size = self.model.static_batch
        pipeline = self._compiled_pipeline()
        run = CaseResult(name=f"(g) mixed jobs through (d) in groups of {size}")
        self._run_pipeline(pipeline, [self.uniform(0)] * size)
        numbers = count()
        open_jobs: list[Params] = []
        with measure_case(run, self.model.device):
            for _ in self._while_time():
                open_jobs += [self.mixed(next(numbers)) for _ in range(4 * size - len(open_jobs))]
                group = [job for job in open_jobs if _batch_key(job) == _batch_key(open_jobs[0])][
                    :size
                ]
                self._timed_batch(run, pipeline, group, padded=size)
                for job in group:
                    open_jobs.remove(job)
        return run

    def engine_uniform(self, **options: Any) -> CaseResult:
        """(e)"""
        with self.engine(**options) as engine:
            return self.run_engine(CaseResult(name="(e) ours, uniform"), engine, self.uniform)

    def engine_mixed(self, **options: Any) -> CaseResult:
        """(f)"""
        with self.engine(**options) as engine:
            return self.run_engine(CaseResult(name="(f) ours, mixed"), engine, self.mixed)

    @contextmanager
    def engine(self, **options: Any) -> Iterator[DiffusionEngine]:
        model = self.model
        if model.device.type == "cuda":
            model.components.unet.to(memory_format=torch.channels_last)
            model.components.vae.to(memory_format=torch.channels_last)
        values = {"max_batch": model.max_batch, "compile": self.compile, **options}
        engine = DiffusionEngine(
            name="bench", components=model.components, options=EngineOptions(**values)
        )
        try:
            yield engine
        finally:
            engine.close()

    def region(self, n: int, params: Params) -> RegionWork:
        image, mask = self.image_and_mask(n)
        windows = (Box(0, 0, params.width, params.height),)
        return RegionWork(image=image, mask=mask, windows=windows, params=params, seed=n)

    def image_and_mask(self, n: int) -> tuple[Any, Any]:
        side = self.model.side
        image = np.random.default_rng(n % 8).integers(0, 256, (side, side, 3), dtype=np.uint8)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[side // 4 : side // 2, side // 4 : 3 * side // 4] = 255
        return image, mask

    def run_engine(
        self, run: CaseResult, engine: DiffusionEngine, params: Callable[[int], Params]
    ) -> CaseResult:
        """Keep as many jobs open as a batch has rows: twice as many as fit with guidance."""
        numbers = count()
        threads = engine.max_batch
        run.note = f"max_batch {engine.max_batch}, compile {self.compile}"

        def run_jobs_until(end: float) -> None:
            while time.perf_counter() < end:
                number = next(numbers)
                self._run_job(run, engine, number, params(number))

        self._run_job(CaseResult(name="warm-up"), engine, 0, params(0))
        with (
            measure_case(run, self.model.device),
            ThreadPoolExecutor(threads) as pool,
        ):
            end = time.perf_counter() + self.seconds
            for future in [pool.submit(run_jobs_until, end) for _ in range(threads)]:
                future.result()
        return run

    def _run_job(self, run: CaseResult, engine: DiffusionEngine, n: int, params: Params) -> None:
        start = time.perf_counter()
        engine.submit(self.region(n, params)).result()
        run.latencies.append(time.perf_counter() - start)
        run.images += 1
        run.flop += self.flop_counts.of(params)

    def _one_by_one(self, name: str, pipeline: Any) -> CaseResult:
        run = CaseResult(name=name)
        self._run_pipeline(pipeline, [self.uniform(0)])
        with measure_case(run, self.model.device):
            for n in self._while_time():
                self._timed_batch(run, pipeline, [self.uniform(n)])
        return run

    def _timed_batch(
        self, run: CaseResult, pipeline: Any, jobs: list[Params], *, padded: int = 0
    ) -> None:
        start = time.perf_counter()
        self._run_pipeline(pipeline, jobs + jobs[-1:] * (padded - len(jobs)))
        run.latencies += [time.perf_counter() - start] * len(jobs)
        run.images += len(jobs)
        run.flop += sum(self.flop_counts.of(job) for job in jobs)

    def _run_pipeline(self, pipeline: Any, jobs: list[Params]) -> None:
        """One pipeline call for jobs that differ only in their prompts and images."""
        first = jobs[0]
        inputs = [self.image_and_mask(n) for n in range(len(jobs))]
        pipeline.scheduler = build_scheduler(
            self.model.components.scheduler_config, first.scheduler
        )
        pipeline(
            prompt=[job.prompt for job in jobs],
            image=[Image.fromarray(image) for image, _ in inputs],
            mask_image=[Image.fromarray(mask) for _, mask in inputs],
            height=first.height,
            width=first.width,
            strength=first.strength,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=torch.Generator(self.model.device).manual_seed(0),
        )

    def _compiled_pipeline(self) -> Any:
        pipeline = self.model.pipeline()
        if self.compile == "off":
            return pipeline
        if self._compiled is None:
            unet = pipeline.unet.to(memory_format=torch.channels_last)
            self._compiled = torch.compile(
                unet, mode="reduce-overhead", fullgraph=True, dynamic=False
            )
        pipeline.unet = self._compiled
        return pipeline

    def _while_time(self) -> Iterator[int]:
        """Count from 0 until the case's seconds are over."""
        end = time.perf_counter() + self.seconds
        for n in count():
            yield n
            if time.perf_counter() >= end:
                return


def _batch_key(params: Params) -> tuple[Any, ...]:
    """Parameters that one call of diffusers' pipeline has in common for all its images."""
    return (
        params.num_inference_steps,
        params.guidance_scale,
        params.strength,
        params.scheduler,
    )


def _shuffled(n: int) -> int:
    """A fixed pseudo-random number: jobs arrive in no particular order."""
    return int(np.random.default_rng(n).integers(1 << 30))
