"""Autotuning: time several implementations of one computation on the device, keep the fastest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from shared.errors import one_line

log = logging.getLogger(__name__)
Candidate = TypeVar("Candidate")

REPEATS = 3
MAX_TIME_RATIO = 0.97  # a gain of less than 3% may be noise
MAX_DEVIATION = 0.02  # mean absolute difference / mean magnitude; float16 rounding is near 0.002

Stopwatch = Callable[[Callable[[], Tensor]], float]


def choose_fastest(
    candidates: Sequence[Candidate],
    make: Callable[[Candidate], Callable[[], Tensor]],
    stopwatch: Stopwatch,
) -> Candidate:
    """Return the first candidate, or a later one that is 3% faster and gives the same result.

    make(candidate): a ready-to-run callable; freed before the next candidate is built, so two
    never share device memory.

    Errors of the first candidate propagate. A later candidate that fails is skipped, except on
    torch.AcceleratorError, after which the device may be unusable.
    """
    best = candidates[0]
    expected, best_seconds = _measure(make(best), stopwatch)
    for candidate in candidates[1:]:
        try:
            result, seconds = _measure(make(candidate), stopwatch)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            log.info("skipped %s, which does not run here: %s", candidate, one_line(error))
            continue
        if not is_close(result, expected):
            log.warning("skipped %s: its result differs from %s", candidate, candidates[0])
        elif seconds < MAX_TIME_RATIO * best_seconds:
            best, best_seconds = candidate, seconds
    return best


def _measure(run: Callable[[], Tensor], stopwatch: Stopwatch) -> tuple[Tensor, float]:
    # Candidates may be CUDA graphs of one memory pool: the next replay overwrites the output.
    return run().clone(), stopwatch(run)


def is_close(result: Tensor, expected: Tensor) -> bool:
    """Whether mean |result - expected| <= MAX_DEVIATION * mean |expected|; False for NaN."""
    deviation = (result.float() - expected.float()).abs().mean()
    return bool(deviation <= MAX_DEVIATION * expected.float().abs().mean())


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return a function that runs a callable three times and returns the shortest time, seconds.

    CUDA calls return before the device is done, so they are timed with CUDA events.
    """
    return _time_on_cuda if device.type == "cuda" else _time_on_host


def _time_on_host(run: Callable[[], Tensor]) -> float:
    def run_once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(run_once() for _ in range(REPEATS))


def _time_on_cuda(run: Callable[[], Tensor]) -> float:
    def run_once() -> float:
        start, end = _timing_event(), _timing_event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000  # from milliseconds

    return min(run_once() for _ in range(REPEATS))


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
