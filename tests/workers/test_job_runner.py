"""run_job, with real tables, files and images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text, update

from shared import jobs
from shared.db.models import Attempt
from shared.errors import EngineError, OutOfMemory
from shared.jobs import Holder, ownership
from shared.jobs.ownership import write_ownership
from tests.workers.worker_harness import SolidColourEngine, WorkerHarness, pixels
from workers.engines import load_engine
from workers.engines.protocol import RegionWork
from workers.job_runner import run_job

BOX = (100, 120, 160, 150)


@pytest.fixture
def harness(database_url: str, tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(database_url, tmp_path)
    yield harness
    harness.close()


@pytest.fixture
def sqlite_harness(tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'inpaint.db'}", tmp_path)
    yield harness
    harness.close()


def add_simple(harness: WorkerHarness, **changes: object) -> int:
    values = {
        "image": harness.write_image("in.png"),
        "mask": harness.write_mask("mask.png", (700, 600), BOX),
        "output": harness.path("out/result.png"),
        **changes,
    }
    return harness.add(**values)  # type: ignore[arg-type]


def test_a_job_ends_with_its_result_published_and_everything_recorded(
    harness: WorkerHarness,
) -> None:
    job = add_simple(harness)
    harness.run(job)
    row, (attempt,) = harness.job(job), harness.attempts(job)
    result = Path(harness.path("out/result.png")).read_bytes()
    assert (row.state, row.attempt, row.worker, row.lease_expires_at) == (
        "succeeded",
        1,
        None,
        None,
    )
    assert row.result_sha256 == attempt.result_sha256 == sha256(result).hexdigest()
    assert attempt.image_sha256 == sha256(Path(harness.path("in.png")).read_bytes()).hexdigest()
    assert attempt.mask_sha256 == sha256(Path(harness.path("mask.png")).read_bytes()).hexdigest()
    assert (attempt.outcome, attempt.worker, attempt.device) == ("succeeded", "test-1", "cpu")
    assert (attempt.engine, attempt.engine_revision) == ("sd2", "painter 1")
    assert (attempt.width, attempt.height, attempt.regions, attempt.windows) == (700, 600, 1, 1)
    assert attempt.seed == 7
    assert json.loads(attempt.params)["num_inference_steps"] == 50
    stages = ["fetch", "decode", "plan", "inpaint", "composite", "examine", "encode", "put"]
    assert list(json.loads(attempt.timings)) == stages


@pytest.mark.parametrize("mode", ["auto", "full", "tile"])
@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.bmp"])
def test_no_pixel_outside_the_mask_changes(
    sqlite_harness: WorkerHarness, mode: str, name: str
) -> None:
    harness = sqlite_harness
    image = harness.write_image(name)
    job = add_simple(harness, image=image, output=harness.path(f"out/{name}"), mode=mode)
    harness.run(job)
    assert harness.job(job).error_message is None
    before, after = pixels(image), pixels(harness.path(f"out/{name}"))
    inside = np.zeros(before.shape[:2], bool)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    assert np.array_equal(before[~inside], after[~inside])
    assert not np.array_equal(before[inside], after[inside])


def test_an_empty_mask_copies_the_input_and_records_no_window(harness: WorkerHarness) -> None:
    job = add_simple(harness, mask=harness.write_mask("none.png", (700, 600)))
    harness.run(job)
    (attempt,) = harness.attempts(job)
    assert (attempt.outcome, attempt.regions, attempt.windows) == ("succeeded", 0, 0)
    assert (
        Path(harness.path("out/result.png")).read_bytes()
        == Path(harness.path("in.png")).read_bytes()
    )


def test_a_large_photograph_with_a_small_mark_runs_one_window(
    sqlite_harness: WorkerHarness,
) -> None:
    harness = sqlite_harness
    size = (3000, 2000)
    job = add_simple(
        harness,
        image=harness.write_image("big.bmp", size),
        mask=harness.write_mask("big.png", size, (2400, 1700, 2600, 1760)),
        output=harness.path("out/big.bmp"),
    )
    harness.run(job)
    (attempt,) = harness.attempts(job)
    assert (attempt.regions, attempt.windows) == (1, 1)
    assert harness.worker.engine.works[0].image.shape == (512, 512, 3)  # type: ignore[attr-defined]


def test_each_region_has_its_own_seed_and_the_first_has_the_job_s(
    sqlite_harness: WorkerHarness,
) -> None:
    harness = sqlite_harness
    size = (2000, 600)
    job = add_simple(
        harness,
        image=harness.write_image("wide.png", size),
        mask=harness.write_mask("wide-mask.png", size, (10, 10, 40, 40), (1900, 500, 1950, 550)),
        seed=2**63 - 1,
    )
    harness.run(job)
    seeds = [work.seed for work in harness.worker.engine.works]  # type: ignore[attr-defined]
    assert seeds == [2**63 - 1, 0]


def test_alpha_and_boxes_are_masks(sqlite_harness: WorkerHarness) -> None:
    harness = sqlite_harness
    boxed = add_simple(harness, mask="box:100,120,160,150", output=harness.path("boxed.png"))
    harness.run(boxed)
    before, after = pixels(harness.path("in.png")), pixels(harness.path("boxed.png"))
    changed = np.argwhere((before != after).any(axis=-1))
    assert changed.min(axis=0).tolist() == [120, 100]
    assert changed.max(axis=0).tolist() == [149, 159]
    holed = add_simple(
        harness,
        image=harness.write_image("holes.png", mode="RGBA"),
        mask="alpha",
        output=harness.path("filled.png"),
    )
    harness.run(holed)
    assert harness.job(holed).state == "succeeded"
    assert harness.attempts(holed)[0].mask_sha256 is None


def test_the_output_s_name_decides_the_format(sqlite_harness: WorkerHarness) -> None:
    harness = sqlite_harness
    job = add_simple(harness, output=harness.path("out/result.webp"))
    harness.run(job)
    assert Path(harness.path("out/result.webp")).read_bytes()[8:12] == b"WEBP"


def test_a_mask_of_another_size_is_an_error_that_names_both(harness: WorkerHarness) -> None:
    job = add_simple(harness, mask=harness.write_mask("small.png", (70, 60), (1, 1, 5, 5)))
    harness.run(job)
    row = harness.job(job)
    assert (row.state, row.error_code) == ("failed", "mask_size")
    assert "70x60" in row.error_message
    assert "700x600" in row.error_message


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("missing.png", "object_missing"),
        ("html.png", "bad_image"),
        ("empty.png", "bad_image"),
        ("/etc/hostname", "location_refused"),
    ],
)
def test_bad_input_fails_at_once_with_its_code(
    sqlite_harness: WorkerHarness, image: str, code: str
) -> None:
    harness = sqlite_harness
    harness.write("html.png", b"<!DOCTYPE html><html><body>404</body></html>")
    harness.write("empty.png", b"")
    location = image if image.startswith("/") else harness.path(image)
    job = add_simple(harness, image=location)
    harness.run(job)
    row, (attempt,) = harness.job(job), harness.attempts(job)
    assert (row.state, row.error_code, attempt.outcome) == ("failed", code, "failed")
    assert attempt.error_message == row.error_message
    assert not Path(harness.path("out/result.png")).exists()


def test_an_object_over_the_cap_is_refused(tmp_path: Path) -> None:
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'i.db'}", tmp_path, max_object_bytes=2000)
    job = add_simple(harness)
    harness.run(job)
    assert harness.job(job).error_code == "object_too_large"
    harness.close()


def test_a_retryable_error_is_retried_and_then_given_up(harness: WorkerHarness) -> None:
    def fail(_work: RegionWork) -> None:
        raise OutOfMemory("the device is full")

    harness.worker.engine.on_submit = fail  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    assert (harness.job(job).state, harness.job(job).failures) == ("pending", 1)
    harness.run(job)
    row = harness.job(job)
    assert (row.state, row.failures, row.error_code) == ("failed", 2, "out_of_memory")
    assert [attempt.outcome for attempt in harness.attempts(job)] == ["retried", "failed"]


def test_an_unexpected_exception_is_recorded_by_name(
    sqlite_harness: WorkerHarness, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_work: RegionWork) -> None:
        raise ZeroDivisionError("oops")

    harness = sqlite_harness
    harness.worker.engine.on_submit = fail  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    row = harness.job(job)
    assert (row.state, row.error_code) == ("failed", "internal_error")
    assert row.error_message == "ZeroDivisionError: oops"
    assert "Traceback" in caplog.text


def test_a_stale_message_runs_nothing(harness: WorkerHarness) -> None:
    job = add_simple(harness)
    harness.run(job)
    run_job(harness.worker, job=job, seen_attempt=0)
    assert len(harness.attempts(job)) == 1


def test_a_cancelled_job_stops_at_its_next_step(harness: WorkerHarness) -> None:
    from workers import maintenance

    def cancel(_work: RegionWork) -> None:
        harness.cancel(job)
        maintenance.renew_leases(harness.worker)

    harness.worker.engine.on_submit = cancel  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    assert harness.job(job).state == "cancelled"
    assert harness.attempts(job)[0].outcome == "cancelled"
    assert not Path(harness.path("out/result.png")).exists()


def test_a_shutdown_releases_the_job_without_counting_a_failure(harness: WorkerHarness) -> None:
    harness.worker.engine.on_submit = lambda _work: harness.worker.active_jobs.request_stop()  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    row = harness.job(job)
    assert (row.state, row.failures, row.losses) == ("pending", 0, 0)
    assert harness.attempts(job)[0].outcome == "released"


def test_a_worker_that_lost_its_lease_publishes_nothing(harness: WorkerHarness) -> None:
    other = Holder(worker="test-2", device="cpu", engine_revision="painter 1")

    def lose_lease(_work: RegionWork) -> None:
        with harness.db.write() as connection:
            connection.execute(
                text("UPDATE jobs SET lease_expires_at = created_at WHERE state = 'running'")
            )
        jobs.reap(harness.db)
        message = harness.dispatch()[0]
        jobs.acquire(
            harness.db, job=job, seen_attempt=message.attempt, holder=other, lease_seconds=60
        )

    harness.worker.engine.on_submit = lose_lease  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    row = harness.job(job)
    assert (row.state, row.worker, row.attempt) == ("running", "test-2", 2)
    assert not Path(harness.path("out/result.png")).exists()
    assert [attempt.outcome for attempt in harness.attempts(job)] == ["lost", None]


def test_an_output_written_by_an_earlier_attempt_is_replaced(harness: WorkerHarness) -> None:
    """That attempt's worker lost its lease between the put and its record."""
    earlier = b"the result of attempt 1"

    def finish_earlier_attempt(_work: RegionWork) -> None:
        with harness.db.write() as connection:
            announced = {"result_sha256": sha256(earlier).hexdigest()}
            connection.execute(update(Attempt).where(Attempt.attempt == 1).values(announced))
        harness.write("out/result.png", earlier)

    job = add_simple(harness)
    harness.worker.engine.on_submit = lambda _work: harness.worker.active_jobs.request_stop()  # type: ignore[attr-defined]
    harness.run(job)
    harness.worker.active_jobs._stopping = False
    harness.worker.engine.on_submit = finish_earlier_attempt  # type: ignore[attr-defined]
    harness.run(job)
    assert (harness.job(job).state, harness.job(job).failures) == ("succeeded", 0)
    assert published_hash(harness) == harness.job(job).result_sha256


