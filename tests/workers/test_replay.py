"""Replaying a finished job from its record, with the real OpenCV engine in its own process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from producer.cli.jobs import jobs_command
from producer.replay import ReplayResult, replay
from shared import jobs
from shared.errors import InpaintError
from shared.jobs import Selection
from tests.workers.worker_harness import WorkerHarness
from workers.engines import load_engine


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerHarness]:
    url = f"sqlite:///{tmp_path / 'inpaint.db'}"
    monkeypatch.setenv("INPAINT_DATABASE_URL", url)
    engine = load_engine("opencv", device="cpu")
    harness = WorkerHarness(url, tmp_path, engine, database_url=url, roots=(tmp_path,))
    yield harness
    harness.close()


@pytest.fixture
def finished(harness: WorkerHarness) -> int:
    size = (200, 160)
    job = harness.add(
        image=harness.write_image("in.jpg", size),
        mask=harness.write_mask("mask.png", size, (50, 50, 90, 80)),
        output=harness.path("out.jpg"),
        engine="opencv",
    )
    harness.run(job, engine="opencv")
    assert harness.job(job).state == "succeeded"
    return job


def replayed(harness: WorkerHarness, job: int) -> ReplayResult:
    return replay(harness.worker.settings, job, device="cpu", roots=[harness.folder])


def test_the_same_inputs_give_the_same_result_and_change_no_record_or_output(
    harness: WorkerHarness, finished: int
) -> None:
    before = harness.job(finished), harness.attempts(finished)
    Path(harness.path("out.jpg")).unlink()
    result = replayed(harness, finished)
    assert result.same is True
    assert result.largest_difference == 0
    assert result.result_sha256 == before[0].result_sha256
    assert (harness.job(finished), harness.attempts(finished)) == before
    assert not Path(harness.path("out.jpg")).exists()


def test_a_changed_input_is_named(harness: WorkerHarness, finished: int) -> None:
    harness.write_image("in.jpg", (200, 160), seed=1)
    result = replayed(harness, finished)
    assert result.same is False
    assert result.differs == ["image"]
    assert (result.largest_difference or 0) > 0


def test_a_replay_uses_the_attempt_s_parameters_and_not_those_changed_since(
    harness: WorkerHarness, finished: int
) -> None:
    jobs.retry(harness.db, Selection(jobs=(finished,)), changes={"opencv_radius": 9})
    assert replayed(harness, finished).same is True


def test_a_job_without_a_result_cannot_be_replayed(harness: WorkerHarness) -> None:
    with pytest.raises(InpaintError, match="job 77 does not exist"):
        replayed(harness, 77)


def test_a_job_that_never_succeeded_cannot_be_replayed(harness: WorkerHarness) -> None:
    job = harness.add(image=harness.path("no.png"), mask="alpha", output=harness.path("o.png"))
    harness.run(job)
    with pytest.raises(InpaintError, match=f"job {job} has no result to compare with"):
        replayed(harness, job)


def test_a_missing_input_is_an_error(harness: WorkerHarness, finished: int) -> None:
    Path(harness.path("mask.png")).unlink()
    with pytest.raises(InpaintError, match=r"mask\.png' does not exist"):
        replayed(harness, finished)


def test_without_the_recorded_output_no_difference_is_measured(
    harness: WorkerHarness, finished: int
) -> None:
    harness.write_image("in.jpg", (200, 160), seed=1)
    Path(harness.path("out.jpg")).unlink()
    assert replayed(harness, finished).largest_difference is None


def test_the_command_prints_whether_the_result_is_the_same_and_exits_1_if_not(
    harness: WorkerHarness, finished: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(harness.folder)
    runner = CliRunner()
    result = runner.invoke(jobs_command, ["replay", str(finished)])
    assert (result.exit_code, result.stdout) == (0, f"job {finished}: the same result\n")
    harness.write_image("in.jpg", (200, 160), seed=1)
    result = runner.invoke(jobs_command, ["replay", str(finished)])
    assert result.exit_code == 1
    assert re.fullmatch(
        rf"job {finished}: another result, by at most \d+ of 255 levels \(changed: image\)\n",
        result.stdout,
    )
    result = runner.invoke(jobs_command, ["replay", "99"])
    assert result.exit_code == 2
    assert result.stderr.startswith("inpaint-jobs: job 99 does not exist")
