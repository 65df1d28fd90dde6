"""Jobs come in while their pixels fit together."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from shared.errors import Cancelled
from tests.workers.worker_harness import SolidColourEngine, WorkerHarness
from workers.engines.protocol import Interruption, RegionWork
from workers.job_runner import run_job
from workers.pixel_budget import PixelBudget, default_megapixels

MEGAPIXEL = 1_000_000


class Guest:
    """A thread that holds its pixels until it is told to go."""

    def __init__(self, room: PixelBudget, megapixels: float) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(room, megapixels))
        self._thread.start()

    def _stay(self, room: PixelBudget, megapixels: float) -> None:
        with room.holding(int(megapixels * MEGAPIXEL), Interruption()):
            self.entered.set()
            self._go.wait(10)

    def leave(self) -> None:
        self._go.set()
        self._thread.join(10)


def test_pictures_come_in_while_they_fit_together() -> None:
    room = PixelBudget(10)
    first, second = Guest(room, 4), Guest(room, 6)
    assert first.entered.wait(5)
    assert second.entered.wait(5)
    third = Guest(room, 1)
    assert not third.entered.wait(0.1)
    first.leave()
    assert third.entered.wait(5)
    second.leave()
    third.leave()


def test_a_picture_larger_than_the_room_comes_in_alone() -> None:
    room = PixelBudget(10)
    large = Guest(room, 24)
    assert large.entered.wait(5)
    small = Guest(room, 1)
    assert not small.entered.wait(0.1)
    large.leave()
    assert small.entered.wait(5)
    small.leave()


def test_small_pictures_do_not_overtake_a_large_one_that_waits() -> None:
    room = PixelBudget(10)
    first, large = Guest(room, 6), Guest(room, 8)
    assert not large.entered.wait(0.1)
    small = Guest(room, 1)
    assert not small.entered.wait(0.1)
    first.leave()
    assert large.entered.wait(5)
    assert small.entered.wait(5)
    large.leave()
    small.leave()


def test_whoever_waits_can_be_stopped_and_leaves_no_trace() -> None:
    room, stop = PixelBudget(10), Interruption()
    first = Guest(room, 10)
    assert first.entered.wait(5)
    stop.set(Cancelled("job 1 was cancelled"))
    with pytest.raises(Cancelled), room.holding(MEGAPIXEL, stop):
        pass
    first.leave()
    with room.holding(10 * MEGAPIXEL, Interruption()):
        pass


def test_a_machine_s_memory_is_shared_by_its_processes() -> None:
    alone = default_megapixels(1, memory_bytes=48 * 10**9)
    assert alone == 1000
    assert default_megapixels(4, memory_bytes=48 * 10**9) == 250
    assert default_megapixels(8, memory_bytes=10**6) == 1
    assert default_megapixels(1) > 1


def test_jobs_hold_pixels_only_while_they_are_rendered(tmp_path: Path) -> None:
    held, most = [0], [0]
    lock = threading.Lock()

    def on_submit(_work: RegionWork) -> None:
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        threading.Event().wait(0.05)
        with lock:
            held[0] -= 1

    harness = WorkerHarness(
        f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path, SolidColourEngine(on_submit=on_submit)
    )
    whole: Any = {**vars(harness.worker), "room": PixelBudget(1)}
    image = harness.write_image("in.png", (700, 600))
    mask = harness.write_mask("mask.png", (700, 600), (20, 20, 90, 90))
    ids = [harness.add(image=image, mask=mask, output=harness.path(f"{n}.png")) for n in range(6)]
    attempts = {message.job: message.attempt for message in harness.dispatch()}
    threads = [
        threading.Thread(
            target=run_job,
            args=(type(harness.worker)(**whole),),
            kwargs={"job": job, "seen_attempt": attempts[job]},
        )
        for job in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {harness.job(job).state for job in ids} == {"succeeded"}
    assert most[0] <= 2
    harness.close()