def test_an_output_written_by_something_else_meanwhile_is_replaced_by_the_next_attempt_only(
    harness: WorkerHarness,
) -> None:
    harness.worker.engine.on_submit = lambda _work: harness.write("out/result.png", b"newer")  # type: ignore[attr-defined,assignment,return-value]
    job = add_simple(harness)
    harness.run(job)
    assert (harness.job(job).state, harness.job(job).error_code) == ("pending", "output_conflict")
    assert Path(harness.path("out/result.png")).read_bytes() == b"newer"
    harness.worker.engine.on_submit = SolidColourEngine.on_submit  # type: ignore[attr-defined]
    harness.run(job)
    assert harness.job(job).state == "succeeded"
    assert published_hash(harness) == harness.job(job).result_sha256


def test_a_job_that_was_superseded_publishes_nothing(harness: WorkerHarness) -> None:
    """Even if no heartbeat has told its worker yet, and the winner's result has gone again."""

    def supersede(_work: RegionWork) -> None:
        with write_ownership(harness.db) as connection:
            ownership.supersede(connection, [job], submission=2)

    harness.worker.engine.on_submit = supersede  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    assert (harness.job(job).state, harness.job(job).error_code) == ("cancelled", "output_replaced")
    assert harness.attempts(job)[0].outcome == "cancelled"
    assert not Path(harness.path("out/result.png")).exists()


