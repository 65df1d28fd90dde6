"""Every transition of the job state machine, and those that must not happen, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
import redis
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from shared import jobs
from shared.db import Database, clock
from shared.db.models import Attempt
from shared.errors import (
    BrokerUnavailable,
    ImageError,
    InpaintError,
    InputError,
    LeaseLost,
    OutOfMemory,
    ParameterError,
    StorageUnavailable,
)
from shared.jobs import AttemptRecord, LeasedJob, Selection, dispatcher, submissions
from shared.jobs.queue import Message, Queue
from shared.params import Params
from tests.job_table import ENGINE, RETRY_AT_ONCE, RETRY_LATER, JobTable, RecordingQueue, new_job

RETRYABLE = OutOfMemory("the device is full")
NOT_RETRYABLE = ImageError("not an image")

# Every write of a worker; each is conditional on the fencing token.
ENDS: dict[str, Callable[[Database, LeasedJob], Any]] = {
    "succeed": lambda db, job: jobs.succeed(db, job, AttemptRecord()),
    "fail": lambda db, job: jobs.fail(db, job, AttemptRecord(), NOT_RETRYABLE, RETRY_AT_ONCE),
    "retry": lambda db, job: jobs.fail(db, job, AttemptRecord(), RETRYABLE, RETRY_AT_ONCE),
    "release": lambda db, job: jobs.release(db, job, AttemptRecord()),
    "cancel": lambda db, job: jobs.finish_cancelled(db, job, AttemptRecord()),
    "renew": lambda db, job: jobs.renew_lease(db, job, lease_seconds=60),
}


def seconds_until(moment: datetime) -> float:
    return (moment - datetime.now(UTC)).total_seconds()


# --- pending -> queued --------------------------------------------------------------------


def test_a_new_row_is_pending_and_due_at_once(table: JobTable) -> None:
    job = table.job(table.add_one())
    assert (job.state, job.attempt, job.failures, job.losses) == ("pending", 0, 0, 0)
    assert -5 < seconds_until(job.run_after) <= 0.1
    assert job.finished_at is job.lease_expires_at is job.worker is None


def test_dispatch_queues_a_due_job_and_puts_its_attempt_into_the_message(table: JobTable) -> None:
    job = table.add_one(priority=3)
    assert table.dispatch() == [Message(job=job, attempt=0, engine=ENGINE, priority=3)]
    assert table.state(job) == "queued"
    assert table.dispatch() == []


def test_dispatch_skips_jobs_that_are_not_due_or_for_another_engine(
    table: JobTable,
) -> None:
    waiting, foreign = table.add_one(), table.add_one(engine="sd2")
    jobs.fail(table.db, table.run(waiting), AttemptRecord(), RETRYABLE, RETRY_LATER)
    assert table.dispatch() == []
    assert (table.state(waiting), table.state(foreign)) == ("pending", "pending")


def test_dispatch_orders_by_priority_then_by_age(table: JobTable) -> None:
    low, first, high, second, higher = (
        table.add_one(priority=priority) for priority in (-5, 0, 7, 0, 8)
    )
    assert [message.job for message in table.dispatch()] == [higher, high, first, second, low]


def test_the_bound_applies_to_each_priority_class(table: JobTable) -> None:
    urgent, normal, low = (table.add(4, priority=priority) for priority in (9, 0, -9))
    assert [m.job for m in table.dispatch(bound=3)] == [*urgent[:3], *normal[:3], *low[:3]]
    assert table.dispatch(bound=3) == []


def test_an_acquired_job_makes_room_for_one_more_message(table: JobTable) -> None:
    ids = table.add(4)
    table.dispatch(bound=2)
    assert table.acquire(ids[0])
    assert [message.job for message in table.dispatch(bound=2)] == [ids[2]]


def test_an_urgent_job_is_dispatched_although_the_normal_class_is_full(table: JobTable) -> None:
    table.add(5)
    table.dispatch(bound=2)
    urgent = table.add_one(priority=1)
    assert [message.job for message in table.dispatch(bound=2)] == [urgent]


def test_jobs_stay_queued_when_the_broker_does_not_answer(table: JobTable) -> None:
    class Down:
        def publish(self, messages: object) -> None:
            raise BrokerUnavailable("nobody answers")

    job = table.add_one()
    with pytest.raises(BrokerUnavailable):
        jobs.dispatch(table.db, Down(), ENGINE, bound=10)  # type: ignore[arg-type]
    assert table.state(job) == "queued"


def test_two_dispatchers_at_once_do_not_overfill_the_queue(table: JobTable, redis_url: str) -> None:
    table.add(60)
    barrier = Barrier(4)

    def top_up(_: int) -> int:
        queue = Queue(redis_url)
        barrier.wait()
        try:
            return sum(jobs.dispatch(table.db, queue, ENGINE, bound=10) for _ in range(5))
        finally:
            queue.close()

    with ThreadPoolExecutor(4) as pool:
        sent = sum(pool.map(top_up, range(4)))
    queue = Queue(redis_url)
    assert sent == queue.length(ENGINE) == len(queue.ready_messages(ENGINE)) == 10
    assert table.states().count("queued") == 10
    queue.close()


# --- lost messages --------------------------------------------------------------------------


def test_redeliver_publishes_only_the_messages_that_redis_lost(
    table: JobTable, redis_url: str
) -> None:
    queue = Queue(redis_url)
    ids = table.add(5)
    jobs.dispatch(table.db, queue, ENGINE, bound=10)
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 0
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert table.acquire(ids[0])
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 4
    assert queue.ready_messages(ENGINE) == {(job, 0) for job in ids[1:]}
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 0
    queue.close()


def test_redeliver_skips_jobs_within_the_grace_period(table: JobTable, redis_url: str) -> None:
    queue = Queue(redis_url)
    table.add_one()
    table.dispatch()
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=30) == 0
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 1
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=30) == 0
    queue.close()


def test_a_job_acquired_while_redeliver_runs_is_not_published_again(table: JobTable) -> None:
    job = table.add_one()
    table.dispatch()

    class AcquiredMeanwhile(RecordingQueue):
        def ready_messages(self, _engine: str) -> set[tuple[int, int]]:
            assert table.acquire(job)
            return set()

    queue = AcquiredMeanwhile()
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 0  # type: ignore[arg-type]
    assert queue.messages == []
    assert table.state(job) == "running"


def test_redeliver_splits_more_ids_than_one_statement_can_hold(
    table: JobTable, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatcher._IDS_PER_STATEMENT < 32_766, "SQLite's limit, the lower one"
    monkeypatch.setattr(dispatcher, "_IDS_PER_STATEMENT", 2)
    queue = Queue(redis_url)
    ids = table.add(5)
    table.dispatch()
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 5
    assert queue.ready_messages(ENGINE) == {(job, 0) for job in ids}
    queue.close()


# --- queued -> running ----------------------------------------------------------------------


def test_acquire_leases_the_job_and_opens_its_attempt(table: JobTable) -> None:
    params = Params(prompt="a cup", num_inference_steps=20, seed=7)
    job = table.add_one(params=params)
    leased = table.run(job)
    assert leased == LeasedJob(
        id=job,
        attempt=1,
        engine=ENGINE,
        image=table.job(job).image,
        mask=table.job(job).mask,
        output=table.job(job).output,
        params=params,
        priority=0,
        failures=0,
    )
    row, (attempt,) = table.job(job), table.attempts(job)
    assert (row.state, row.worker, row.attempt) == ("running", "w1", 1)
    assert 55 < seconds_until(row.lease_expires_at) <= 60.1
    assert (attempt.attempt, attempt.worker, attempt.device) == (1, "w1", "cpu")
    assert (attempt.params, attempt.seed) == (params.to_json(), 7)
    assert (attempt.engine_revision, attempt.outcome, attempt.finished_at) == ("r1", None, None)


def test_a_duplicate_message_does_not_run_the_job_twice(table: JobTable) -> None:
    job = table.add_one()
    table.dispatch()
    assert table.acquire(job, seen=0)
    assert table.acquire(job, seen=0) is None
    assert table.acquire(job, seen=1) is None
    assert len(table.attempts(job)) == 1


def test_a_message_from_an_earlier_attempt_is_stale(table: JobTable) -> None:
    job = table.add_one()
    jobs.release(table.db, table.run(job), AttemptRecord())
    table.dispatch()
    assert table.acquire(job, seen=0) is None
    assert table.acquire(job, seen=1)


@pytest.mark.parametrize("state", ["pending", "succeeded", "cancelled"])
def test_a_message_for_a_job_that_is_not_queued_is_stale(table: JobTable, state: str) -> None:
    job = table.add_one()
    if state == "succeeded":
        table.succeed(job)
    if state == "cancelled":
        table.dispatch()
        table.cancel(job)
    assert table.acquire(job, seen=table.job(job).attempt) is None
    assert table.state(job) == state


def test_a_message_for_a_job_that_does_not_exist_is_stale(table: JobTable) -> None:
    assert table.acquire(12345) is None


def test_of_many_workers_exactly_one_acquires_a_job(table: JobTable) -> None:
    ids, workers = table.add(5), 6
    table.dispatch()
    barrier = Barrier(workers)

    def acquire_all(number: int) -> list[int]:
        barrier.wait()
        return [job for job in ids if table.acquire(job, worker=f"w{number}")]

    with ThreadPoolExecutor(workers) as pool:
        acquired = [job for part in pool.map(acquire_all, range(workers)) for job in part]
    assert sorted(acquired) == ids
    assert [len(table.attempts(job)) for job in ids] == [1] * 5


# --- running -> running ---------------------------------------------------------------------


def test_a_heartbeat_renews_all_of_one_workers_leases(table: JobTable) -> None:
    mine, also_mine, other = table.add(3)
    table.run(mine, lease=5)
    table.run(also_mine, lease=5)
    table.run(other, worker="w2", lease=5)
    renewed = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert {(lease.job, lease.attempt, lease.cancel_requested) for lease in renewed} == {
        (mine, 1, False),
        (also_mine, 1, False),
    }
    assert seconds_until(table.job(mine).lease_expires_at) > 50
    assert seconds_until(table.job(other).lease_expires_at) < 6


def test_a_heartbeat_reports_a_cancellation_and_omits_lost_leases(table: JobTable) -> None:
    cancelled, lost = table.add(2)
    table.run(cancelled)
    table.run(lost, lease=-1)
    table.cancel(cancelled)
    jobs.reap(table.db)
    (renewed,) = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert (renewed.job, renewed.cancel_requested) == (cancelled, True)


def test_renew_lease_renews_one_lease(table: JobTable) -> None:
    leased = table.run(table.add_one(), lease=5)
    jobs.renew_lease(table.db, leased, lease_seconds=60)
    assert seconds_until(table.job(leased.id).lease_expires_at) > 50


# --- running -> succeeded, failed, pending --------------------------------------------------


def test_success_is_recorded_with_the_job_and_its_attempt(table: JobTable) -> None:
    leased = table.run(table.add_one())
    record = AttemptRecord(
        image_sha256="1" * 64,
        mask_sha256="2" * 64,
        result_sha256="3" * 64,
        image_version="v1",
        mask_version="v2",
        width=640,
        height=480,
        regions=1,
        windows=2,
        timings={"fetch": 0.25, "inpaint": 1.0000004},
    )
    jobs.succeed(table.db, leased, record)
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert (row.state, row.worker, row.lease_expires_at) == ("succeeded", None, None)
    assert (row.image_version, row.mask_version, row.result_sha256) == ("v1", "v2", "3" * 64)
    assert -5 < seconds_until(row.finished_at) <= 0.1
    assert (attempt.outcome, attempt.error_code) == ("succeeded", None)
    assert attempt.finished_at >= attempt.started_at
    assert (attempt.image_sha256, attempt.mask_sha256) == ("1" * 64, "2" * 64)
    assert (attempt.width, attempt.height, attempt.regions, attempt.windows) == (640, 480, 1, 2)
    assert attempt.timings == '{"fetch": 0.25, "inpaint": 1.0}'


def test_an_error_that_is_not_retryable_fails_the_job(table: JobTable) -> None:
    leased = table.run(table.add_one())
    assert jobs.fail(table.db, leased, AttemptRecord(), NOT_RETRYABLE, RETRY_LATER) is None
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert (row.state, row.failures) == ("failed", 1)
    assert (row.error_code, row.error_message) == ("bad_image", "not an image")
    assert (attempt.outcome, attempt.error_code) == ("failed", "bad_image")


def test_a_retryable_error_waits_longer_each_time(table: JobTable) -> None:
    job = table.add_one()
    for failures, expected in ((1, 30), (2, 60), (3, 120), (4, 240)):
        wait = jobs.fail(table.db, table.run(job), AttemptRecord(), RETRYABLE, RETRY_LATER)
        row = table.job(job)
        assert wait == expected
        assert expected - 5 < seconds_until(row.run_after) <= expected + 0.1
        assert (row.state, row.failures, row.error_code) == ("pending", failures, "out_of_memory")
        assert table.attempts(job)[-1].outcome == "retried"
        table.set(job, run_after=datetime.now(UTC) - timedelta(seconds=1))
    assert jobs.fail(table.db, table.run(job), AttemptRecord(), RETRYABLE, RETRY_LATER) is None
    assert (table.state(job), table.job(job).failures) == ("failed", 5)
    assert [attempt.outcome for attempt in table.attempts(job)] == ["retried"] * 4 + ["failed"]


def test_a_success_after_a_failure_clears_the_error(table: JobTable) -> None:
    job = table.add_one()
    jobs.fail(table.db, table.run(job), AttemptRecord(), RETRYABLE, RETRY_AT_ONCE)
    table.succeed(job)
    row = table.job(job)
    assert (row.error_code, row.error_message, row.failures) == (None, None, 1)


def test_a_released_job_is_due_at_once_and_no_failure_is_counted(table: JobTable) -> None:
    leased = table.run(table.add_one())
    jobs.release(table.db, leased, AttemptRecord())
    row = table.job(leased.id)
    assert (row.state, row.failures, row.losses, row.attempt) == ("pending", 0, 0, 1)
    assert table.attempts(leased.id)[0].outcome == "released"
    assert [message.attempt for message in table.dispatch()] == [1]


@pytest.mark.parametrize("end", ENDS)
def test_an_attempt_that_lost_its_lease_changes_nothing(table: JobTable, end: str) -> None:
    job = table.add_one()
    stale = table.run(job, lease=-1)
    jobs.reap(table.db)
    fresh = table.run(job, worker="w2")
    before = table.job(job), table.attempts(job)
    with pytest.raises(LeaseLost, match=rf"^job {job}: attempt 1 lost its lease"):
        ENDS[end](table.db, stale)
    assert (table.job(job), table.attempts(job)) == before
    jobs.succeed(table.db, fresh, AttemptRecord())
    assert [attempt.outcome for attempt in table.attempts(job)] == ["lost", "succeeded"]


@pytest.mark.parametrize("end", ENDS)
def test_an_attempt_ends_only_once(table: JobTable, end: str) -> None:
    leased = table.run(table.add_one())
    jobs.succeed(table.db, leased, AttemptRecord())
    with pytest.raises(LeaseLost):
        ENDS[end](table.db, leased)
    assert table.state(leased.id) == "succeeded"


def test_a_job_whose_lease_expired_but_was_not_reaped_can_succeed(table: JobTable) -> None:
    leased = table.run(table.add_one(), lease=-1)
    jobs.succeed(table.db, leased, AttemptRecord())
    assert jobs.reap(table.db) == []
    assert table.state(leased.id) == "succeeded"


# --- reap -----------------------------------------------------------------------------------


def test_reap_ends_an_expired_lease_and_the_job_is_pending_again(table: JobTable) -> None:
    lost, leased = table.add(2)
    table.run(lost, lease=-1)
    table.run(leased)
    assert jobs.reap(table.db) == [jobs.ReapedLease(job=lost, attempt=1, state="pending")]
    row, (attempt,) = table.job(lost), table.attempts(lost)
    assert (row.losses, row.failures, row.worker, row.error_code) == (1, 0, None, None)
    assert (attempt.outcome, attempt.error_code) == ("lost", "worker_lost")
    assert table.state(leased) == "running"
    assert [message.job for message in table.dispatch()] == [lost]


def test_a_heartbeat_before_the_reaper_keeps_the_lease(table: JobTable) -> None:
    leased = table.run(table.add_one(), lease=-1)
    jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert jobs.reap(table.db) == []
    assert table.state(leased.id) == "running"


def test_the_second_lost_worker_quarantines_the_job(table: JobTable) -> None:
    job = table.add_one()
    for state in ("pending", "failed"):
        table.run(job, lease=-1)
        assert [reaped.state for reaped in jobs.reap(table.db)] == [state]
    row = table.job(job)
    assert (row.losses, row.error_code) == (2, "worker_lost")
    assert "retry it once the cause is known" in row.error_message
    assert row.finished_at is not None
    assert table.dispatch() == []


def test_a_retry_lifts_the_quarantine(table: JobTable) -> None:
    job = table.add_one()
    for _ in range(2):
        table.run(job, lease=-1)
        jobs.reap(table.db)
    assert table.retry(job).count == 1
    table.run(job, lease=-1)
    assert [reaped.state for reaped in jobs.reap(table.db)] == ["pending"]


def test_concurrent_reapers_reap_each_job_once(table: JobTable) -> None:
    for job in table.add(6):
        table.run(job, lease=-1)
    barrier = Barrier(4)

    def reap(_: int) -> list[jobs.ReapedLease]:
        barrier.wait()
        return jobs.reap(table.db)

    with ThreadPoolExecutor(4) as pool:
        reaped = [lease for part in pool.map(reap, range(4)) for lease in part]
    assert len(reaped) == 6
    assert table.states() == ["pending"] * 6


# --- cancel ---------------------------------------------------------------------------------


def test_waiting_jobs_are_cancelled_at_once_and_running_ones_are_flagged(table: JobTable) -> None:
    running, queued, pending, done = table.add(4)
    table.run(running)
    table.succeed(done)
    table.set(pending, state="pending")
    assert table.cancel(running, queued, pending, done) == jobs.CancelResult(
        cancelled=2, requested=1
    )
    assert table.states() == ["running", "cancelled", "cancelled", "succeeded"]
    assert table.job(running).cancel_requested
    assert table.job(queued).finished_at is not None
    assert table.dispatch() == []


def test_cancelling_again_changes_nothing(table: JobTable) -> None:
    job = table.add_one()
    table.cancel(job)
    assert table.cancel(job) == jobs.CancelResult(cancelled=0, requested=0)


@pytest.mark.parametrize("end", ["fail", "retry", "release", "cancel"])
def test_a_running_job_that_was_cancelled_ends_cancelled_however_it_stops(
    table: JobTable, end: str
) -> None:
    leased = table.run(table.add_one())
    table.cancel(leased.id)
    assert ENDS[end](table.db, leased) is None
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert row.state == "cancelled"
    assert row.finished_at is not None
    expected = {"fail": "failed", "retry": "failed", "release": "released", "cancel": "cancelled"}
    assert attempt.outcome == expected[end]
    assert table.dispatch() == []


def test_a_cancelled_job_whose_worker_is_lost_ends_cancelled(table: JobTable) -> None:
    leased = table.run(table.add_one(), lease=-1)
    table.cancel(leased.id)
    assert [reaped.state for reaped in jobs.reap(table.db)] == ["cancelled"]
    assert table.job(leased.id).finished_at is not None


def test_a_job_that_succeeds_before_its_worker_sees_the_cancellation_stays_succeeded(
    table: JobTable,
) -> None:
    leased = table.run(table.add_one())
    table.cancel(leased.id)
    jobs.succeed(table.db, leased, AttemptRecord())
    assert table.state(leased.id) == "succeeded"


# --- retry ----------------------------------------------------------------------------------


def ended(table: JobTable, state: str) -> int:
    job = table.add_one()
    if state == "cancelled":
        table.cancel(job)
    elif state == "failed":
        jobs.fail(table.db, table.run(job), AttemptRecord(), NOT_RETRYABLE, RETRY_LATER)
    else:
        table.succeed(job)
    assert table.state(job) == state
    return job


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_a_retry_reopens_a_final_job(table: JobTable, state: str) -> None:
    job = ended(table, state)
    assert table.retry(job) == jobs.RetryResult(count=1, engines={ENGINE})
    row = table.job(job)
    assert (row.state, row.failures, row.losses, row.error_code) == ("pending", 0, 0, None)
    assert (row.finished_at, row.cancel_requested) == (None, False)
    table.succeed(job)


def test_a_retry_skips_jobs_that_are_not_final(table: JobTable) -> None:
    running, queued = table.add(2)
    table.run(running)
    assert table.retry(running, queued).count == 0
    assert table.states() == ["running", "queued"]


def test_a_retry_clears_the_cancellation_flag(table: JobTable) -> None:
    leased = table.run(table.add_one())
    table.cancel(leased.id)
    jobs.finish_cancelled(table.db, leased, AttemptRecord())
    table.retry(leased.id)
    again = table.run(leased.id)
    jobs.release(table.db, again, AttemptRecord())
    assert table.state(leased.id) == "pending"


def test_a_retry_with_changes_keeps_the_record_of_the_first_attempt(table: JobTable) -> None:
    job = ended(table, "failed")
    before = table.job(job)
    table.retry(job, strength=0.6, seed=99)
    leased = table.run(job)
    assert (leased.params.strength, leased.params.seed) == (0.6, 99)
    assert leased.params.guidance_scale == Params().guidance_scale
    assert table.job(job).content_key != before.content_key
    first, second = table.attempts(job)
    assert (first.params, first.seed) == (before.params, before.seed)
    assert (second.params, second.seed) == (table.job(job).params, 99)


def test_a_retry_with_contradictory_changes_changes_nothing(table: JobTable) -> None:
    job = ended(table, "failed")
    with pytest.raises(ParameterError, match=r"eta: 0\.3 has no meaning for scheduler 'euler'"):
        table.retry(job, scheduler="euler", eta=0.3)
    assert table.state(job) == "failed"


def test_a_retry_that_would_equal_another_job_is_refused_and_changes_nothing(
    table: JobTable,
) -> None:
    same = {"image": "/a.png", "mask": "/b.png", "output": "/c.png"}
    first = table.add_one(**same, params=Params(seed=1, strength=0.5))
    table.cancel(first)
    second = table.add_one(**same, params=Params(seed=1, strength=0.6))
    table.cancel(second)
    with pytest.raises(InputError, match=f"job {second}: another job already does exactly this"):
        table.retry(second, strength=0.5)
    assert table.states() == ["cancelled", "cancelled"]


def test_a_selection_applies_all_its_conditions(table: JobTable) -> None:
    first, second = table.add(2)
    other = table.add(submission=table.submission("other"))[0]
    for job in (first, second, other):
        table.run(job)
    for job, error in (
        (first, NOT_RETRYABLE),
        (second, InpaintError("odd")),
        (other, NOT_RETRYABLE),
    ):
        leased = jobs.LeasedJob(
            id=job, attempt=1, engine=ENGINE, image="", mask="", output="", params=Params(),
            priority=0, failures=0,
        )  # fmt: skip
        jobs.fail(table.db, leased, AttemptRecord(), error, RETRY_LATER)
    chosen = Selection(
        submission=table.job(first).submission_id, states=("failed",), error_code="bad_image"
    )
    assert jobs.retry(table.db, chosen).count == 1
    assert table.states() == ["pending", "failed", "failed"]


# --- reopen by content key -------------------------------------------------------------------


def test_reopening_by_content_key_moves_final_jobs_to_the_new_submission(table: JobTable) -> None:
    done, waiting = table.add(2)
    table.succeed(done)
    table.set(waiting, state="pending")
    newer = table.submission("newer")
    lines = {table.job(job).content_key: line for job, line in ((done, 11), (waiting, 12))}
    assert jobs.reopen_by_content_key(table.db, newer, lines | {b"unknown": 13}) == 1
    row = table.job(done)
    assert (row.state, row.submission_id, row.line) == ("pending", newer, 11)
    assert table.job(waiting).submission_id != newer


def test_a_reopened_job_keeps_its_line_if_the_new_one_belongs_to_another_job(
    table: JobTable,
) -> None:
    """The line's own job had its parameters changed; another job has the row's content key."""
    first = table.submission("first")
    changed = table.add(submission=first)[0]
    asked_key = table.job(changed).content_key
    table.succeed(changed)
    table.retry(changed, strength=0.5)
    same = table.submission("second")
    twin = table.add(submission=same, content_key=asked_key)[0]
    table.succeed(twin)
    line, twins_line = table.job(changed).line, table.job(twin).line
    assert jobs.reopen_by_content_key(table.db, first, {asked_key: line}) == 1
    row = table.job(twin)
    assert (row.state, row.submission_id, row.line) == ("pending", same, twins_line)


# --- the database enforces the invariants too ---------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"state": "lost"},
        {"state": "running"},
        {"lease_expires_at": clock()},
        {"state": "succeeded"},
        {"finished_at": clock()},
        {"attempt": -1},
        {"failures": -1},
        {"losses": -1},
        {"content_key": None},
        {"submission_id": 999},
    ],
    ids="-".join,
)
def test_the_database_rejects_an_inconsistent_job(table: JobTable, values: dict[str, Any]) -> None:
    job = table.add_one()
    with pytest.raises(IntegrityError):
        table.set(job, **values)


def test_the_database_rejects_a_second_job_for_a_line_or_a_content_key(table: JobTable) -> None:
    first, second = table.add(2)
    with pytest.raises(IntegrityError):
        table.set(second, line=table.job(first).line)
    with pytest.raises(IntegrityError):
        table.set(second, content_key=table.job(first).content_key)


def test_the_database_rejects_a_second_owner_of_an_output(table: JobTable) -> None:
    output = "/results/" + "long/" * 2000  # longer than an entry of a B-tree
    ended = table.add_one(output=output)
    table.cancel(ended)
    owner = table.add_one(output=output, seed=1)
    with pytest.raises(IntegrityError):
        table.set(ended, state="pending", finished_at=None)
    table.succeed(owner)
    with pytest.raises(IntegrityError):
        table.set(ended, state="pending", finished_at=None)
    table.set(owner, error_code="output_replaced")
    table.set(ended, state="pending", finished_at=None)


@pytest.mark.parametrize(
    "values",
    [{"outcome": "fine", "finished_at": clock()}, {"outcome": "lost"}, {"finished_at": clock()}],
    ids="-".join,
)
def test_the_database_rejects_an_inconsistent_attempt(
    table: JobTable, values: dict[str, Any]
) -> None:
    leased = table.run(table.add_one())
    with pytest.raises(IntegrityError), table.db.write() as connection:
        connection.execute(update(Attempt).where(Attempt.job_id == leased.id).values(**values))


def test_the_database_rejects_an_attempt_without_a_job(table: JobTable) -> None:
    values = {"worker": "w", "device": "d", "engine": "e", "engine_revision": "r"}
    row = {"job_id": 999, "attempt": 1, "params": "{}", "seed": 0, **values}
    with pytest.raises(IntegrityError), table.db.write() as connection:
        connection.execute(insert(Attempt).values(started_at=clock()), row)


# --- keys and seeds --------------------------------------------------------------------------


def test_a_content_key_depends_on_every_part_and_on_their_boundaries() -> None:
    parts = {"image": "i", "mask": "m", "output": "o", "engine": "e", "params": "p"}
    keys = {
        jobs.content_key(**{**parts, **change}, seed=seed)
        for change, seed in (
            ({}, None),
            ({}, 0),
            ({}, 1),
            *(({name: "x"}, None) for name in parts),
            ({"image": "im", "mask": ""}, None),
        )
    }
    assert len(keys) == 9
    assert {len(key) for key in keys} == {16}


def test_a_derived_seed_is_the_same_for_the_same_work_and_below_2_to_the_32() -> None:
    key = jobs.content_key(image="i", mask="m", output="o", engine="e", params="p", seed=None)
    assert jobs.derive_seed(key) == jobs.derive_seed(key) < 2**32


# --- outputs --------------------------------------------------------------------------------


def test_a_job_superseded_while_it_runs_does_not_regain_its_output(table: JobTable) -> None:
    first = table.add_one(output="/results/a.png")
    leased = table.run(first)
    jobs.record_blocked_reason(table.db, leased, StorageUnavailable("S3 does not answer"))
    replacement = new_job(77, output="/results/a.png")
    second = table.submission("second")
    assert submissions.record(table.db, second, [replacement], replace=True) == []
    jobs.record_blocked_reason(table.db, leased, StorageUnavailable("S3 still does not answer"))
    jobs.succeed(table.db, leased, AttemptRecord())
    assert (table.state(first), table.job(first).error_code) == ("succeeded", "output_replaced")
    other = first + 1
    table.succeed(other)
    assert table.retry(other).count == 1
    assert table.retry(first).replaced == 1


def test_of_several_jobs_for_one_output_only_the_newest_is_retried(table: JobTable) -> None:
    older = table.add_one(output="/results/a.png")
    table.cancel(older)
    newer = table.add_one(submission=table.submission("second"), output="/results/a.png", seed=5)
    table.cancel(newer)
    alone = table.add_one()
    table.cancel(alone)
    reopened = table.retry(older, newer, alone)
    assert (reopened.count, reopened.replaced) == (2, 1)
    assert [table.state(job) for job in (older, newer, alone)] == [
        *("cancelled", "pending", "pending")
    ]


def test_with_replace_a_row_takes_its_output_from_the_changed_job_on_its_own_line(
    table: JobTable,
) -> None:
    """Only the job of another submission that has the row's content key runs."""
    first, second = table.submission("first"), table.submission("second")
    changed = table.add_one(submission=first)
    row = new_job(table.job(changed).line)
    table.cancel(changed)
    assert table.retry(changed, seed=7).count == 1
    table.cancel(changed)
    assert submissions.record(table.db, second, [row]) == []
    same = changed + 1
    table.cancel(same)
    assert table.retry(changed).count == 1
    assert submissions.record(table.db, first, [row], replace=True) == [row]
    lines = {row.content_key: row.line}
    assert jobs.reopen_by_content_key(table.db, first, lines, replace=True) == 1
    assert (table.state(changed), table.state(same)) == ("cancelled", "pending")
    assert table.job(changed).error_code == "output_replaced"
