"""Autotuning chooses the fastest candidate among those that give the same result."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.engines.stable_diffusion.autotune import choose_fastest, stopwatch_for

RESULT = torch.linspace(-1, 1, 100)


def choose(seconds: dict[str, float], **results: Tensor | Exception) -> str:
    """Choose among named candidates, which return RESULT unless another result is given."""
    made: list[str] = []

    def make(name: str) -> Callable[[], Tensor]:
        result = results.get(name, RESULT)
        if isinstance(result, Exception):
            raise result
        made.append(name)
        return lambda: result

    return choose_fastest(list(seconds), make, lambda run: seconds[made[-1]])


def stopwatch_of(*seconds: float) -> Callable[[Any], float]:
    """A stopwatch that returns these times one after another."""
    times: Iterator[float] = iter(seconds)
    return lambda run: next(times)


def test_the_fastest_candidate_is_chosen() -> None:
    assert choose({"plain": 3, "flash": 2, "cudnn": 1, "efficient": 2}) == "cudnn"


def test_the_first_candidate_stays_unless_another_is_faster_by_3_percent() -> None:
    assert choose({"plain": 1.0, "flash": 0.98}) == "plain"
    assert choose({"plain": 1.0, "flash": 0.96}) == "flash"


@pytest.mark.parametrize(
    "wrong", [RESULT * 0.5, RESULT.flip(0), torch.full_like(RESULT, torch.nan)]
)
def test_a_candidate_with_another_result_is_skipped(
    wrong: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose({"plain": 3, "broken": 1, "flash": 2}, broken=wrong) == "flash"
    assert "skipped broken: its result differs from plain" in caplog.text


def test_rounding_does_not_count_as_another_result() -> None:
    assert choose({"plain": 3, "half": 1}, half=RESULT.half()) == "half"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("No viable backend"), ValueError("no compiler"), torch.OutOfMemoryError()],
)
def test_a_candidate_that_fails_is_skipped(error: Exception) -> None:
    assert choose({"plain": 3, "missing": 1, "flash": 2}, missing=error) == "flash"


def test_errors_of_the_first_candidate_and_of_a_lost_device_propagate() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        choose({"plain": 3, "flash": 2}, plain=torch.OutOfMemoryError())
    with pytest.raises(torch.AcceleratorError):
        choose({"plain": 3, "flash": 2}, flash=torch.AcceleratorError("lost"))


def test_the_first_result_is_copied_before_the_next_candidate_overwrites_it() -> None:
    """CUDA graphs that share a memory pool overwrite each other's outputs."""
    shared = RESULT.clone()

    def make(name: str) -> Callable[[], Tensor]:
        return lambda: shared.copy_(RESULT if name == "plain" else -RESULT)

    assert choose_fastest(["plain", "wrong"], make, stopwatch_of(2.0, 1.0)) == "plain"


def test_a_candidate_is_freed_before_the_next_is_made() -> None:
    """Two graphs of the largest batch would not fit the device together."""
    graphs: list[weakref.ref[Any]] = []

    class Graph:
        def __call__(self) -> Tensor:
            return RESULT

    def make(name: str) -> Callable[[], Tensor]:
        assert all(reference() is None for reference in graphs)
        graph = Graph()
        graphs.append(weakref.ref(graph))
        if name == "broken":
            raise RuntimeError("after it was made")
        return graph

    assert choose_fastest(["plain", "broken", "flash"], make, stopwatch_of(2.0, 1.0)) == "flash"
    assert len(graphs) == 3


def test_the_stopwatch_runs_the_callable_three_times() -> None:
    calls: list[int] = []

    def run() -> Tensor:
        calls.append(1)
        return RESULT

    assert stopwatch_for(torch.device("cpu"))(run) >= 0
    assert len(calls) == 3
