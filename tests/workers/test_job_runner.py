"""run_job, with real tables, files and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text

from shared import jobs
from shared.errors import EngineError, OutOfMemory
from shared.jobs import Holder
from tests.workers.bench import Painter, Workbench, pixels
from workers.engines import load_engine
from workers.engines.protocol import RegionWork
from workers.job_runner import run_job

BOX = (100, 120, 160, 150)


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(database_url, tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def sqlite_bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(f"sqlite:///{tmp_path / 'inpaint.db'}", tmp_path)
    yield bench
    bench.close()


def add_simple(bench: Workbench, **changes: object) -> int:
    given = {
        "image": bench.picture("in.png"),
        "mask": bench.mask("mask.png", (700, 600), BOX),
        "output": bench.path("out/result.png"),
        **changes,
    }
    return bench.add(**given)  # type: ignore[arg-type]


def test_a_job_ends_with_its_result_published_and_everything_recorded(bench: Workbench) -> None:
    job = add_simple(bench)
    bench.run(job)
    row, (attempt,) = bench.job(job), bench.attempts(job)
    result = Path(bench.path("out/result.png")).read_bytes()
    assert (row.state, row.attempt, row.worker, row.lease_expires_at) == (
        "succeeded",
        1,
        None,
        None,
    )
    assert row.result_sha256 == attempt.result_sha256 == sha256(result).hexdigest()
    assert attempt.image_sha256 == sha256(Path(bench.path("in.png")).read_bytes()).hexdigest()
    assert attempt.mask_sha256 == sha256(Path(bench.path("mask.png")).read_bytes()).hexdigest()
    assert (attempt.outcome, attempt.worker, attempt.device) == ("succeeded", "test-1", "cpu")
    assert (attempt.engine, attempt.engine_revision) == ("sd2", "painter 1")
    assert (attempt.width, attempt.height, attempt.regions, attempt.windows) == (700, 600, 1, 1)
    assert attempt.seed == 7
    assert json.loads(attempt.params)["num_inference_steps"] == 50
    stages = ["fetch", "decode", "plan", "inpaint", "composite", "examine", "encode", "put"]
    assert list(json.loads(attempt.timings)) == stages


@pytest.mark.parametrize("mode", ["auto", "full", "tile"])
@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.bmp"])
def test_no_pixel_outside_the_mask_changes(sqlite_bench: Workbench, mode: str, name: str) -> None:
    bench = sqlite_bench
    image = bench.picture(name)
    job = add_simple(bench, image=image, output=bench.path(f"out/{name}"), mode=mode)
    bench.run(job)
    assert bench.job(job).error_message is None
    before, after = pixels(image), pixels(bench.path(f"out/{name}"))
    inside = np.zeros(before.shape[:2], bool)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    assert np.array_equal(before[~inside], after[~inside])
    assert not np.array_equal(before[inside], after[inside])


def test_an_empty_mask_copies_the_input_and_says_that_nothing_ran(bench: Workbench) -> None:
    job = add_simple(bench, mask=bench.mask("none.png", (700, 600)))
    bench.run(job)
    (attempt,) = bench.attempts(job)
    assert (attempt.outcome, attempt.regions, attempt.windows) == ("succeeded", 0, 0)
    assert (
        Path(bench.path("out/result.png")).read_bytes() == Path(bench.path("in.png")).read_bytes()
    )


def test_a_large_photograph_with_a_small_mark_runs_one_window(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    size = (3000, 2000)
    job = add_simple(
        bench,
        image=bench.picture("big.bmp", size),
        mask=bench.mask("big.png", size, (2400, 1700, 2600, 1760)),
        output=bench.path("out/big.bmp"),
    )
    bench.run(job)
    (attempt,) = bench.attempts(job)
    assert (attempt.regions, attempt.windows) == (1, 1)
    assert bench.bench.engine.works[0].image.shape == (512, 512, 3)  # type: ignore[attr-defined]


def test_each_region_has_a_seed_of_its_own_and_the_first_has_the_job_s(
    sqlite_bench: Workbench,
) -> None:
    bench = sqlite_bench
    size = (2000, 600)
    job = add_simple(
        bench,
        image=bench.picture("wide.png", size),
        mask=bench.mask("wide-mask.png", size, (10, 10, 40, 40), (1900, 500, 1950, 550)),
        seed=2**63 - 1,
    )
    bench.run(job)
    seeds = [work.seed for work in bench.bench.engine.works]  # type: ignore[attr-defined]
    assert seeds == [2**63 - 1, 0]


def test_alpha_and_boxes_are_masks_too(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    boxed = add_simple(bench, mask="box:100,120,160,150", output=bench.path("boxed.png"))
    bench.run(boxed)
    before, after = pixels(bench.path("in.png")), pixels(bench.path("boxed.png"))
    changed = np.argwhere((before != after).any(axis=-1))
    assert changed.min(axis=0).tolist() == [120, 100]
    assert changed.max(axis=0).tolist() == [149, 159]
    holed = add_simple(
        bench,
        image=bench.picture("holes.png", mode="RGBA"),
        mask="alpha",
        output=bench.path("filled.png"),
    )
    bench.run(holed)
    assert bench.job(holed).state == "succeeded"
    assert bench.attempts(holed)[0].mask_sha256 is None


def test_the_output_s_name_decides_the_format(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    job = add_simple(bench, output=bench.path("out/result.webp"))
    bench.run(job)
    assert Path(bench.path("out/result.webp")).read_bytes()[8:12] == b"WEBP"


def test_a_mask_of_another_size_is_an_error_that_names_both(bench: Workbench) -> None:
    job = add_simple(bench, mask=bench.mask("small.png", (70, 60), (1, 1, 5, 5)))
    bench.run(job)
    row = bench.job(job)
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
    sqlite_bench: Workbench, image: str, code: str
) -> None:
    bench = sqlite_bench
    bench.write("html.png", b"<!DOCTYPE html><html><body>404</body></html>")
    bench.write("empty.png", b"")
    location = image if image.startswith("/") else bench.path(image)
    job = add_simple(bench, image=location)
    bench.run(job)
    row, (attempt,) = bench.job(job), bench.attempts(job)
    assert (row.state, row.error_code, attempt.outcome) == ("failed", code, "failed")
    assert attempt.error_message == row.error_message
    assert not Path(bench.path("out/result.png")).exists()


def test_an_object_over_the_cap_is_refused(tmp_path: Path) -> None:
    bench = Workbench(f"sqlite:///{tmp_path / 'i.db'}", tmp_path, max_object_bytes=2000)
    job = add_simple(bench)
    bench.run(job)
    assert bench.job(job).error_code == "object_too_large"
    bench.close()


def test_what_may_pass_is_retried_and_then_given_up(bench: Workbench) -> None:
    def broken(_work: RegionWork) -> None:
        raise OutOfMemory("the device is full")

    bench.bench.engine.meanwhile = broken  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    assert (bench.job(job).state, bench.job(job).failures) == ("pending", 1)
    bench.run(job)
    row = bench.job(job)
    assert (row.state, row.failures, row.error_code) == ("failed", 2, "out_of_memory")
    assert [attempt.outcome for attempt in bench.attempts(job)] == ["retried", "failed"]


def test_an_error_of_ours_that_nobody_foresaw_is_recorded_by_name(
    sqlite_bench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_work: RegionWork) -> None:
        raise ZeroDivisionError("oops")

    bench = sqlite_bench
    bench.bench.engine.meanwhile = broken  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    row = bench.job(job)
    assert (row.state, row.error_code) == ("failed", "internal_error")
    assert row.error_message == "ZeroDivisionError: oops"
    assert "Traceback" in caplog.text


def test_a_stale_message_runs_nothing(bench: Workbench) -> None:
    job = add_simple(bench)
    bench.run(job)
    run_job(bench.bench, job=job, seen_attempt=0)
    assert len(bench.attempts(job)) == 1


def test_a_cancelled_job_stops_at_its_next_step(bench: Workbench) -> None:
    from workers import maintenance

    def cancel(_work: RegionWork) -> None:
        bench.cancel(job)
        maintenance.beat(bench.bench)

    bench.bench.engine.meanwhile = cancel  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    assert bench.job(job).state == "cancelled"
    assert bench.attempts(job)[0].outcome == "cancelled"
    assert not Path(bench.path("out/result.png")).exists()


def test_a_shutdown_gives_the_job_back_without_counting_a_failure(bench: Workbench) -> None:
    bench.bench.engine.meanwhile = lambda _work: bench.bench.running.release_all()  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    row = bench.job(job)
    assert (row.state, row.failures, row.losses) == ("pending", 0, 0)
    assert bench.attempts(job)[0].outcome == "released"


def test_a_worker_that_lost_its_lease_publishes_nothing(bench: Workbench) -> None:
    other = Holder(worker="test-2", device="cpu", engine_revision="painter 1")

    def lose(_work: RegionWork) -> None:
        with bench.db.write() as connection:
            connection.execute(
                text("UPDATE jobs SET lease_expires_at = created_at WHERE state = 'running'")
            )
        jobs.reap(bench.db)
        message = bench.queue()[0]
        jobs.acquire(
            bench.db, job=job, seen_attempt=message.attempt, holder=other, lease_seconds=60
        )

    bench.bench.engine.meanwhile = lose  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    row = bench.job(job)
    assert (row.state, row.worker, row.attempt) == ("running", "test-2", 2)
    assert not Path(bench.path("out/result.png")).exists()
    assert [attempt.outcome for attempt in bench.attempts(job)] == ["lost", None]


def test_what_a_worker_without_lease_wrote_meanwhile_is_replaced(bench: Workbench) -> None:
    bench.bench.engine.meanwhile = lambda _work: bench.write("out/result.png", b"stale")  # type: ignore[attr-defined,assignment,return-value]
    job = add_simple(bench)
    bench.run(job)
    assert bench.job(job).state == "succeeded"
    assert Path(bench.path("out/result.png")).read_bytes() != b"stale"


def test_temporary_files_of_killed_attempts_are_removed(sqlite_bench: Workbench) -> None:
    def killed(_work: RegionWork) -> None:
        bench.write(f"out/.result.png.{job}-1.tmp", b"half a picture")
        raise EngineError("killed")

    bench = sqlite_bench
    bench.bench.engine.meanwhile = killed  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    assert bench.temporaries()
    bench.bench.engine.meanwhile = Painter.meanwhile  # type: ignore[attr-defined]
    bench.run(job)
    assert bench.job(job).state == "succeeded"
    assert not bench.temporaries()


def test_the_result_is_the_same_whoever_runs_it(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    hashes = set()
    for name in ("a.png", "b.png"):
        job = add_simple(bench, output=bench.path(name), provenance=False)
        bench.run(job)
        hashes.add(bench.job(job).result_sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_the_opencv_engine_removes_a_mark(tmp_path: Path, method: str) -> None:
    bench = Workbench(f"sqlite:///{tmp_path / 'i.db'}", tmp_path, load_engine("opencv"))
    plain = np.full((300, 400, 3), (60, 120, 180), np.uint8)
    plain[100:110, 50:350] = 255
    Image.fromarray(plain).save(tmp_path / "marked.png")
    job = bench.add(
        image=bench.path("marked.png"),
        mask=bench.mask("mark.png", (400, 300), (48, 98, 352, 112)),
        output=bench.path("clean.png"),
        engine="opencv",
        opencv_method=method,
    )
    bench.run(job, engine="opencv")
    assert bench.job(job).state == "succeeded"
    left = np.abs(pixels(bench.path("clean.png")).astype(int) - (60, 120, 180))
    assert left.max() <= 2
    bench.close()


def test_a_picture_keeps_its_own_format_whatever_its_name_says(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    image = bench.write("named.jpg", Path(bench.picture("in.png")).read_bytes())
    job = add_simple(bench, image=image, output=bench.path("out/named.jpg"))
    bench.run(job)
    assert Path(bench.path("out/named.jpg")).read_bytes()[1:4] == b"PNG"


def test_a_bad_mask_is_not_reported_as_a_bad_picture(sqlite_bench: Workbench) -> None:
    bench = sqlite_bench
    job = add_simple(bench, mask=bench.write("mask.html", b"<html>"))
    bench.run(job)
    row = bench.job(job)
    assert row.error_code == "bad_mask"
    assert row.error_message.startswith("the mask: ")


def test_what_it_took_to_fit_the_device_is_recorded(bench: Workbench) -> None:
    def squeeze(work: RegionWork) -> None:
        work.report.memory = "batch 1, attention_slicing"

    bench.bench.engine.meanwhile = squeeze  # type: ignore[attr-defined]
    job = add_simple(bench)
    bench.run(job)
    assert bench.attempts(job)[0].memory_mode == "batch 1, attention_slicing"
