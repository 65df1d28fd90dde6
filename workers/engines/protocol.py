"""What an engine is: it fills regions, and nothing else."""

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
    """Tells running work to stop at its next step, and why. Set once, read by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: Interrupted | None = None
        self._checked = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Since the work last asked whether it is to stop, which it does at every step."""
        return time.monotonic() - self._checked

    def set(self, reason: Interrupted) -> None:
        """The first reason stands; later ones are ignored."""
        with self._lock:
            self._reason = self._reason or reason

    def check(self) -> None:
        """Raises the reason (LeaseLost, Cancelled or Released) once one is set."""
        self._checked = time.monotonic()
        if self._reason is not None:
            raise self._reason

    def wait(self, seconds: float) -> None:
        """Sleeps, and raises the reason within a tenth of a second once one is set."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))
        self.check()


@dataclass(kw_only=True)
class Report:
    """What an engine tells of a region it has filled; read once its future is done.

    memory: what the region's last step needed to fit, such as ``batch 2, attention_slicing``;
    empty where everything fitted.
    """

    memory: str = ""


@dataclass(frozen=True, kw_only=True)
class RegionWork:
    """One region, cut out and scaled to the engine's pixels.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8, 0 or 255, 255 = repaint.
    windows: (left, top, right, bottom) in this image's pixels, half open; together they
    cover every masked pixel. seed: 0 to 2**64 - 1, already distinct per region. priority:
    higher goes first. report: the engine writes into it.
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
        """What exactly runs: a library's version, or a model's commit or content hash."""

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0 NVIDIA H200``."""

    @property
    def max_batch(self) -> int:
        """How many rows it runs at once; a worker holds twice as many jobs."""

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Starts one region; the future holds (H, W, 3) uint8 RGB of the work's size.

        The future raises EngineError, OutOfMemory or GateError, or the interruption's reason.
        """

    def close(self) -> None:
        """Stops the device thread; work not yet finished raises Released."""
