"""Measures two implementations alternately, and prints rows of a table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import psutil


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Seconds of each run, ours and theirs, in the order of measurement."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Median of theirs over ours, pair by pair."""
        return statistics.median(t / o for t, o in zip(self.theirs, self.ours, strict=True))


def measure_alternately(
    ours: Callable[[], float], theirs: Callable[[], float], *, repeats: int
) -> Pair:
    """Each callable returns the seconds of one run.

    They alternate, so that a machine that slows down slows both.
    """
    pair = Pair(ours=[], theirs=[])
    for _ in range(repeats):
        pair.theirs.append(theirs())
        pair.ours.append(ours())
    return pair


def measure_seconds(work: Callable[[], object]) -> float:
    """The seconds of wall-clock time that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> str:
    """Cores, memory, system and the versions of what is measured."""
    names = ("celery", "kombu", "redis", "sqlalchemy", "pillow", "diffusers", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    )


def print_row(*cells: object) -> None:
    print(
        "  ".join(
            f"{cell!s:<{width}}" for cell, width in zip(cells, (44, 22, 22, 14), strict=False)
        )
    )
