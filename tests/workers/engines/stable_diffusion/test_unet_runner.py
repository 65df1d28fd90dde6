"""UNet forward passes: kernels, compiled code and graphs give the plain model's result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import EngineError
from tests.workers.engines.stable_diffusion.samples import load_tiny, open_engine, region_work
from workers.engines.stable_diffusion import unet_runner as module
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.unet_runner import (
    CapturedGraph,
    KernelChoice,
    UNetInputs,
    UNetRunner,
)


@pytest.fixture
def components(tiny_model: Path) -> Components:
    return load_tiny(tiny_model)


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    return draw(rows, 9, 8, 8), torch.linspace(1, 999, rows), draw(rows, 77, 32)


def plain(components: Components, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    sample, timesteps, embeddings = inputs
    noise = components.unet(sample, timesteps, encoder_hidden_states=embeddings).sample
    assert isinstance(noise, Tensor)
    return noise


def test_an_eager_forward_pass_equals_the_model(components: Components) -> None:
    runner = UNetRunner(components, attention="auto", compile="off", graphs=True)
    with torch.inference_mode():
        assert torch.equal(runner(*batch(3)), plain(components, batch(3)))
    assert not runner.needs_buckets


FLASH, MATH = "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math"


@pytest.mark.parametrize(
    ("attention", "used", "unused"), [("flash", FLASH, MATH), ("math", MATH, FLASH)]
)
def test_only_the_named_kernel_is_used(
    components: Components, attention: Any, used: str, unused: str
) -> None:
    runner = UNetRunner(components, attention=attention, compile="off", graphs=False)
    with torch.inference_mode():
        with torch.profiler.profile() as profile:
            output = runner(*batch(2))
        torch.testing.assert_close(output, plain(components, batch(2)), atol=1e-5, rtol=1e-4)
    names = " ".join(event.key for event in profile.key_averages())
    assert used in names
    assert unused not in names
    with open_engine(components, attention=attention) as engine:
        assert engine.submit(region_work(num_inference_steps=2)).result(60).shape == (64, 64, 3)


def test_the_unet_is_compiled_once_for_all_batch_sizes(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compilations.append(1)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode: compile(unet, backend=backend))
    runner = UNetRunner(components, attention="auto", compile="default", graphs=True)
    assert runner.needs_buckets
    with torch.inference_mode():
        for rows in (2, 4, 8):
            output = runner(*batch(rows))
            torch.testing.assert_close(output, plain(components, batch(rows)), atol=1e-5, rtol=1e-4)
        assert compilations == [1]
        runner(*batch(2), is_offloading=True)
    torch._dynamo.reset()


class FakeGraph:
    """Stands for a CUDA graph: replay reads its own input tensors and overwrites its output."""

    def __init__(self, run: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.run, self.inputs, self.output = run, inputs, output

    def replay(self) -> None:
        inputs, timesteps, embeddings = self.inputs
        noise = self.run(inputs, timesteps, encoder_hidden_states=embeddings).sample
        self.output.copy_(noise)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def test_a_graph_is_captured_once_per_shape_and_reads_each_calls_inputs(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []

    def capture(self: UNetRunner, choice: KernelChoice, inputs: UNetInputs) -> CapturedGraph:
        captured.append(len(inputs.sample))
        inputs = UNetInputs(*(tensor.clone() for tensor in inputs))
        output = torch.zeros(len(inputs.sample), 4, 8, 8)
        graph: Any = FakeGraph(components.unet, inputs, output)
        return CapturedGraph(graph=graph, inputs=inputs, output=output)

    monkeypatch.setattr(UNetRunner, "_capture", capture)
    runner = UNetRunner(components, attention="auto", compile="off", graphs=True)
    monkeypatch.setattr(runner, "_uses_graphs", True)
    with torch.inference_mode():
        first, second = runner(*batch(2, seed=1)), runner(*batch(2, seed=2))
        assert torch.equal(first, plain(components, batch(2, seed=1)))
        assert torch.equal(second, plain(components, batch(2, seed=2)))
        runner(*batch(4))
        runner(*batch(4), is_offloading=True)
        runner(*batch(4), is_attention_sliced=True)
        assert captured == [2, 4]
        runner.drop_graphs()
        runner(*batch(2))
        assert captured == [2, 4, 2]


class FakeStopwatch:
    """Returns these times one after another; fails if there is one measurement more."""

    def __init__(self, *seconds: float) -> None:
        self.remaining = list(seconds)

    def __call__(self, run: Callable[[], Tensor]) -> float:
        return self.remaining.pop(0)


def kernels_used(runner: UNetRunner, rows: int, side: int = 8) -> str:
    sample, timesteps, embeddings = batch(rows)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        runner(sample[..., :side, :side], timesteps, embeddings)
    return " ".join(event.key for event in profile.key_averages())


def test_the_faster_kernel_is_used_and_measured_once_per_window_size(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "ATTENTION_CANDIDATES", {"cpu": ("auto", "cudnn", "math")}
    )  # the CPU has no cudnn
    stopwatch = FakeStopwatch(2.0, 1.0)
    runner = UNetRunner(
        components, attention="auto", compile="off", graphs=False, stopwatch=stopwatch
    )
    kernels_used(runner, 4)
    assert not stopwatch.remaining
    names = kernels_used(runner, 2)
    assert MATH in names
    assert FLASH not in names
    stopwatch.remaining = [1.0, 2.0]
    kernels_used(runner, 2, side=4)
    assert not stopwatch.remaining
    assert FLASH in kernels_used(runner, 3, side=4)


def test_named_kernels_and_deterministic_engines_are_not_autotuned(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTENTION_CANDIDATES", {"cpu": ("auto", "math")})
    named = UNetRunner(
        components, attention="math", compile="off", graphs=False, stopwatch=FakeStopwatch()
    )
    assert MATH in kernels_used(named, 2)
    options: dict[str, Any] = {"attention": "auto", "compile": "auto", "graphs": False}
    runner = UNetRunner(components, **options, deterministic=True, stopwatch=FakeStopwatch())
    assert FLASH in kernels_used(runner, 2)
    assert not runner.needs_buckets


@pytest.mark.parametrize(
    ("seconds", "factor", "is_used"), [(1.0, 1.0, True), (2.0, 1.0, False), (1.0, 1.5, False)]
)
def test_compiled_code_is_used_if_it_is_faster_and_gives_the_same_result(
    components: Components,
    monkeypatch: pytest.MonkeyPatch,
    *,
    seconds: float,
    factor: float,
    is_used: bool,
) -> None:
    calls: list[int] = []

    def compile(unet: Any, mode: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            calls.append(1)
            return (factor * unet(*args, **kwargs)[0],)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    stopwatch = FakeStopwatch(2.0, seconds)
    runner = UNetRunner(
        components, attention="auto", compile="auto", graphs=False, stopwatch=stopwatch
    )
    assert runner.needs_buckets
    with torch.inference_mode():
        runner(*batch(4))
        calls.clear()
        output = runner(*batch(2))
    assert bool(calls) == is_used
    assert torch.equal(output, plain(components, batch(2)))


def test_convolutions_are_benchmarked_only_during_capture() -> None:
    flags = torch.backends.cudnn
    assert not flags.benchmark
    with module._benchmark_convolutions():
        assert flags.benchmark
    assert not flags.benchmark


def test_a_kernel_that_cannot_run_fails_the_region(components: Components) -> None:
    with open_engine(components, attention="efficient") as engine, pytest.raises(EngineError):
        engine.submit(region_work(num_inference_steps=2)).result(60)


def test_pixels_do_not_depend_on_the_kernel(tiny_model: Path) -> None:
    results = []
    for attention in ("auto", "math"):
        with open_engine(load_tiny(tiny_model), attention=attention) as engine:
            results.append(engine.submit(region_work()).result(60))
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1
