"""The launcher: which ends of a process make it start another, and which do not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.processes import EX_DEVICE_LOST, EX_DEVICE_LOST_LATER, EX_UNAVAILABLE
from tests.workers.worker_harness import WorkerHarness
from workers.supervisor import MAX_DEVICE_LOSSES, Place, Supervisor


@dataclass(frozen=True, kw_only=True)
class Stage(Place):
    """A place whose processes end at once, each with the next status of a list."""

    folder: Path
    statuses: tuple[int, ...]

    def command(self, options: Sequence[str], *, worker: str) -> list[str]:
        started = len(list(self.folder.glob("*.life")))
        (self.folder / f"{worker}.life").touch()
        return [sys.executable, "-I", "-S", "-c", f"raise SystemExit({self.statuses[started]})"]


def lives(tmp_path: Path, *statuses: int) -> int:
    """How many processes were started until the launcher gave up."""
    harness = WorkerHarness(
        f"sqlite:///{tmp_path / 'i.db'}",
        tmp_path,
        broker_url="redis://127.0.0.1:1/0",
        lease_seconds=1,
        heartbeat_seconds=0.1,
    )
    place = Stage(name="host-cpu", cuda=None, folder=tmp_path, statuses=statuses)
    assert Supervisor(harness.worker.settings, harness.db, [place], []).run() == EX_UNAVAILABLE
    harness.close()
    return len(list(tmp_path.glob("*.life")))


def test_a_device_that_is_lost_five_times_in_a_row_is_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    losses = (EX_DEVICE_LOST,) * MAX_DEVICE_LOSSES
    assert lives(tmp_path, *losses) == 5
    assert "host-cpu was lost 5 times in a row without finishing a job" in capfd.readouterr().err


def test_a_device_that_works_in_between_is_started_again(tmp_path: Path) -> None:
    statuses = (EX_DEVICE_LOST, EX_DEVICE_LOST_LATER, 1, EX_DEVICE_LOST, EX_UNAVAILABLE)
    assert lives(tmp_path, *statuses) == 5


def test_an_engine_that_cannot_be_loaded_is_not_tried_twice(tmp_path: Path) -> None:
    assert lives(tmp_path, EX_UNAVAILABLE) == 1
