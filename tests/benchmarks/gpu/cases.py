"""The cases: plain diffusers in four ways, and the engine with uniform and with mixed jobs."""

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
from tests.benchmarks.gpu.measuring import Run, Work, measured
from tests.benchmarks.gpu.models import Subject
from workers.engines.options import EngineOptions
from workers.engines.protocol import RegionWork
from workers.engines.stable_diffusion.engine import DiffusionEngine
from workers.engines.stable_diffusion.schedulers import build_scheduler

PROMPTS = ("a red cat", "blue sky", "wooden table", "a clean background")
# (share of the full number of steps, guidance, strength, scheduler): what presets ask for.
MIXTURE: tuple[tuple[float, float, float, Any], ...] = (
    (1.0, 7.5, 1.0, "ddim"),
    (0.5, 7.5, 1.0, "dpmpp_2m"),
    (1.0, 8.5, 0.75, "ddim"),
    (0.5, 1.0, 1.0, "euler"),
    (0.7, 7.0, 0.9, "euler"),
    (0.5, 9.5, 0.8, "dpmpp_2m"),
)


class Bench:
    """Cases over one model; each takes up to ``seconds`` besides its warm-up."""

    def __init__(self, subject: Subject, work: Work, *, seconds: float, compile: str) -> None:
        self.subject = subject
        self.work = work
        self.seconds = seconds
        self.compile: Any = compile
        self._compiled: Any = None

    def uniform(self, n: int) -> Params:
        return Params(
            prompt=PROMPTS[n % len(PROMPTS)],
            num_inference_steps=self.subject.steps,
            strength=1.0,
            width=self.subject.side,
            height=self.subject.side,
        )

    def mixed(self, n: int) -> Params:
        share, guidance, strength, scheduler = MIXTURE[_shuffled(n) % len(MIXTURE)]
        return Params(
            **{
                **vars(self.uniform(n)),
                "num_inference_steps": max(2, int(share * self.subject.steps)),
                "guidance_scale": guidance,
                "strength": strength,
                "scheduler": scheduler,
            }
        )

    def guide(self) -> Run:
        """(a) One call an image, in half precision, nothing else."""
        return self._one_by_one("(a) diffusers, as guides print it", self.subject.pipeline())

    def xformers(self) -> Run:
        """(b)"""
        name = "(b) the same with xFormers"
        if find_spec("xformers") is None or self.subject.device.type != "cuda":
            return Run(name=name, note="not installed")
        pipeline = self.subject.pipeline()
        before = dict(pipeline.unet.attn_processors)
        pipeline.enable_xformers_memory_efficient_attention()
        try:
            return self._one_by_one(name, pipeline)
        finally:
            pipeline.unet.set_attn_processor(before)

    def compiled(self) -> Run:
        """(c) The UNet in channels_last, compiled with CUDA graphs."""
        return self._one_by_one("(c) diffusers compiled, batch 1", self._compiled_pipeline())

    def static_batch(self) -> Run:
        """(d)"""
        size = self.subject.static_batch
        pipeline = self._compiled_pipeline()
        run = Run(name=f"(d) diffusers compiled, batch {size}")
        self._paint(pipeline, [self.uniform(0)] * size)
        with measured(run, self.subject.device):
            for _ in self._while_time():
                self._timed_batch(run, pipeline, [self.uniform(n) for n in range(size)])
        return run

    def grouped(self) -> Run:
        """(g) As many jobs in hand as ours has, grouped by equal parameters, filled up to (d)'s."""
        size = self.subject.static_batch
        pipeline = self._compiled_pipeline()
        run = Run(name=f"(g) mixed jobs through (d) in groups of {size}")
        self._paint(pipeline, [self.uniform(0)] * size)
        numbers = count()
        in_hand: list[Params] = []
        with measured(run, self.subject.device):
            for _ in self._while_time():
                in_hand += [self.mixed(next(numbers)) for _ in range(4 * size - len(in_hand))]
                group = [one for one in in_hand if _key(one) == _key(in_hand[0])][:size]
                self._timed_batch(run, pipeline, group, padded=size)
                for one in group:
                    in_hand.remove(one)
        return run

    def engine_uniform(self, **options: Any) -> Run:
        """(e)"""
        with self.engine(**options) as engine:
            return self._through(Run(name="(e) ours, uniform"), engine, self.uniform)

    def engine_mixed(self, **options: Any) -> Run:
        """(f)"""
        with self.engine(**options) as engine:
            return self._through(Run(name="(f) ours, mixed"), engine, self.mixed)

    @contextmanager
    def engine(self, **options: Any) -> Iterator[DiffusionEngine]:
        subject = self.subject
        if subject.device.type == "cuda":
            subject.components.unet.to(memory_format=torch.channels_last)
            subject.components.vae.to(memory_format=torch.channels_last)
        chosen = {"max_batch": subject.max_batch, "compile": self.compile, **options}
        found = DiffusionEngine(
            name="bench", components=subject.components, options=EngineOptions(**chosen)
        )
        try:
            yield found
        finally:
            found.close()

    def region(self, n: int, params: Params) -> RegionWork:
        image, mask = self.picture(n)
        windows = (Box(0, 0, params.width, params.height),)
        return RegionWork(image=image, mask=mask, windows=windows, params=params, seed=n)

    def picture(self, n: int) -> tuple[Any, Any]:
        side = self.subject.side
        image = np.random.default_rng(n % 8).integers(0, 256, (side, side, 3), dtype=np.uint8)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[side // 4 : side // 2, side // 4 : 3 * side // 4] = 255
        return image, mask

    def _through(self, run: Run, engine: DiffusionEngine, params: Callable[[int], Params]) -> Run:
        """With as many jobs in hand as a forward has rows: twice what it holds with guidance."""
        numbers = count()
        threads = engine.max_batch
        run.note = f"max_batch {engine.max_batch}, compile {self.compile}"

        def paint_until(end: float) -> None:
            while time.perf_counter() < end:
                number = next(numbers)
                self._paint_one(run, engine, number, params(number))

        self._paint_one(Run(name="warm-up"), engine, 0, params(0))
        with (
            measured(run, self.subject.device),
            ThreadPoolExecutor(threads) as pool,
        ):
            end = time.perf_counter() + self.seconds
            for future in [pool.submit(paint_until, end) for _ in range(threads)]:
                future.result()
        return run

    def _paint_one(self, run: Run, engine: DiffusionEngine, n: int, params: Params) -> None:
        start = time.perf_counter()
        engine.submit(self.region(n, params)).result()
        run.latencies.append(time.perf_counter() - start)
        run.images += 1
        run.flop += self.work.of(params)

    def _one_by_one(self, name: str, pipeline: Any) -> Run:
        run = Run(name=name)
        self._paint(pipeline, [self.uniform(0)])
        with measured(run, self.subject.device):
            for n in self._while_time():
                self._timed_batch(run, pipeline, [self.uniform(n)])
        return run

    def _timed_batch(self, run: Run, pipeline: Any, jobs: list[Params], *, padded: int = 0) -> None:
        start = time.perf_counter()
        self._paint(pipeline, jobs + jobs[-1:] * (padded - len(jobs)))
        run.latencies += [time.perf_counter() - start] * len(jobs)
        run.images += len(jobs)
        run.flop += sum(self.work.of(one) for one in jobs)

    def _paint(self, pipeline: Any, jobs: list[Params]) -> None:
        """One call for jobs that differ in their prompts and pictures only."""
        first = jobs[0]
        pictures = [self.picture(n) for n in range(len(jobs))]
        pipeline.scheduler = build_scheduler(
            self.subject.components.scheduler_config, first.scheduler
        )
        pipeline(
            prompt=[one.prompt for one in jobs],
            image=[Image.fromarray(image) for image, _ in pictures],
            mask_image=[Image.fromarray(mask) for _, mask in pictures],
            height=first.height,
            width=first.width,
            strength=first.strength,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            generator=torch.Generator(self.subject.device).manual_seed(0),
        )

    def _compiled_pipeline(self) -> Any:
        pipeline = self.subject.pipeline()
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
        end = time.perf_counter() + self.seconds
        for n in count():
            yield n
            if time.perf_counter() >= end:
                return


def _key(params: Params) -> tuple[Any, ...]:
    found = params
    return found.num_inference_steps, found.guidance_scale, found.strength, found.scheduler


def _shuffled(n: int) -> int:
    """Jobs do not arrive in the mixture's order."""
    return int(np.random.default_rng(n).integers(1 << 30))
