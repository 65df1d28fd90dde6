"""Out-of-memory handling: detect it, halve the batch, grow it again later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")

MIN_BACKOFF_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 3600.0


class Backoff:
    """Exponential back-off: the time to wait doubles with each failure, from 1 minute to 1 hour."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = MIN_BACKOFF_SECONDS / 2
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        return self._clock() >= self._until

    def increase(self) -> None:
        """After a failure: double the time and start it."""
        self._seconds = min(self._seconds * 2, MAX_BACKOFF_SECONDS)
        self.restart()

    def restart(self) -> None:
        """Start the same time again."""
        self._until = self._clock() + self._seconds


class RowLimit:
    """The most rows of a batch: halved when memory runs out, doubled again after a back-off."""

    def __init__(
        self, max_rows: int, *, stage: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """stage: what runs, for messages, such as ``the UNet``."""
        self._max_rows = max_rows
        self._stage = stage
        self._rows = max_rows
        self._backoff = Backoff(clock)

    @property
    def rows(self) -> int:
        """The limit now; reading it after the back-off doubles it."""
        if self.is_reduced and self._backoff.is_over:
            self._rows = min(self._rows * 2, self._max_rows)
            self._backoff.restart()
        return self._rows

    @property
    def is_reduced(self) -> bool:
        return self._rows < self._max_rows

    def halve(self, tried: int) -> None:
        """tried: rows of the batch that ran out of memory, at least 2."""
        self._rows = min(self._rows, tried // 2)
        self._backoff.increase()
        log.warning(
            "out of memory with %d rows in %s; continuing with %d", tried, self._stage, self._rows
        )


def run_in_chunks(
    run: Callable[[list[Tensor]], Tensor],
    items: list[Tensor],
    limit: RowLimit,
    on_out_of_memory: Callable[[int], None],
) -> Iterator[Tensor]:
    """Yield ``run``'s result for each item, one chunk of up to ``limit.rows`` items at a time.

    Lazy: a chunk runs when its first result is consumed. on_out_of_memory(items in the chunk):
    makes the retry need less memory, or raises.
    """
    start = 0
    while start < len(items):
        chunk = items[start : start + limit.rows]
        results = try_run(run, chunk)
        if results is None:
            on_out_of_memory(len(chunk))
        else:
            yield from results.unbind()
            start += len(chunk)


def try_run(run: Callable[[Batch], Tensor], batch: Batch) -> Tensor | None:
    """Return ``run(batch)``, or None if memory ran out; other errors propagate."""
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except block, or the traceback's frames would keep the batch's tensors alive
    # while the caller frees memory for its retry.
    return None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error or one it hides is CUDA's out-of-memory error or the CPU allocator's.

    When memory runs out during a CUDA graph capture, ending the capture raises another error.
    """
    if error is None:
        return False
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        # torch's CPU allocator raises a plain RuntimeError.
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        or is_out_of_memory(error.__context__)
    )


def release_memory() -> None:
    """Return the allocator's cached blocks to the device, so that a retry is not fragmented."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
