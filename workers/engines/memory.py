"""When the device's memory runs out: telling it, and going on with half as many rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from shared.errors import OutOfMemory

log = logging.getLogger(__name__)
T = TypeVar("T")


class RowLimit:
    """The most rows that share a forward pass; halved each time they did not fit."""

    def __init__(self, rows: int, *, stage: str) -> None:
        """stage: what runs, for messages, such as ``the UNet``."""
        self.rows = rows
        self.stage = stage

    def halve(self, tried: int) -> None:
        """Raises OutOfMemory where a single row was too much."""
        release_memory()
        if tried <= 1:
            raise OutOfMemory(
                f"one window does not fit the device in {self.stage}; use a smaller one"
            )
        self.rows = min(self.rows, tried // 2)
        log.warning(
            "out of memory with %d rows in %s; going on with %d", tried, self.stage, self.rows
        )


def run_in_chunks(run: Callable[[Tensor], Tensor], batch: Tensor, limit: RowLimit) -> Tensor:
    """``run`` over (N, ...) in chunks of the limit, joined again.

    Raises OutOfMemory where even one row does not fit.
    """
    parts: list[Tensor] = []
    start = 0
    while start < len(batch):
        chunk = batch[start : start + limit.rows]
        part = attempt(run, chunk)
        if part is None:
            limit.halve(len(chunk))
        else:
            parts.append(part)
            start += len(chunk)
    return torch.cat(parts)


def attempt(run: Callable[[T], Tensor], batch: T) -> Tensor | None:
    """None where memory ran out; by then the error and all that its frames held are gone."""
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own error, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release_memory() -> None:
    """Hands cached blocks back, so that the retry does not fail on fragments."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
