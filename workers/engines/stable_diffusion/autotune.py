"""The best of several ways to compute one thing: measured on the device, held to one result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
W = TypeVar("W")

TURNS = 3
GAIN = 0.97  # of the time; what is less faster may be noise
DEVIATION = 0.02  # mean, of the result's own mean; half precision's rounding is a tenth of it

Stopwatch = Callable[[Callable[[], Tensor]], float]


def fastest(
    ways: Sequence[W], make: Callable[[W], Callable[[], Tensor]], stopwatch: Stopwatch
) -> W:
    """The first way, or a later one that is faster by 3% and gives the same result.

    make: what computes one way, made ready; it may raise, and is gone before the next is made,
    lest both must fit the device. Whatever the first one raises is raised; a later one that does
    not run is passed over, unless the device itself is lost.
    """

    def attempt(way: W) -> tuple[Tensor, float]:
        run = make(way)
        return run().clone(), stopwatch(run)

    best = ways[0]
    expected, least = attempt(best)
    for way in ways[1:]:
        try:
            found, seconds = attempt(way)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            log.info("%s does not run here: %s", way, " ".join(str(error).split())[:200])
            continue
        if not agree(found, expected):
            log.warning("%s computes something else than %s, and is not used", way, ways[0])
        elif seconds < GAIN * least:
            best, least = way, seconds
    return best


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether they are the same but for rounding, taken over all of their values."""
    deviation = (found.float() - expected.float()).abs().mean()
    return bool(deviation <= DEVIATION * expected.float().abs().mean())


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Seconds of one call, the least of three, by the device's own clock where it has one."""
    return _on_cuda if device.type == "cuda" else _on_host


def _on_host(run: Callable[[], Tensor]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(TURNS))


def _on_cuda(run: Callable[[], Tensor]) -> float:
    def once() -> float:
        start, end = _event(), _event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return min(once() for _ in range(TURNS))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
