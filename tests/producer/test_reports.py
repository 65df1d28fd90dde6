"""Progress, lists, histories and the export, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from producer import reports
from producer.cli import console
from producer.reports import ErrorCount
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
from tests.job_table import RETRY_AT_ONCE, RETRY_LATER, JobTable, new_job


@pytest.fixture
def table(db: Database) -> JobTable:
    return JobTable(db)


def fail(table: JobTable, job: int, error: InpaintError) -> None:
    jobs.fail(table.db, table.run(job), AttemptRecord(), error, RETRY_AT_ONCE)


def test_progress_counts_every_state_even_without_jobs_in_it(table: JobTable) -> None:
    assert reports.measure_progress(table.db, None) == reports.Progress(
        counts=dict.fromkeys(STATES, 0), rate=0.0
    )
    finished, _ = table.add(2)
    table.succeed(finished)
    progress = reports.measure_progress(table.db, None)
    assert (progress.counts["succeeded"], progress.counts["queued"]) == (1, 1)
    assert (progress.total, progress.left) == (2, 1)


def test_the_rate_is_of_the_last_minute(table: JobTable) -> None:
    now = datetime.now(UTC)
    for number, job in enumerate(table.add(12)):
        if number < 10:
            table.succeed(job)
            table.set(job, finished_at=now - timedelta(seconds=20 if number < 5 else 0))
    old = table.add_one()
    table.succeed(old)
    table.set(old, finished_at=now - timedelta(seconds=300))
    progress = reports.measure_progress(table.db, 1)
    assert progress.rate == pytest.approx(10 / 20, rel=0.1)
    assert progress.seconds_left == pytest.approx(2 / progress.rate)


def test_the_time_left_is_unknown_without_unfinished_jobs_or_without_a_rate(
    table: JobTable,
) -> None:
    job = table.add_one()
    assert reports.measure_progress(table.db, None).seconds_left is None
    table.succeed(job)
    assert reports.measure_progress(table.db, None).seconds_left is None


def test_jobs_that_finish_at_the_same_moment_give_a_finite_rate(table: JobTable) -> None:
    for job in table.add(3):
        table.succeed(job)
    assert reports.measure_progress(table.db, None).rate <= 3


def test_submissions_are_listed_newest_first_with_their_counts(table: JobTable) -> None:
    first = table.submission("first", manifest="/a.csv")
    second = table.submission("second", manifest="/b.csv")
    table.succeed(table.add(2, submission=first)[0])
    newer, older = reports.list_submissions(table.db)
    assert (newer.submission, newer.manifest, newer.counts) == (second, "/b.csv", {})
    assert (older.submission, older.manifest) == (first, "/a.csv")
    assert (older.counts, older.left) == ({"succeeded": 1, "queued": 1}, 1)
    assert newer.created_at.tzinfo is not None
    (only,) = reports.list_submissions(table.db, limit=1)
    assert only.submission == second


def test_errors_are_counted_per_message_the_most_frequent_first(table: JobTable) -> None:
    retried, second, third, fourth, fifth = table.add(5)
    fail(table, retried, OutOfMemory("full"))  # it runs again, and so has not failed
    fail(table, second, ImageError("b is not an image"))
    fail(table, third, ImageError("a is not an image"))
    fail(table, fourth, InpaintError("unexpected"))
    fail(table, fifth, ImageError("a is not an image"))
    assert reports.count_errors(table.db, None) == [
        ErrorCount(code="bad_image", message="a is not an image", count=2),
        ErrorCount(code="bad_image", message="b is not an image", count=1),
        ErrorCount(code="internal_error", message="unexpected", count=1),
    ]
    assert reports.count_errors(table.db, 99) == []


def test_a_history_holds_the_job_and_its_attempts_oldest_first(table: JobTable) -> None:
    job = table.add_one()
    fail(table, job, OutOfMemory("full"))
    table.succeed(job)
    history = reports.job_history(table.db, job)
    assert history is not None
    assert history.job["job"] == job
    assert [attempt["outcome"] for attempt in history.attempts] == ["retried", "succeeded"]
    assert [attempt["job"] for attempt in history.attempts] == [job, job]
    assert reports.job_history(table.db, job + 1) is None


def test_rows_name_the_job_the_submission_and_the_users_key(table: JobTable) -> None:
    job = table.add_one()
    (row,) = reports.list_jobs(table.db, Selection(), limit=None)
    assert (row["job"], row["submission"], row["key"]) == (job, 1, "sku-2")
    assert not {"id", "submission_id", "job_id"} & set(row)


def test_an_export_goes_through_every_page_in_order(table: JobTable) -> None:
    count = 2001
    submission = table.submission()
    rows = [new_job(line, content_key=b"%016d" % line) for line in range(count)]
    submissions.record(table.db, submission, rows)
    records = list(reports.export_jobs(table.db, Selection()))
    assert [record.line for record in records] == list(range(count))
    assert tuple(vars(records[0])) == reports.EXPORT_COLUMNS


def test_an_export_describes_the_last_attempt(table: JobTable) -> None:
    job = table.add_one()
    fail(table, job, OutOfMemory("full"))
    table.succeed(job, width=3, timings={"fetch": 1.0})
    (record,) = reports.export_jobs(table.db, Selection())
    assert (record.job, record.key) == (job, "sku-2")
    assert (record.state, record.attempts, record.width) == ("succeeded", 2, 3)
    assert record.worker == "w1"
    assert record.timings == {"fetch": 1.0}
    assert record.params["mode"] == "auto"
    assert datetime.fromisoformat(str(record.finished_at)).tzinfo is not None


def test_progress_names_the_errors_that_block_jobs(table: JobTable) -> None:
    failing, blocked, running = (table.run(job) for job in table.add(3))
    jobs.fail(table.db, failing, AttemptRecord(), StorageUnavailable("'/a.png': busy"), RETRY_LATER)
    disk_full = OutputRefused("'/b.png': No space left on device")
    jobs.record_blocked_reason(table.db, blocked, disk_full)
    jobs.record_blocked_reason(table.db, running, StorageUnavailable("'/c.png': busy"))
    progress = reports.measure_progress(table.db, 1)
    retrying_write, waiting = progress.blocked
    assert retrying_write.summary == "1 blocked, retrying"
    assert retrying_write.message == "'/b.png': No space left on device"
    assert waiting.code == "storage_unavailable"
    assert 20 < waiting.seconds <= 30
    assert waiting.summary.startswith("1 failed, next attempt in ")
    note = console.progress_note(progress)
    assert note.startswith("1 blocked, retrying (output_refused), 1 failed, next attempt in ")
    assert "No space left on device" in console.progress_line(progress)


def test_progress_counts_jobs_of_other_submissions_if_asked(table: JobTable) -> None:
    first, second, _ = table.add(3)
    table.succeed(second)
    other = table.submission("other")
    progress = reports.measure_progress(table.db, other, extra_jobs=[first, second])
    assert (progress.total, progress.left) == (2, 1)


def test_errors_of_jobs_of_other_submissions_are_counted_if_asked(table: JobTable) -> None:
    own, foreign = table.add(2)
    fail(table, own, ImageError("not an image"))
    fail(table, foreign, ImageError("not an image"))
    other = table.submission("other")
    assert reports.count_errors(table.db, other, extra_jobs=[foreign]) == [
        ErrorCount(code="bad_image", message="not an image", count=1)
    ]
