"""What is chosen by measurement: only what is faster, and only what computes the same."""

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
    """Among ways that all give RESULT, but for those that are given another one."""
    ready: list[str] = []

    def make(way: str) -> Callable[[], Tensor]:
        found = results.get(way, RESULT)
        if isinstance(found, Exception):
            raise found
        ready.append(way)
        return lambda: found

    return choose_fastest(list(seconds), make, lambda run: seconds[ready[-1]])


def test_the_fastest_way_is_chosen() -> None:
    assert choose({"plain": 3, "flash": 2, "cudnn": 1, "efficient": 2}) == "cudnn"


def test_the_first_way_stays_where_nothing_is_clearly_faster() -> None:
    assert choose({"plain": 1.0, "flash": 0.98}) == "plain"
    assert choose({"plain": 1.0, "flash": 0.96}) == "flash"


@pytest.mark.parametrize(
    "wrong", [RESULT * 0.5, RESULT.flip(0), torch.full_like(RESULT, torch.nan)]
)
def test_a_way_that_computes_something_else_is_not_used(
    wrong: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose({"plain": 3, "broken": 1, "flash": 2}, broken=wrong) == "flash"
    assert "broken computes something else than plain, and is not used" in caplog.text


def test_rounding_is_no_difference() -> None:
    assert choose({"plain": 3, "half": 1}, half=RESULT.half()) == "half"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("No viable backend"), ValueError("no compiler"), torch.OutOfMemoryError()],
)
def test_a_way_that_does_not_run_is_passed_over(error: Exception) -> None:
    assert choose({"plain": 3, "missing": 1, "flash": 2}, missing=error) == "flash"


def test_what_the_first_way_or_a_lost_device_raises_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        choose({"plain": 3, "flash": 2}, plain=torch.OutOfMemoryError())
    with pytest.raises(torch.AcceleratorError):
        choose({"plain": 3, "flash": 2}, flash=torch.AcceleratorError("lost"))


def test_the_first_result_is_kept_while_the_next_way_overwrites_it() -> None:
    """As graphs do that share their memory."""
    shared = RESULT.clone()

    def make(way: str) -> Callable[[], Tensor]:
        return lambda: shared.copy_(RESULT if way == "plain" else -RESULT)

    assert choose_fastest(["plain", "wrong"], make, stopwatch=iter_of(2.0, 1.0)) == "plain"


def test_a_way_is_gone_before_the_next_is_made() -> None:
    """Two graphs of the largest batch would not fit beside each other."""
    alive: list[weakref.ref[Any]] = []

    class Graph:
        def __call__(self) -> Tensor:
            return RESULT

    def make(way: str) -> Callable[[], Tensor]:
        assert all(one() is None for one in alive)
        graph = Graph()
        alive.append(weakref.ref(graph))
        if way == "broken":
            raise RuntimeError("after it was made")
        return graph

    assert choose_fastest(["plain", "broken", "flash"], make, iter_of(2.0, 1.0)) == "flash"
    assert len(alive) == 3


def iter_of(*seconds: float) -> Callable[[Any], float]:
    left: Iterator[float] = iter(seconds)
    return lambda run: next(left)


def test_the_stopwatch_runs_what_it_times() -> None:
    calls: list[int] = []

    def run() -> Tensor:
        calls.append(1)
        return RESULT

    assert stopwatch_for(torch.device("cpu"))(run) >= 0
    assert len(calls) == 3
