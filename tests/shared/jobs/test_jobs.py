"""Every row of the table of job states, on both databases, and what may not happen."""

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
from tests.job_table import AT_ONCE, ENGINE, LATER, JobTable, Sent, new_job

BROKEN = OutOfMemory("the device is full")
HOPELESS = ImageError("not a picture")

# Every way an attempt ends; each names the fencing token and loses to a newer one.
ENDS: dict[str, Callable[[Database, LeasedJob], Any]] = {
    "succeed": lambda db, job: jobs.succeed(db, job, AttemptRecord()),
    "fail": lambda db, job: jobs.fail(db, job, AttemptRecord(), HOPELESS, AT_ONCE),
    "retry": lambda db, job: jobs.fail(db, job, AttemptRecord(), BROKEN, AT_ONCE),
    "release": lambda db, job: jobs.release(db, job, AttemptRecord()),
    "cancel": lambda db, job: jobs.finish_cancelled(db, job, AttemptRecord()),
    "confirm": lambda db, job: jobs.renew_lease(db, job, lease_seconds=60),
}


def seconds_until(moment: datetime) -> float:
    return (moment - datetime.now(UTC)).total_seconds()


# --- pending -> queued --------------------------------------------------------------------


def test_a_new_row_is_pending_and_due_at_once(table: JobTable) -> None:
    job = table.job(table.one())
    assert (job.state, job.attempt, job.failures, job.losses) == ("pending", 0, 0, 0)
    assert -5 < seconds_until(job.run_after) <= 0.1
    assert job.finished_at is job.lease_expires_at is job.worker is None


def test_dispatch_queues_what_is_due_and_names_the_attempt_in_the_message(table: JobTable) -> None:
    job = table.one(priority=3)
    assert table.dispatch() == [Message(job=job, attempt=0, engine=ENGINE, priority=3)]
    assert table.state(job) == "queued"
    assert table.dispatch() == []


def test_dispatch_leaves_alone_what_is_not_due_and_what_is_for_another_engine(
    table: JobTable,
) -> None:
    waiting, foreign = table.one(), table.one(engine="sd2")
    jobs.fail(table.db, table.run(waiting), AttemptRecord(), BROKEN, LATER)
    assert table.dispatch() == []
    assert (table.state(waiting), table.state(foreign)) == ("pending", "pending")


def test_dispatch_goes_by_priority_then_by_age(table: JobTable) -> None:
    low, first, high, second, higher = (
        table.one(priority=priority) for priority in (-5, 0, 7, 0, 8)
    )
    assert [message.job for message in table.dispatch()] == [higher, high, first, second, low]


def test_each_priority_class_has_a_bound_of_its_own(table: JobTable) -> None:
    urgent, normal, low = (table.add(4, priority=priority) for priority in (9, 0, -9))
    assert [m.job for m in table.dispatch(bound=3)] == [*urgent[:3], *normal[:3], *low[:3]]
    assert table.dispatch(bound=3) == []


def test_a_taken_message_makes_room_for_one_more(table: JobTable) -> None:
    ids = table.add(4)
    table.dispatch(bound=2)
    assert table.acquire(ids[0])
    assert [message.job for message in table.dispatch(bound=2)] == [ids[2]]


def test_an_urgent_job_passes_a_full_queue_of_ordinary_ones(table: JobTable) -> None:
    table.add(5)
    table.dispatch(bound=2)
    urgent = table.one(priority=1)
    assert [message.job for message in table.dispatch(bound=2)] == [urgent]


def test_jobs_stay_queued_when_the_broker_does_not_answer(table: JobTable) -> None:
    class Down:
        def publish(self, messages: object) -> None:
            raise BrokerUnavailable("nobody answers")

    job = table.one()
    with pytest.raises(BrokerUnavailable):
        jobs.dispatch(table.db, Down(), ENGINE, bound=10)  # type: ignore[arg-type]
    assert table.state(job) == "queued"


