"""Recovery of jobs whose worker, message or lease was lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared import jobs
from shared.errors import OutputRefused
from shared.jobs import Selection
from shared.jobs.queue import Queue, celery_app, queue_name
from tests.job_table import ENGINE, JobTable


@pytest.fixture
def queue(redis_url: str) -> Iterator[Queue]:
    queue = Queue(redis_url)
    yield queue
    queue.close()


def test_only_the_dead_workers_jobs_are_reaped(table: JobTable) -> None:
    lost, other = table.add_one(), table.add_one()
    table.run(lost, worker="dead")
    table.run(other, worker="alive")
    reaped = jobs.reap_worker(table.db, worker="dead", reason="ended with signal 9")
    assert reaped == [jobs.ReapedLease(job=lost, attempt=1, state="pending")]
    assert (table.job(lost).losses, table.state(other)) == (1, "running")
    (attempt,) = table.attempts(lost)
    assert (attempt.outcome, attempt.error_message) == ("lost", "ended with signal 9")


def test_a_job_whose_worker_was_lost_runs_alone_next(table: JobTable) -> None:
    suspect, other = table.add_one(), table.add_one()
    table.run(suspect, lease=-1)
    jobs.reap(table.db)
    alone = {message.job: message.exclusive for message in table.dispatch()}
    assert alone == {suspect: True} | ({other: False} if other in alone else {})


def test_an_orphaned_lease_is_released_without_a_failure(table: JobTable) -> None:
    job = table.add_one()
    table.run(job, worker="w1")
    (lease,) = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    jobs.release_orphan(table.db, lease)
    row = table.job(job)
    assert (row.state, row.failures, row.losses) == ("pending", 0, 0)
    assert [attempt.outcome for attempt in table.attempts(job)] == ["released"]
    jobs.release_orphan(table.db, lease)
    assert table.state(job) == "pending"


def test_an_orphaned_lease_of_a_cancelled_job_ends_cancelled(table: JobTable) -> None:
    job = table.add_one()
    table.run(job, worker="w1")
    (lease,) = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    table.cancel(job)
    jobs.release_orphan(table.db, lease)
    assert table.state(job) == "cancelled"
    assert [attempt.outcome for attempt in table.attempts(job)] == ["cancelled"]


def test_a_running_job_shows_the_reason_it_is_blocked(table: JobTable) -> None:
    job = table.add_one()
    leased = table.run(job)
    jobs.record_blocked_reason(table.db, leased, OutputRefused("'/a.png': No space left on device"))
    row = table.job(job)
    assert (row.state, row.error_code) == ("running", "output_refused")
    jobs.succeed(table.db, leased, jobs.AttemptRecord())
    assert table.job(job).error_code is None


def test_unacknowledged_messages_are_discarded_only_if_their_job_is_final(
    table: JobTable, queue: Queue
) -> None:
    done, running, waiting = table.add(3)
    jobs.dispatch(table.db, queue, ENGINE, bound=10)
    with celery_app(queue.url, [ENGINE]).connection_for_read() as connection:
        consumed = connection.SimpleQueue(queue_name(ENGINE))
        for _ in range(3):
            consumed.get(timeout=5)
        leased = table.acquire(done)
        assert leased is not None
        jobs.succeed(table.db, leased, jobs.AttemptRecord())
        table.acquire(running)
        assert set(queue.unacked_messages(ENGINE).values()) == {
            (done, 0),
            (running, 0),
            (waiting, 0),
        }
        jobs.discard_stale_messages(table.db, queue, ENGINE)
        assert set(queue.unacked_messages(ENGINE).values()) == {(running, 0), (waiting, 0)}
        consumed.close()


def test_concurrent_statements_over_many_rows_do_not_deadlock(table: JobTable) -> None:
    """PostgreSQL ends one of two deadlocked transactions with an error."""
    ids = table.add(200)
    for job in reversed(ids):
        table.run(job, worker="w1", lease=60)
    stop = threading.Event()

    def repeat(action: object) -> None:
        while not stop.is_set():
            action()  # type: ignore[operator]

    actions = [
        lambda: jobs.heartbeat(table.db, worker="w1", lease_seconds=60),
        lambda: jobs.cancel(table.db, Selection(submission=1)),
        lambda: jobs.reap(table.db),
        lambda: jobs.heartbeat(table.db, worker="w1", lease_seconds=-1),
    ]
    with ThreadPoolExecutor(len(actions)) as pool:
        running = [pool.submit(repeat, action) for action in actions]
        stop.wait(1.0)
        stop.set()
        for future in running:
            future.result()
