"""One UNet forward: kernels, compiled code and graphs give what the plain model gives."""

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
from tests.workers.engines.stable_diffusion.samples import components, engine, region
from workers.engines.stable_diffusion import unet_runner as module
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.unet_runner import CapturedGraph, KernelChoice, UNetRunner


@pytest.fixture
def parts(tiny_model: Path) -> Components:
    return components(tiny_model)


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    return draw(rows, 9, 8, 8), torch.linspace(1, 999, rows), draw(rows, 77, 32)


def plain(parts: Components, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    found = parts.unet(given[0], given[1], encoder_hidden_states=given[2]).sample
    assert isinstance(found, Tensor)
    return found


def test_a_plain_forward_is_the_model(parts: Components) -> None:
    run = UNetRunner(parts, attention="auto", compile="off", graphs=True)
    with torch.inference_mode():
        assert torch.equal(run(*batch(3)), plain(parts, batch(3)))
    assert not run.needs_buckets


FLASH, MATH = "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math"


@pytest.mark.parametrize(
    ("attention", "used", "unused"), [("flash", FLASH, MATH), ("math", MATH, FLASH)]
)
def test_only_the_kernel_that_was_chosen_is_used(
    parts: Components, attention: Any, used: str, unused: str
) -> None:
    run = UNetRunner(parts, attention=attention, compile="off", graphs=False)
    with torch.inference_mode():
        with torch.profiler.profile() as profile:
            found = run(*batch(2))
        torch.testing.assert_close(found, plain(parts, batch(2)), atol=1e-5, rtol=1e-4)
    names = " ".join(event.key for event in profile.key_averages())
    assert used in names
    assert unused not in names
    with engine(parts, attention=attention) as ours:
        assert ours.submit(region(num_inference_steps=2)).result(60).shape == (64, 64, 3)


def test_compiled_code_is_made_once_for_all_batch_sizes(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode: compile(unet, backend=backend))
    run = UNetRunner(parts, attention="auto", compile="default", graphs=True)
    assert run.needs_buckets
    with torch.inference_mode():
        for rows in (2, 4, 8):
            found = run(*batch(rows))
            torch.testing.assert_close(found, plain(parts, batch(rows)), atol=1e-5, rtol=1e-4)
        assert made == [1]
        run(*batch(2), is_offloading=True)
    torch._dynamo.reset()


class Recording:
    """Stands for a CUDA graph: replaying computes from its own tensors into its own output."""

    def __init__(self, run: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.run, self.inputs, self.output = run, inputs, output

    def replay(self) -> None:
        inputs, timesteps, embeddings = self.inputs
        found = self.run(inputs, timesteps, encoder_hidden_states=embeddings).sample
        self.output.copy_(found)

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def test_a_graph_is_captured_for_each_size_and_reads_what_each_call_brings(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []

    def capture(
        self: UNetRunner, way: KernelChoice, given: tuple[Tensor, Tensor, Tensor]
    ) -> CapturedGraph:
        captured.append(len(given[0]))
        inputs = (given[0].clone(), given[1].clone(), given[2].clone())
        output = torch.zeros(len(given[0]), 4, 8, 8)
        graph: Any = Recording(parts.unet, inputs, output)
        return CapturedGraph(graph=graph, inputs=inputs, output=output)

    monkeypatch.setattr(UNetRunner, "_capture", capture)
    run = UNetRunner(parts, attention="auto", compile="off", graphs=True)
    monkeypatch.setattr(run, "_has_graphs", True)
    with torch.inference_mode():
        first, second = run(*batch(2, seed=1)), run(*batch(2, seed=2))
        assert torch.equal(first, plain(parts, batch(2, seed=1)))
        assert torch.equal(second, plain(parts, batch(2, seed=2)))
        run(*batch(4))
        run(*batch(4), is_offloading=True)
        run(*batch(4), is_attention_sliced=True)
        assert captured == [2, 4]
        run.drop_graphs()
        run(*batch(2))
        assert captured == [2, 4, 2]


class Trials:
    """Says how long each trial took, in turn; fails where there is one more."""

    def __init__(self, *seconds: float) -> None:
        self.left = list(seconds)

    def __call__(self, run: Callable[[], Tensor]) -> float:
        return self.left.pop(0)


def kernels(run: UNetRunner, rows: int, side: int = 8) -> str:
    inputs, timesteps, words = batch(rows)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        run(inputs[..., :side, :side], timesteps, words)
    return " ".join(event.key for event in profile.key_averages())


def test_the_faster_kernel_is_used_and_measured_once_for_a_window_size(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "ATTENTION_CANDIDATES", {"cpu": ("auto", "cudnn", "math")}
    )  # no cudnn here
    trials = Trials(2.0, 1.0)
    run = UNetRunner(parts, attention="auto", compile="off", graphs=False, stopwatch=trials)
    kernels(run, 4)
    assert not trials.left
    found = kernels(run, 2)
    assert MATH in found
    assert FLASH not in found
    trials.left = [1.0, 2.0]
    kernels(run, 2, side=4)
    assert not trials.left
    assert FLASH in kernels(run, 3, side=4)


def test_nothing_is_measured_where_a_kernel_is_named_or_the_engine_is_deterministic(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTENTION_CANDIDATES", {"cpu": ("auto", "math")})
    named = UNetRunner(parts, attention="math", compile="off", graphs=False, stopwatch=Trials())
    assert MATH in kernels(named, 2)
    fixed: dict[str, Any] = {"attention": "auto", "compile": "auto", "graphs": False}
    run = UNetRunner(parts, **fixed, deterministic=True, stopwatch=Trials())
    assert FLASH in kernels(run, 2)
    assert not run.needs_buckets


@pytest.mark.parametrize(
    ("seconds", "factor", "is_used"), [(1.0, 1.0, True), (2.0, 1.0, False), (1.0, 1.5, False)]
)
def test_compiled_code_is_used_where_it_is_faster_and_gives_the_same(
    parts: Components,
    monkeypatch: pytest.MonkeyPatch,
    *,
    seconds: float,
    factor: float,
    is_used: bool,
) -> None:
    calls: list[int] = []

    def compile(unet: Any, mode: Any) -> Any:
        def run(*given: Any, **named: Any) -> tuple[Tensor]:
            calls.append(1)
            return (factor * unet(*given, **named)[0],)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    trials = Trials(2.0, seconds)
    run = UNetRunner(parts, attention="auto", compile="auto", graphs=False, stopwatch=trials)
    assert run.needs_buckets
    with torch.inference_mode():
        run(*batch(4))
        calls.clear()
        found = run(*batch(2))
    assert bool(calls) == is_used
    assert torch.equal(found, plain(parts, batch(2)))


def test_convolutions_are_tried_out_only_while_a_graph_is_captured() -> None:
    flags = torch.backends.cudnn
    assert not flags.benchmark
    with module._benchmark_convolutions():
        assert flags.benchmark
    assert not flags.benchmark


def test_a_kernel_that_cannot_run_is_an_error_of_the_region(parts: Components) -> None:
    with engine(parts, attention="efficient") as ours, pytest.raises(EngineError):
        ours.submit(region(num_inference_steps=2)).result(60)


def test_pixels_do_not_depend_on_how_the_forward_is_run(tiny_model: Path) -> None:
    results = []
    for attention in ("auto", "math"):
        with engine(components(tiny_model), attention=attention) as ours:
            results.append(ours.submit(region()).result(60))
    assert np.abs(results[0].astype(int) - results[1]).max() <= 1