def test_two_dispatchers_at_once_do_not_overfill_the_queue(table: JobTable, redis_url: str) -> None:
    table.add(60)
    together = Barrier(4)

    def top_up(_: int) -> int:
        queue = Queue(redis_url)
        together.wait()
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


def test_what_redis_lost_is_published_again_and_only_that(table: JobTable, redis_url: str) -> None:
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


def test_a_message_that_may_be_on_its_way_is_not_sent_again(
    table: JobTable, redis_url: str
) -> None:
    queue = Queue(redis_url)
    table.one()
    table.dispatch()
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=30) == 0
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 1
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=30) == 0
    queue.close()


def test_a_job_that_is_taken_while_redis_is_asked_is_not_published_again(table: JobTable) -> None:
    job = table.one()
    table.dispatch()

    class TakenMeanwhile(Sent):
        def ready_messages(self, _engine: str) -> set[tuple[int, int]]:
            assert table.acquire(job)
            return set()

    queue = TakenMeanwhile()
    assert jobs.redeliver(table.db, queue, ENGINE, grace_seconds=-1) == 0  # type: ignore[arg-type]
    assert queue.messages == []
    assert table.state(job) == "running"


def test_more_lost_messages_than_a_statement_may_name_come_back(
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
    job = table.one(params=params)
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


def test_a_doubled_message_is_not_run_twice(table: JobTable) -> None:
    job = table.one()
    table.dispatch()
    assert table.acquire(job, seen=0)
    assert table.acquire(job, seen=0) is None
    assert table.acquire(job, seen=1) is None
    assert len(table.attempts(job)) == 1


def test_a_message_from_an_earlier_attempt_is_stale(table: JobTable) -> None:
    job = table.one()
    jobs.release(table.db, table.run(job), AttemptRecord())
    table.dispatch()
    assert table.acquire(job, seen=0) is None
    assert table.acquire(job, seen=1)


@pytest.mark.parametrize("state", ["pending", "succeeded", "cancelled"])
def test_a_message_for_a_job_that_is_not_queued_is_stale(table: JobTable, state: str) -> None:
    job = table.one()
    if state == "succeeded":
        table.succeed(job)
    if state == "cancelled":
        table.dispatch()
        table.cancel(job)
    assert table.acquire(job, seen=table.job(job).attempt) is None
    assert table.state(job) == state


def test_a_message_for_a_job_that_does_not_exist_is_stale(table: JobTable) -> None:
    assert table.acquire(12345) is None


def test_of_many_workers_that_reach_for_a_job_exactly_one_gets_it(table: JobTable) -> None:
    ids, workers = table.add(5), 6
    table.dispatch()
    together = Barrier(workers)

    def reach(number: int) -> list[int]:
        together.wait()
        return [job for job in ids if table.acquire(job, worker=f"w{number}")]

    with ThreadPoolExecutor(workers) as pool:
        taken = [job for found in pool.map(reach, range(workers)) for job in found]
    assert sorted(taken) == ids
    assert [len(table.attempts(job)) for job in ids] == [1] * 5


# --- running -> running ---------------------------------------------------------------------


def test_a_heartbeat_renews_all_of_one_workers_leases(table: JobTable) -> None:
    mine, also_mine, other = table.add(3)
    table.run(mine, lease=5)
    table.run(also_mine, lease=5)
    table.run(other, worker="w2", lease=5)
    beats = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert {(beat.job, beat.attempt, beat.cancel_requested) for beat in beats} == {
        (mine, 1, False),
        (also_mine, 1, False),
    }
    assert seconds_until(table.job(mine).lease_expires_at) > 50
    assert seconds_until(table.job(other).lease_expires_at) < 6


def test_a_heartbeat_reports_a_cancellation_and_leaves_out_what_was_lost(table: JobTable) -> None:
    cancelled, lost = table.add(2)
    table.run(cancelled)
    table.run(lost, lease=-1)
    table.cancel(cancelled)
    jobs.reap(table.db)
    (beat,) = jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert (beat.job, beat.cancel_requested) == (cancelled, True)


def test_confirm_renews_one_lease(table: JobTable) -> None:
    leased = table.run(table.one(), lease=5)
    jobs.renew_lease(table.db, leased, lease_seconds=60)
    assert seconds_until(table.job(leased.id).lease_expires_at) > 50


# --- running -> succeeded, failed, pending --------------------------------------------------


def test_success_is_recorded_with_the_job_and_its_attempt(table: JobTable) -> None:
    leased = table.run(table.one())
    found = AttemptRecord(
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
    jobs.succeed(table.db, leased, found)
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert (row.state, row.worker, row.lease_expires_at) == ("succeeded", None, None)
    assert (row.image_version, row.mask_version, row.result_sha256) == ("v1", "v2", "3" * 64)
    assert -5 < seconds_until(row.finished_at) <= 0.1
    assert (attempt.outcome, attempt.error_code) == ("succeeded", None)
    assert attempt.finished_at >= attempt.started_at
    assert (attempt.image_sha256, attempt.mask_sha256) == ("1" * 64, "2" * 64)
    assert (attempt.width, attempt.height, attempt.regions, attempt.windows) == (640, 480, 1, 2)
    assert attempt.timings == '{"fetch": 0.25, "inpaint": 1.0}'


def test_an_error_that_a_retry_cannot_help_fails_the_job(table: JobTable) -> None:
    leased = table.run(table.one())
    assert jobs.fail(table.db, leased, AttemptRecord(), HOPELESS, LATER) is None
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert (row.state, row.failures) == ("failed", 1)
    assert (row.error_code, row.error_message) == ("bad_image", "not a picture")
    assert (attempt.outcome, attempt.error_code) == ("failed", "bad_image")


def test_an_error_that_a_retry_can_help_waits_longer_each_time(table: JobTable) -> None:
    job = table.one()
    for failures, expected in ((1, 30), (2, 60), (3, 120), (4, 240)):
        wait = jobs.fail(table.db, table.run(job), AttemptRecord(), BROKEN, LATER)
        row = table.job(job)
        assert wait == expected
        assert expected - 5 < seconds_until(row.run_after) <= expected + 0.1
        assert (row.state, row.failures, row.error_code) == ("pending", failures, "out_of_memory")
        assert table.attempts(job)[-1].outcome == "retried"
        table.set(job, run_after=datetime.now(UTC) - timedelta(seconds=1))
    assert jobs.fail(table.db, table.run(job), AttemptRecord(), BROKEN, LATER) is None
    assert (table.state(job), table.job(job).failures) == ("failed", 5)
    assert [attempt.outcome for attempt in table.attempts(job)] == ["retried"] * 4 + ["failed"]


def test_a_success_after_a_failure_clears_the_error(table: JobTable) -> None:
    job = table.one()
    jobs.fail(table.db, table.run(job), AttemptRecord(), BROKEN, AT_ONCE)
    table.succeed(job)
    row = table.job(job)
    assert (row.error_code, row.error_message, row.failures) == (None, None, 1)


def test_a_released_job_is_due_at_once_and_no_failure_is_counted(table: JobTable) -> None:
    leased = table.run(table.one())
    jobs.release(table.db, leased, AttemptRecord())
    row = table.job(leased.id)
    assert (row.state, row.failures, row.losses, row.attempt) == ("pending", 0, 0, 1)
    assert table.attempts(leased.id)[0].outcome == "released"
    assert [message.attempt for message in table.dispatch()] == [1]


@pytest.mark.parametrize("end", ENDS)
def test_an_attempt_that_lost_its_lease_ends_nothing(table: JobTable, end: str) -> None:
    job = table.one()
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
    leased = table.run(table.one())
    jobs.succeed(table.db, leased, AttemptRecord())
    with pytest.raises(LeaseLost):
        ENDS[end](table.db, leased)
    assert table.state(leased.id) == "succeeded"


def test_a_lease_that_ran_out_but_was_not_reaped_still_ends_well(table: JobTable) -> None:
    leased = table.run(table.one(), lease=-1)
    jobs.succeed(table.db, leased, AttemptRecord())
    assert jobs.reap(table.db) == []
    assert table.state(leased.id) == "succeeded"


# --- reap -----------------------------------------------------------------------------------


def test_a_lease_that_ran_out_is_taken_back(table: JobTable) -> None:
    lost, held = table.add(2)
    table.run(lost, lease=-1)
    table.run(held)
    assert jobs.reap(table.db) == [jobs.ReapedLease(job=lost, attempt=1, state="pending")]
    row, (attempt,) = table.job(lost), table.attempts(lost)
    assert (row.losses, row.failures, row.worker, row.error_code) == (1, 0, None, None)
    assert (attempt.outcome, attempt.error_code) == ("lost", "worker_lost")
    assert table.state(held) == "running"
    assert [message.job for message in table.dispatch()] == [lost]


def test_a_heartbeat_in_time_keeps_the_job_from_the_reaper(table: JobTable) -> None:
    leased = table.run(table.one(), lease=-1)
    jobs.heartbeat(table.db, worker="w1", lease_seconds=60)
    assert jobs.reap(table.db) == []
    assert table.state(leased.id) == "running"


def test_the_second_lost_worker_quarantines_the_job(table: JobTable) -> None:
    job = table.one()
    for state in ("pending", "failed"):
        table.run(job, lease=-1)
        assert [reaped.state for reaped in jobs.reap(table.db)] == [state]
    row = table.job(job)
    assert (row.losses, row.error_code) == (2, "worker_lost")
    assert "retry it once the cause is known" in row.error_message
    assert row.finished_at is not None
    assert table.dispatch() == []


def test_a_retry_lifts_the_quarantine(table: JobTable) -> None:
    job = table.one()
    for _ in range(2):
        table.run(job, lease=-1)
        jobs.reap(table.db)
    assert table.retry(job).count == 1
    table.run(job, lease=-1)
    assert [reaped.state for reaped in jobs.reap(table.db)] == ["pending"]


def test_many_reapers_take_a_job_back_once(table: JobTable) -> None:
    for job in table.add(6):
        table.run(job, lease=-1)
    together = Barrier(4)

    def reap(_: int) -> list[jobs.ReapedLease]:
        together.wait()
        return jobs.reap(table.db)

    with ThreadPoolExecutor(4) as pool:
        reaped = [one for found in pool.map(reap, range(4)) for one in found]
    assert len(reaped) == 6
    assert table.states() == ["pending"] * 6


# --- cancel ---------------------------------------------------------------------------------


def test_waiting_jobs_are_cancelled_at_once_and_running_ones_asked(table: JobTable) -> None:
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
    job = table.one()
    table.cancel(job)
    assert table.cancel(job) == jobs.CancelResult(cancelled=0, requested=0)


@pytest.mark.parametrize("end", ["fail", "retry", "release", "cancel"])
def test_a_running_job_that_was_cancelled_ends_cancelled_however_it_stops(
    table: JobTable, end: str
) -> None:
    leased = table.run(table.one())
    table.cancel(leased.id)
    assert ENDS[end](table.db, leased) is None
    row, (attempt,) = table.job(leased.id), table.attempts(leased.id)
    assert row.state == "cancelled"
    assert row.finished_at is not None
    expected = {"fail": "failed", "retry": "failed", "release": "released", "cancel": "cancelled"}
    assert attempt.outcome == expected[end]
    assert table.dispatch() == []


def test_a_cancelled_job_whose_worker_is_lost_ends_cancelled(table: JobTable) -> None:
    leased = table.run(table.one(), lease=-1)
    table.cancel(leased.id)
    assert [reaped.state for reaped in jobs.reap(table.db)] == ["cancelled"]
    assert table.job(leased.id).finished_at is not None


def test_a_job_that_succeeds_before_it_sees_its_cancellation_has_succeeded(
    table: JobTable,
) -> None:
    leased = table.run(table.one())
    table.cancel(leased.id)
    jobs.succeed(table.db, leased, AttemptRecord())
    assert table.state(leased.id) == "succeeded"


# --- retry ----------------------------------------------------------------------------------


def ended(table: JobTable, state: str) -> int:
    job = table.one()
    if state == "cancelled":
        table.cancel(job)
    elif state == "failed":
        jobs.fail(table.db, table.run(job), AttemptRecord(), HOPELESS, LATER)
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


def test_a_retry_leaves_alone_what_is_not_final(table: JobTable) -> None:
    running, queued = table.add(2)
    table.run(running)
    assert table.retry(running, queued).count == 0
    assert table.states() == ["running", "queued"]


def test_a_retry_forgets_a_cancellation(table: JobTable) -> None:
    leased = table.run(table.one())
    table.cancel(leased.id)
    jobs.finish_cancelled(table.db, leased, AttemptRecord())
    table.retry(leased.id)
    again = table.run(leased.id)
    jobs.release(table.db, again, AttemptRecord())
    assert table.state(leased.id) == "pending"


def test_a_retry_with_changes_keeps_the_attempt_as_it_was(table: JobTable) -> None:
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


def test_a_retry_whose_changes_do_not_go_together_changes_nothing(table: JobTable) -> None:
    job = ended(table, "failed")
    with pytest.raises(ParameterError, match=r"eta: 0\.3 has no meaning for scheduler 'euler'"):
        table.retry(job, scheduler="euler", eta=0.3)
    assert table.state(job) == "failed"


def test_a_retry_that_would_repeat_another_job_is_refused_and_changes_nothing(
    table: JobTable,
) -> None:
    same = {"image": "/a.png", "mask": "/b.png", "output": "/c.png"}
    first = table.one(**same, params=Params(seed=1, strength=0.5))
    table.cancel(first)
    second = table.one(**same, params=Params(seed=1, strength=0.6))
    table.cancel(second)
    with pytest.raises(InputError, match=f"job {second}: another job already does exactly this"):
        table.retry(second, strength=0.5)
    assert table.states() == ["cancelled", "cancelled"]


def test_a_selection_restricts_by_everything_it_names(table: JobTable) -> None:
    one, two = table.add(2)
    other = table.add(submission=table.submission("other"))[0]
    for job in (one, two, other):
        table.run(job)
    for job, error in ((one, HOPELESS), (two, InpaintError("odd")), (other, HOPELESS)):
        leased = jobs.LeasedJob(
            id=job, attempt=1, engine=ENGINE, image="", mask="", output="", params=Params(),
            priority=0, failures=0,
        )  # fmt: skip
        jobs.fail(table.db, leased, AttemptRecord(), error, LATER)
    chosen = Selection(
        submission=table.job(one).submission_id, states=("failed",), error_code="bad_image"
    )
    assert jobs.retry(table.db, chosen).count == 1
    assert table.states() == ["pending", "failed", "failed"]


# --- rerun ----------------------------------------------------------------------------------


def test_a_rerun_reopens_final_jobs_and_moves_them_to_who_asks(table: JobTable) -> None:
    done, waiting = table.add(2)
    table.succeed(done)
    table.set(waiting, state="pending")
    newer = table.submission("newer")
    lines = {table.job(job).content_key: line for job, line in ((done, 11), (waiting, 12))}
    assert jobs.reopen_by_content_key(table.db, newer, lines | {b"unknown": 13}) == 1
    row = table.job(done)
    assert (row.state, row.submission_id, row.line) == ("pending", newer, 11)
    assert table.job(waiting).submission_id != newer


def test_a_rerun_leaves_a_job_where_it_is_when_its_new_line_is_taken(table: JobTable) -> None:
    """The line's own job had its parameters changed; another has become what the row asks."""
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


# --- the database holds the invariants too ---------------------------------------------------


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
def test_the_tables_refuse_a_job_that_contradicts_itself(
    table: JobTable, values: dict[str, Any]
) -> None:
    job = table.one()
    with pytest.raises(IntegrityError):
        table.set(job, **values)


def test_the_tables_refuse_a_second_job_for_a_line_or_for_the_same_work(table: JobTable) -> None:
    one, two = table.add(2)
    with pytest.raises(IntegrityError):
        table.set(two, line=table.job(one).line)
    with pytest.raises(IntegrityError):
        table.set(two, content_key=table.job(one).content_key)


@pytest.mark.parametrize(
    "values",
    [{"outcome": "fine", "finished_at": clock()}, {"outcome": "lost"}, {"finished_at": clock()}],
    ids="-".join,
)
def test_the_tables_refuse_an_attempt_that_contradicts_itself(
    table: JobTable, values: dict[str, Any]
) -> None:
    leased = table.run(table.one())
    with pytest.raises(IntegrityError), table.db.write() as connection:
        connection.execute(update(Attempt).where(Attempt.job_id == leased.id).values(**values))


def test_the_tables_refuse_an_attempt_without_a_job(table: JobTable) -> None:
    values = {"worker": "w", "device": "d", "engine": "e", "engine_revision": "r"}
    row = {"job_id": 999, "attempt": 1, "params": "{}", "seed": 0, **values}
    with pytest.raises(IntegrityError), table.db.write() as connection:
        connection.execute(insert(Attempt).values(started_at=clock()), row)


# --- keys and seeds --------------------------------------------------------------------------


def test_a_content_key_depends_on_every_part_and_on_where_the_parts_end() -> None:
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


def test_a_derived_seed_is_the_same_for_the_same_work_and_fits_any_generator() -> None:
    key = jobs.content_key(image="i", mask="m", output="o", engine="e", params="p", seed=None)
    assert jobs.derive_seed(key) == jobs.derive_seed(key) < 2**32


# --- outputs --------------------------------------------------------------------------------


def test_a_job_that_lost_its_output_while_it_ran_does_not_own_it_again(table: JobTable) -> None:
    first = table.one(output="/results/a.png")
    held = table.run(first)
    jobs.record_blocked_reason(table.db, held, StorageUnavailable("S3 does not answer"))
    taker = new_job(77, output="/results/a.png")
    second = table.submission("second")
    assert submissions.record(table.db, second, [taker], replace=True) == []
    jobs.record_blocked_reason(table.db, held, StorageUnavailable("S3 still does not answer"))
    jobs.succeed(table.db, held, AttemptRecord())
    assert (table.state(first), table.job(first).error_code) == ("succeeded", "output_replaced")
    other = first + 1
    table.succeed(other)
    assert table.retry(other).count == 1
    assert table.retry(first).replaced == 1


def test_of_several_jobs_for_one_output_only_the_newest_is_retried(table: JobTable) -> None:
    older = table.one(output="/results/a.png")
    table.cancel(older)
    newer = table.one(submission=table.submission("second"), output="/results/a.png", seed=5)
    table.cancel(newer)
    alone = table.one()
    table.cancel(alone)
    reopened = table.retry(older, newer, alone)
    assert (reopened.count, reopened.replaced) == (2, 1)
    assert [table.state(job) for job in (older, newer, alone)] == [
        *("cancelled", "pending", "pending")
    ]


def test_forced_a_row_takes_its_output_from_the_changed_job_at_its_own_line(
    table: JobTable,
) -> None:
    """Where another submission's job does what the row asks for, that one runs, and it alone."""
    first, second = table.submission("first"), table.submission("second")
    changed = table.one(submission=first)
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
