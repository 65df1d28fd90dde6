"""Results that wait for their outputs: how many, on which thread, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import OutputRefused
from shared.storage import Storage
from tests.workers.fleet import wait_for
from tests.workers.worker_harness import WorkerHarness
from workers import job_runner
from workers.pending_writes import PendingWrites

SIZE, BOX = (60, 50), (10, 10, 30, 30)


# --- room ------------------------------------------------------------------------------------


@pytest.fixture
def go() -> Iterator[threading.Event]:
    go = threading.Event()
    yield go
    go.set()


def test_so_many_wait_and_so_many_bytes(go: threading.Event) -> None:
    few, small = PendingWrites(most=2), PendingWrites(most_bytes=100)
    assert [few.begin(go.wait, size=10) for _ in range(3)] == [True, True, False]
    assert [small.begin(go.wait, size=size) for size in (200, 10)] == [True, False]
    go.set()
    assert few.join(5)
    assert small.join(5)
    assert [small.begin(go.wait, size=size) for size in (60, 40)] == [True, True]


def test_it_says_whether_something_waits_still(go: threading.Event) -> None:
    waiting = PendingWrites()
    assert waiting.join(0)
    waiting.begin(go.wait, size=1)
    assert not waiting.join(0)


def test_others_are_written_if_that_was_after_half_of_those_that_wait_began(
    go: threading.Event,
) -> None:
    waiting = PendingWrites()
    waiting.note_written()
    assert not waiting.others_are_written()
    waiting.begin(go.wait, size=1)
    assert not waiting.others_are_written()
    waiting.note_written()
    assert waiting.others_are_written()
    waiting.begin(go.wait, size=1)
    assert not waiting.others_are_written()


# --- a job's thread --------------------------------------------------------------------------


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of folders that nobody may write to."""
    locked: set[str] = set()
    take = Storage.put

    def put(storage: Storage, uri: str, data: bytes, **how: Any) -> str:
        if Path(uri).parent.name in locked:
            raise OutputRefused(f"{uri!r}: Permission denied")
        return take(storage, uri, data, **how)

    monkeypatch.setattr(Storage, "put", put)
    monkeypatch.setattr(job_runner, "REFUSED_PAUSE_SECONDS", 0.05)
    return locked


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(
        f"sqlite:///{tmp_path / 'inpaint.db'}", tmp_path, waiting=PendingWrites(most=1)
    )
    yield harness
    harness.worker.running.release_all()
    assert harness.worker.waiting.join(5)
    harness.close()


def add(harness: WorkerHarness, output: str) -> int:
    return harness.add(
        image=harness.write_image("in.png", SIZE),
        mask=harness.write_mask("mask.png", SIZE, BOX),
        output=harness.path(output),
    )


def paused(harness: WorkerHarness, job: int) -> bool:
    row = harness.job(job)
    return (row.state, row.error_code) == ("running", "output_refused")


def test_a_job_leaves_its_thread_while_its_result_waits(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.run(job)
    wait_for(lambda: paused(harness, job))
    assert job in harness.worker.running.taken()
    locked.clear()
    wait_for(lambda: harness.job(job).state == "succeeded")
    assert Path(harness.path("locked/1.png")).exists()
    wait_for(lambda: not harness.worker.running.taken())
    assert len(harness.attempts(job)) == 1


def test_where_many_wait_and_others_are_written_the_next_is_tried_again_later(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    found = []
    for output in ("locked/1.png", "open/2.png", "locked/3.png"):
        harness.run(job := add(harness, output))
        found.append((harness.job(job).state, harness.job(job).failures))
    assert found == [("running", 0), ("succeeded", 0), ("pending", 1)]
    assert harness.job(job).error_code == "output_refused"


def test_where_nothing_is_written_the_next_keeps_its_thread(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    harness.run(waits := add(harness, "locked/1.png"))
    next_one = add(harness, "locked/2.png")
    thread = threading.Thread(target=harness.run, args=(next_one,))
    thread.start()
    wait_for(lambda: paused(harness, next_one))
    assert thread.is_alive()
    locked.clear()
    thread.join(5)
    wait_for(lambda: harness.job(waits).state == harness.job(next_one).state == "succeeded")


def test_a_job_that_runs_alone_keeps_its_thread(harness: WorkerHarness, locked: set[str]) -> None:
    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.dispatch()
    alone = {"job": job, "seen_attempt": 0, "alone": True}
    thread = threading.Thread(target=job_runner.run_job, args=(harness.worker,), kwargs=alone)
    thread.start()
    wait_for(lambda: paused(harness, job))
    assert thread.is_alive()
    assert harness.worker.waiting.join(0)
    harness.worker.running.release_all()
    thread.join(5)
    assert harness.job(job).state == "pending"


def test_a_cancelled_job_stops_waiting(harness: WorkerHarness, locked: set[str]) -> None:
    from workers import maintenance

    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.run(job)
    wait_for(lambda: paused(harness, job))
    harness.cancel(job)
    maintenance.beat(harness.worker)
    wait_for(lambda: harness.job(job).state == "cancelled")
