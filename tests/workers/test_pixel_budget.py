"""Jobs decode while their pixels fit together."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import Cancelled
from tests.workers.worker_harness import SolidColourEngine, WorkerHarness
from workers.engines.protocol import Interruption, RegionWork
from workers.job_runner import run_job
from workers.pixel_budget import PixelBudget, default_megapixels

MEGAPIXEL = 1_000_000


class Holder:
    """A thread that reserves pixels and holds them until ``release``."""

    def __init__(self, budget: PixelBudget, megapixels: float) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(budget, megapixels))
        self._thread.start()

    def _run(self, budget: PixelBudget, megapixels: float) -> None:
        with budget.reserve(int(megapixels * MEGAPIXEL), Interruption()):
            self.entered.set()
            self._go.wait(10)

    def release(self) -> None:
        self._go.set()
        self._thread.join(10)


def test_images_are_decoded_while_they_fit_together() -> None:
    budget = PixelBudget(10)
    first, second = Holder(budget, 4), Holder(budget, 6)
    assert first.entered.wait(5)
    assert second.entered.wait(5)
    third = Holder(budget, 1)
    assert not third.entered.wait(0.1)
    first.release()
    assert third.entered.wait(5)
    second.release()
    third.release()


def test_an_image_larger_than_the_budget_is_decoded_alone() -> None:
    budget = PixelBudget(10)
    large = Holder(budget, 24)
    assert large.entered.wait(5)
    small = Holder(budget, 1)
    assert not small.entered.wait(0.1)
    large.release()
    assert small.entered.wait(5)
    small.release()


def test_small_images_do_not_overtake_a_large_one_that_waits() -> None:
    budget = PixelBudget(10)
    first, large = Holder(budget, 6), Holder(budget, 8)
    assert not large.entered.wait(0.1)
    small = Holder(budget, 1)
    assert not small.entered.wait(0.1)
    first.release()
    assert large.entered.wait(5)
    assert small.entered.wait(5)
    large.release()
    small.release()


def test_a_waiting_job_can_be_interrupted_and_leaves_the_queue() -> None:
    budget, interruption = PixelBudget(10), Interruption()
    first = Holder(budget, 10)
    assert first.entered.wait(5)
    interruption.set(Cancelled("job 1 was cancelled"))
    with pytest.raises(Cancelled), budget.reserve(MEGAPIXEL, interruption):
        pass
    first.release()
    with budget.reserve(10 * MEGAPIXEL, Interruption()):
        pass


def test_a_machine_s_memory_is_shared_by_its_processes() -> None:
    assert default_megapixels(1, memory_bytes=48 * 10**9) == 1000
    assert default_megapixels(4, memory_bytes=48 * 10**9) == 250
    assert default_megapixels(8, memory_bytes=10**6) == 1
    assert default_megapixels(1) > 1


def test_jobs_hold_pixels_only_while_they_are_rendered(tmp_path: Path) -> None:
    rendering, most_at_a_time = 0, 0
    lock = threading.Lock()

    def count(_work: RegionWork) -> None:
        nonlocal rendering, most_at_a_time
        with lock:
            rendering += 1
            most_at_a_time = max(most_at_a_time, rendering)
        threading.Event().wait(0.05)
        with lock:
            rendering -= 1

    engine = SolidColourEngine(on_submit=count)
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path, engine)
    worker = replace(harness.worker, pixel_budget=PixelBudget(1))
    image = harness.write_image("in.png", (700, 600))
    mask = harness.write_mask("mask.png", (700, 600), (20, 20, 90, 90))
    ids = [harness.add(image=image, mask=mask, output=harness.path(f"{n}.png")) for n in range(6)]
    attempts = {message.job: message.attempt for message in harness.dispatch()}
    threads = [
        threading.Thread(
            target=run_job, args=(worker,), kwargs={"job": job, "seen_attempt": attempts[job]}
        )
        for job in ids
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {harness.job(job).state for job in ids} == {"succeeded"}
    assert most_at_a_time <= 2
    harness.close()


class RecordingBudget(PixelBudget):
    """A budget that keeps what jobs reserved."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: list[int] = []

    def _acquire(self, pixels: int, interruption: Interruption) -> None:
        self.reserved.append(pixels)
        super()._acquire(pixels, interruption)


def test_masks_larger_than_the_image_and_fonts_count_in_the_budget(tmp_path: Path) -> None:
    budget = RecordingBudget()
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'jobs.db'}", tmp_path, SolidColourEngine())
    harness.worker = replace(harness.worker, pixel_budget=budget)
    image = harness.write_image("in.png", (70, 60))
    same = harness.write_mask("same.png", (70, 60), (20, 20, 40, 40))
    large = harness.write_mask("large.png", (2000, 1500), (20, 20, 400, 400))
    font = harness.write("font.ttf", b"x" * 24_000)
    damaged = harness.write("damaged.png", b"no mask")
    for mask, params, code in (
        (same, {}, None),
        (large, {}, "mask_size"),
        (same, {"text": "a", "text_font": font}, "bad_font"),
        (damaged, {}, "bad_mask"),
    ):
        output = harness.path(f"out/{len(budget.reserved)}{code}.png")
        job = harness.add(image=image, mask=mask, output=output, **params)
        harness.run(job)
        assert harness.job(job).error_code == code
    assert budget.reserved == [70 * 60, 2000 * 1500, 70 * 60 + 1000]
    harness.close()
