"""The best of several ways to compute one thing: measured on the device, held to one result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Candidate = TypeVar("Candidate")

REPEATS = 3
MAX_TIME_RATIO = 0.97  # of the time; what is less faster may be noise
MAX_DEVIATION = 0.02  # mean, of the result's own mean; half precision's rounding is a tenth of it

Stopwatch = Callable[[Callable[[], Tensor]], float]


def choose_fastest(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Callable[[], Tensor]],
    stopwatch: Stopwatch,
) -> Candidate:
    """The first way, or a later one that is faster by 3% and gives the same result.

    make: what computes one way, made ready; it may raise, and is gone before the next is made,
    lest both must fit the device. Whatever the first one raises is raised; a later one that does
    not run is passed over, unless the device itself is lost.
    """

    def attempt(candidate: Candidate) -> tuple[Tensor, float]:
        run = make(candidate)
        return run().clone(), stopwatch(run)

    best = candidates[0]
    expected, least = attempt(best)
    for candidate in candidates[1:]:
        try:
            found, seconds = attempt(candidate)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            log.info("%s does not run here: %s", candidate, " ".join(str(error).split())[:200])
            continue
        if not is_close(found, expected):
            log.warning(
                "%s computes something else than %s, and is not used", candidate, candidates[0]
            )
        elif seconds < MAX_TIME_RATIO * least:
            best, least = candidate, seconds
    return best


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether they are the same but for rounding, taken over all of their values."""
    deviation = (found.float() - expected.float()).abs().mean()
    return bool(deviation <= MAX_DEVIATION * expected.float().abs().mean())


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Seconds of one call, the least of three, by the device's own clock where it has one."""
    return _on_cuda if device.type == "cuda" else _on_host


def _on_host(run: Callable[[], Tensor]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(REPEATS))


def _on_cuda(run: Callable[[], Tensor]) -> float:
    def once() -> float:
        start, end = _event(), _event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    return min(once() for _ in range(REPEATS))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
