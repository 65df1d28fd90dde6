"""What the tables tell, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from producer import reports
from producer.cli import console
from shared import jobs
from shared.db import Database
from shared.db.models import STATES
from shared.errors import (
    ImageError,
    InpaintError,
    OutOfMemory,
    OutputRefused,
    StorageUnavailable,
)
from shared.jobs import AttemptRecord, Selection, submissions
from tests.job_table import AT_ONCE, LATER, JobTable, new_job


@pytest.fixture
def table(db: Database) -> JobTable:
    return JobTable(db)


def fail(table: JobTable, job: int, error: InpaintError) -> None:
    jobs.fail(table.db, table.run(job), AttemptRecord(), error, AT_ONCE)


def test_progress_counts_every_state_even_those_of_no_job(table: JobTable) -> None:
    assert reports.measure_progress(table.db, None) == reports.Progress(
        counts=dict.fromkeys(STATES, 0), rate=0.0
    )
    done, _ = table.add(2)
    table.succeed(done)
    found = reports.measure_progress(table.db, None)
    assert (found.counts["succeeded"], found.counts["queued"]) == (1, 1)
    assert (found.total, found.left) == (2, 1)


def test_the_rate_is_of_the_last_minute(table: JobTable) -> None:
    now = datetime.now(UTC)
    for number, job in enumerate(table.add(12)):
        if number < 10:
            table.succeed(job)
            table.set(job, finished_at=now - timedelta(seconds=20 if number < 5 else 0))
    old = table.one()
    table.succeed(old)
    table.set(old, finished_at=now - timedelta(seconds=300))
    found = reports.measure_progress(table.db, 1)
    assert found.rate == pytest.approx(10 / 20, rel=0.1)
    assert found.seconds_left == pytest.approx(2 / found.rate)


def test_there_is_no_time_left_where_nothing_is_left_or_nothing_moves(table: JobTable) -> None:
    job = table.one()
    assert reports.measure_progress(table.db, None).seconds_left is None
    table.succeed(job)
    assert reports.measure_progress(table.db, None).seconds_left is None


def test_a_burst_is_no_rate_without_end(table: JobTable) -> None:
    for job in table.add(3):
        table.succeed(job)
    assert reports.measure_progress(table.db, None).rate <= 3


def test_submissions_come_newest_first_and_with_their_counts(table: JobTable) -> None:
    first = table.submission("first", manifest="/a.csv")
    second = table.submission("second", manifest="/b.csv")
    table.succeed(table.add(2, submission=first)[0])
    listed = reports.list_submissions(table.db)
    assert [(one.id, one.manifest) for one in listed] == [(second, "/b.csv"), (first, "/a.csv")]
    assert [one.counts for one in listed] == [{}, {"succeeded": 1, "queued": 1}]
    assert [one.id for one in reports.list_submissions(table.db, limit=1)] == [second]
    assert listed[0].created_at.tzinfo is not None


def test_errors_come_most_frequent_first_one_for_each_message(table: JobTable) -> None:
    one, two, three, four, five = table.add(5)
    fail(table, one, OutOfMemory("full"))  # waits again: not failed
    fail(table, two, ImageError("b is no picture"))
    fail(table, three, ImageError("a is no picture"))
    fail(table, four, InpaintError("odd"))
    fail(table, five, ImageError("a is no picture"))
    assert reports.count_errors(table.db, None) == [
        ("bad_image", 2, "a is no picture"),
        ("bad_image", 1, "b is no picture"),
        ("internal_error", 1, "odd"),
    ]
    assert reports.count_errors(table.db, 99) == []


def test_a_story_is_one_job_and_its_attempts_oldest_first(table: JobTable) -> None:
    job = table.one()
    fail(table, job, OutOfMemory("full"))
    table.succeed(job)
    job_history = reports.job_history(table.db, job)
    assert job_history is not None
    assert job_history.job["id"] == job
    assert [attempt["outcome"] for attempt in job_history.attempts] == ["retried", "succeeded"]
    assert reports.job_history(table.db, job + 1) is None


def test_an_export_goes_through_every_page_in_order(table: JobTable) -> None:
    count = 2001
    submission = table.submission()
    rows = [new_job(line, content_key=b"%016d" % line) for line in range(count)]
    submissions.record(table.db, submission, rows)
    exported = list(reports.export_jobs(table.db, Selection()))
    assert [record["line"] for record in exported] == list(range(count))
    assert set(exported[0]) == set(reports.EXPORTED)


def test_an_export_tells_of_the_last_attempt(table: JobTable) -> None:
    job = table.one()
    fail(table, job, OutOfMemory("full"))
    table.succeed(job, width=3, timings={"fetch": 1.0})
    (record,) = reports.export_jobs(table.db, Selection())
    assert (record["state"], record["attempts"], record["width"]) == ("succeeded", 2, 3)
    assert record["timings"] == {"fetch": 1.0}
    assert record["params"]["mode"] == "auto"
    assert datetime.fromisoformat(record["finished_at"]).tzinfo is not None


def test_progress_tells_what_waits_because_of_an_error(table: JobTable) -> None:
    failing, paused, again = (table.run(job) for job in table.add(3))
    jobs.fail(table.db, failing, AttemptRecord(), StorageUnavailable("'/a.png': busy"), LATER)
    jobs.record_blocked_reason(table.db, paused, OutputRefused("'/b.png': No space left on device"))
    jobs.record_blocked_reason(table.db, again, StorageUnavailable("'/c.png': busy"))
    found = reports.measure_progress(table.db, 1)
    full, retried = found.blocked
    assert full.summary == "1 paused until it is mended"
    assert full.message == "'/b.png': No space left on device"
    assert retried.code == "storage_unavailable"
    assert 20 < retried.seconds <= 30
    assert console.note(found).startswith("1 paused until it is mended (output_refused), 1 wait ")
    assert "No space left on device" in console.counts_line(found)


def test_progress_counts_jobs_of_other_submissions_where_asked(table: JobTable) -> None:
    first, second, _ = table.add(3)
    table.succeed(second)
    other = table.submission("other")
    found = reports.measure_progress(table.db, other, extra_jobs=[first, second])
    assert (found.total, found.left) == (2, 1)


def test_errors_of_other_submissions_jobs_are_told_where_asked(table: JobTable) -> None:
    own, foreign = table.add(2)
    fail(table, own, ImageError("not a picture"))
    fail(table, foreign, ImageError("not a picture"))
    other = table.submission("other")
    assert reports.count_errors(table.db, other, extra_jobs=[foreign]) == [
        ("bad_image", 1, "not a picture")
    ]
