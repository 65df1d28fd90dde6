"""The protocol of an engine: it fills regions."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.errors import Interrupted
from shared.geometry.box import Box
from shared.params import Params

Pixels = NDArray[np.uint8]


class Interruption:
    """A thread-safe stop flag with a reason, which running work checks at every step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: Interrupted | None = None
        self._checked = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the work last called ``check``: how long its current step has taken."""
        return time.monotonic() - self._checked

    def set(self, reason: Interrupted) -> None:
        """Ask the work to stop. The first reason is kept; later ones are ignored."""
        with self._lock:
            self._reason = self._reason or reason

    def check(self) -> None:
        """Raise the reason (LeaseLost, Cancelled or Released) if one is set."""
        self._checked = time.monotonic()
        # Without the lock: the reason is set once, and reading an attribute is atomic.
        if self._reason is not None:
            raise self._reason

    def wait(self, seconds: float) -> None:
        """Sleep, and raise the reason within a tenth of a second of its being set."""
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(remaining, 0.1))
        self.check()


@dataclass(kw_only=True)
class Report:
    """What an engine reports about a filled region; complete when its future is done.

    memory: the measures that made the region's last step fit into memory, such as ``batch 2,
    attention_slicing``; empty if none was needed.
    """

    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class RegionWork:
    """One region to fill, cut out and scaled to engine pixels.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8, 0 or 255, 255 = repaint.
    windows: in this image's pixels; together they cover every masked pixel.
    seed: 0 to 2**64 - 1, distinct per region. priority: higher first. report: the engine
    writes into it.
    """

    image: Pixels
    mask: Pixels
    windows: tuple[Box, ...]
    params: Params
    seed: int
    priority: int = 0
    interruption: Interruption = field(default_factory=Interruption)
    report: Report = field(default_factory=Report)


class Engine(Protocol):
    """Fills regions on one device."""

    @property
    def name(self) -> str:
        """As given to ``--engine``: ``opencv``, ``sd2`` or ``diffusers:...``."""

    @property
    def revision(self) -> str:
        """The exact version: a library's version, or a model's commit or content hash."""

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0 NVIDIA H200``."""

    @property
    def max_batch(self) -> int:
        """The largest number of batch rows of one forward pass."""

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Start one region; the future returns (H, W, 3) uint8 RGB of the work's size.

        It raises EngineError, OutOfMemory, GateError or the interruption's reason.
        """

    def close(self) -> None:
        """Stop the device thread; unfinished work raises Released."""
