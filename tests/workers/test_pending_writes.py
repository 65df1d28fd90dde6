"""Results whose write failed: how many are kept, on which thread, and for how long."""

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
from workers import job_runner, pending_writes
from workers.pending_writes import PendingWrites

SIZE, BOX = (60, 50), (10, 10, 30, 30)


# --- the buffer ------------------------------------------------------------------------------


@pytest.fixture
def go() -> Iterator[threading.Event]:
    """What the threads of pending writes wait for."""
    go = threading.Event()
    yield go
    go.set()


def test_the_buffer_is_bounded_in_results_and_in_bytes(go: threading.Event) -> None:
    two_results, hundred_bytes = PendingWrites(max_results=2), PendingWrites(max_bytes=100)
    assert [two_results.start(go.wait, size=10) for _ in range(3)] == [True, True, False]
    assert [hundred_bytes.start(go.wait, size=size) for size in (200, 10)] == [True, False]
    go.set()
    assert two_results.join(5)
    assert hundred_bytes.join(5)
    assert [hundred_bytes.start(go.wait, size=size) for size in (60, 40)] == [True, True]


def test_join_returns_false_while_a_write_is_pending(go: threading.Event) -> None:
    pending = PendingWrites()
    assert pending.join(0)
    pending.start(go.wait, size=1)
    assert not pending.join(0)


def test_other_writes_succeed_if_one_did_after_the_median_pending_write_began(
    go: threading.Event,
) -> None:
    pending = PendingWrites()
    pending.note_success()
    assert not pending.other_writes_succeed()
    pending.start(go.wait, size=1)
    assert not pending.other_writes_succeed()
    pending.note_success()
    assert pending.other_writes_succeed()
    pending.start(go.wait, size=1)
    assert not pending.other_writes_succeed()


# --- a job's thread --------------------------------------------------------------------------


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of folders where every write is denied."""
    locked: set[str] = set()
    put_unlocked = Storage.put

    def put(storage: Storage, uri: str, data: bytes, **options: Any) -> str:
        if Path(uri).parent.name in locked:
            raise OutputRefused(f"{uri!r}: Permission denied")
        return put_unlocked(storage, uri, data, **options)

    monkeypatch.setattr(Storage, "put", put)
    monkeypatch.setattr(pending_writes, "MIN_PAUSE_SECONDS", 0.05)
    return locked


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[WorkerHarness]:
    url = f"sqlite:///{tmp_path / 'inpaint.db'}"
    harness = WorkerHarness(url, tmp_path, pending_writes=PendingWrites(max_results=1))
    yield harness
    harness.worker.active_jobs.request_stop()
    assert harness.worker.pending_writes.join(5)
    harness.close()


def add(harness: WorkerHarness, output: str) -> int:
    return harness.add(
        image=harness.write_image("in.png", SIZE),
        mask=harness.write_mask("mask.png", SIZE, BOX),
        output=harness.path(output),
    )


def is_blocked(harness: WorkerHarness, job: int) -> bool:
    row = harness.job(job)
    return (row.state, row.error_code) == ("running", "output_refused")


def test_a_failed_write_is_retried_in_the_background(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.run(job)
    wait_for(lambda: is_blocked(harness, job))
    assert job in harness.worker.active_jobs.claimed_ids()
    locked.clear()
    wait_for(lambda: harness.job(job).state == "succeeded")
    assert Path(harness.path("locked/1.png")).exists()
    wait_for(lambda: not harness.worker.active_jobs.claimed_ids())
    assert len(harness.attempts(job)) == 1


def test_if_the_buffer_is_full_and_other_writes_succeed_the_attempt_fails_at_once(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    states = []
    for output in ("locked/1.png", "open/2.png", "locked/3.png"):
        harness.run(job := add(harness, output))
        states.append((harness.job(job).state, harness.job(job).failures))
    assert states == [("running", 0), ("succeeded", 0), ("pending", 1)]
    assert harness.job(job).error_code == "output_refused"


def test_if_the_buffer_is_full_and_no_write_succeeds_the_job_thread_blocks(
    harness: WorkerHarness, locked: set[str]
) -> None:
    locked.add("locked")
    harness.run(first := add(harness, "locked/1.png"))
    second = add(harness, "locked/2.png")
    thread = threading.Thread(target=harness.run, args=(second,))
    thread.start()
    wait_for(lambda: is_blocked(harness, second))
    assert thread.is_alive()
    locked.clear()
    thread.join(5)
    wait_for(lambda: harness.job(first).state == harness.job(second).state == "succeeded")


def test_an_exclusive_job_blocks_its_thread(harness: WorkerHarness, locked: set[str]) -> None:
    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.dispatch()
    options = {"job": job, "seen_attempt": 0, "exclusive": True}
    thread = threading.Thread(target=job_runner.run_job, args=(harness.worker,), kwargs=options)
    thread.start()
    wait_for(lambda: is_blocked(harness, job))
    assert thread.is_alive()
    assert harness.worker.pending_writes.join(0)
    harness.worker.active_jobs.request_stop()
    thread.join(5)
    assert harness.job(job).state == "pending"


def test_a_cancelled_job_is_not_written_any_more(harness: WorkerHarness, locked: set[str]) -> None:
    from workers import maintenance

    locked.add("locked")
    job = add(harness, "locked/1.png")
    harness.run(job)
    wait_for(lambda: is_blocked(harness, job))
    harness.cancel(job)
    maintenance.renew_leases(harness.worker)
    wait_for(lambda: harness.job(job).state == "cancelled")
