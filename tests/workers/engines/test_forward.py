"""One UNet forward: kernels, compiled code and graphs give what the plain model gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import EngineError
from tests.workers.engines.samples import components, engine, region
from workers.engines import forward as module
from workers.engines.diffusers_loading import Components
from workers.engines.forward import Captured, Forward


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
    run = Forward(parts, attention="auto", compile="off", graphs=True)
    with torch.inference_mode():
        assert torch.equal(run(*batch(3)), plain(parts, batch(3)))
    assert not run.wants_buckets


FLASH, MATH = "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math"


@pytest.mark.parametrize(
    ("attention", "used", "unused"), [("flash", FLASH, MATH), ("math", MATH, FLASH)]
)
def test_only_the_kernel_that_was_chosen_is_used(
    parts: Components, attention: Any, used: str, unused: str
) -> None:
    run = Forward(parts, attention=attention, compile="off", graphs=False)
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
    run = Forward(parts, attention="auto", compile="default", graphs=True)
    assert run.wants_buckets
    with torch.inference_mode():
        for rows in (2, 4, 8):
            found = run(*batch(rows))
            torch.testing.assert_close(found, plain(parts, batch(rows)), atol=1e-5, rtol=1e-4)
        assert made == [1]
        run(*batch(2), is_moving=True)
    torch._dynamo.reset()


class Recording:
    """Stands for a CUDA graph: replaying computes from its own tensors into its own output."""

    def __init__(self, run: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.run, self.inputs, self.output = run, inputs, output

    def replay(self) -> None:
        inputs, timesteps, embeddings = self.inputs
        found = self.run(inputs, timesteps, encoder_hidden_states=embeddings).sample
        self.output.copy_(found)


def test_a_graph_is_captured_for_each_size_and_reads_what_each_call_brings(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[int] = []

    def capture(self: Forward, given: tuple[Tensor, ...]) -> Captured:
        captured.append(len(given[0]))
        inputs = tuple(tensor.clone() for tensor in given)
        output = torch.zeros(len(given[0]), 4, 8, 8)
        graph: Any = Recording(parts.unet, inputs, output)
        return Captured(graph=graph, inputs=inputs, output=output)

    monkeypatch.setattr(Forward, "_capture", capture)
    run = Forward(parts, attention="auto", compile="off", graphs=True)
    monkeypatch.setattr(run, "_has_graphs", True)
    with torch.inference_mode():
        first, second = run(*batch(2, seed=1)), run(*batch(2, seed=2))
        assert torch.equal(first, plain(parts, batch(2, seed=1)))
        assert torch.equal(second, plain(parts, batch(2, seed=2)))
        run(*batch(4))
        run(*batch(4), is_moving=True)
        assert captured == [2, 4]
        run.forget()
        run(*batch(2))
        assert captured == [2, 4, 2]


def test_convolutions_are_tried_out_only_while_a_graph_is_captured() -> None:
    flags = torch.backends.cudnn
    assert not flags.benchmark
    with module._trying_convolutions():
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
