"""When the device's memory runs out: telling it, and going on with fewer rows for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_BACKOFF_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 3600.0


class Backoff:
    """How long not to try again what did not fit: twice as long after each failure."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = MIN_BACKOFF_SECONDS / 2
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        return self._clock() >= self._until

    def increase(self) -> None:
        self._seconds = min(self._seconds * 2, MAX_BACKOFF_SECONDS)
        self.restart()

    def restart(self) -> None:
        self._until = self._clock() + self._seconds


class RowLimit:
    """The most rows that share a forward pass: halved when they did not fit, then doubled again."""

    def __init__(self, most: int, *, stage: str, clock: Callable[[], float] = time.monotonic):
        """stage: what runs, for messages, such as ``the UNet``."""
        self.most = most
        self.stage = stage
        self._rows = most
        self._backoff = Backoff(clock)

    @property
    def rows(self) -> int:
        if self._rows < self.most and self._backoff.is_over:
            self._rows = min(self._rows * 2, self.most)
            self._backoff.restart()
        return self._rows

    @property
    def is_reduced(self) -> bool:
        return self._rows < self.most

    def halve(self, tried: int) -> None:
        """tried: rows that did not fit, more than one."""
        self._rows = min(self._rows, tried // 2)
        self._backoff.increase()
        log.warning(
            "out of memory with %d rows in %s; going on with %d", tried, self.stage, self._rows
        )


def run_in_chunks(
    run: Callable[[list[Tensor]], Tensor],
    items: list[Tensor],
    limit: RowLimit,
    on_out_of_memory: Callable[[int], None],
) -> Iterator[Tensor]:
    """What ``run`` makes of each item, in chunks of the limit, each run once it is asked for.

    give_way: told how many items did not fit, makes the next try need less, or raises.
    """
    start = 0
    while start < len(items):
        chunk = items[start : start + limit.rows]
        found = try_run(run, chunk)
        if found is None:
            on_out_of_memory(len(chunk))
        else:
            yield from found.unbind()
            start += len(chunk)


def try_run(run: Callable[[T], Tensor], batch: T) -> Tensor | None:
    """None where memory ran out; by then the error and all that its frames held are gone."""
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """CUDA's own error, or the CPU allocator's, which is a plain RuntimeError.

    One that ends the capture of a graph is followed by another error, which hides it.
    """
    if error is None:
        return False
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        or is_out_of_memory(error.__context__)
    )


def release_memory() -> None:
    """Hands cached blocks back, so that the retry does not fail on fragments."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