def published_hash(harness: WorkerHarness) -> str:
    return sha256(Path(harness.path("out/result.png")).read_bytes()).hexdigest()


def test_temporary_files_of_killed_attempts_are_removed(sqlite_harness: WorkerHarness) -> None:
    def leave_temporary_file(_work: RegionWork) -> None:
        harness.write(f"out/.result.png.{job}-1.tmp", b"half an image")
        raise EngineError("killed")

    harness = sqlite_harness
    harness.worker.engine.on_submit = leave_temporary_file  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    assert harness.temporary_files()
    harness.worker.engine.on_submit = SolidColourEngine.on_submit  # type: ignore[attr-defined]
    harness.run(job)
    assert harness.job(job).state == "succeeded"
    assert not harness.temporary_files()


def test_the_result_does_not_depend_on_the_attempt(sqlite_harness: WorkerHarness) -> None:
    harness = sqlite_harness
    hashes = set()
    for name in ("a.png", "b.png"):
        job = add_simple(harness, output=harness.path(name), provenance=False)
        harness.run(job)
        hashes.add(harness.job(job).result_sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_the_opencv_engine_removes_a_mark(tmp_path: Path, method: str) -> None:
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'i.db'}", tmp_path, load_engine("opencv"))
    plain = np.full((300, 400, 3), (60, 120, 180), np.uint8)
    plain[100:110, 50:350] = 255
    Image.fromarray(plain).save(tmp_path / "marked.png")
    job = harness.add(
        image=harness.path("marked.png"),
        mask=harness.write_mask("mark.png", (400, 300), (48, 98, 352, 112)),
        output=harness.path("clean.png"),
        engine="opencv",
        opencv_method=method,
    )
    harness.run(job, engine="opencv")
    assert harness.job(job).state == "succeeded"
    left = np.abs(pixels(harness.path("clean.png")).astype(int) - (60, 120, 180))
    assert left.max() <= 2
    harness.close()


def test_an_image_keeps_its_own_format_whatever_its_name_is(
    sqlite_harness: WorkerHarness,
) -> None:
    harness = sqlite_harness
    image = harness.write("named.jpg", Path(harness.write_image("in.png")).read_bytes())
    job = add_simple(harness, image=image, output=harness.path("out/named.jpg"))
    harness.run(job)
    assert Path(harness.path("out/named.jpg")).read_bytes()[1:4] == b"PNG"


def test_a_bad_mask_is_not_reported_as_a_bad_image(sqlite_harness: WorkerHarness) -> None:
    harness = sqlite_harness
    job = add_simple(harness, mask=harness.write("mask.html", b"<html>"))
    harness.run(job)
    row = harness.job(job)
    assert row.error_code == "bad_mask"
    assert row.error_message.startswith("the mask: ")


def test_the_memory_modes_in_use_are_recorded(harness: WorkerHarness) -> None:
    def report_memory_mode(work: RegionWork) -> None:
        work.report.memory = "batch 1, attention_slicing"

    harness.worker.engine.on_submit = report_memory_mode  # type: ignore[attr-defined]
    job = add_simple(harness)
    harness.run(job)
    assert harness.attempts(job)[0].memory_mode == "batch 1, attention_slicing"
