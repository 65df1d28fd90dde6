"""Old finished submissions are deleted, and nothing else is, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from shared import jobs
from shared.db.models import Job, Submission
from shared.errors import InputError, LeaseLost
from shared.jobs import AttemptRecord, pruning, submissions
from tests.job_table import JobTable, new_job


def finished(table: JobTable, digest: str, *, days: float, count: int = 1) -> tuple[int, list[int]]:
    """A submission whose jobs succeeded ``days`` ago, and their ids."""
    submission = table.submission(digest)
    ids = table.add(count, submission=submission)
    for job in ids:
        table.succeed(job)
    age(table, submission, days=days)
    return submission, ids


def age(table: JobTable, submission: int, *, days: float) -> None:
    past = datetime.now(UTC) - timedelta(days=days)
    with table.db.write() as connection:
        connection.execute(
            update(Submission).where(Submission.id == submission).values(created_at=past)
        )
        connection.execute(
            update(Job)
            .where(Job.submission_id == submission, Job.finished_at.is_not(None))
            .values(finished_at=past)
        )


def prune(table: JobTable, *, days: float = 90, submission: int | None = None) -> int:
    seconds = timedelta(days=days).total_seconds()
    chosen = jobs.find_prunable(table.db, older_than_seconds=seconds, submission=submission)
    return jobs.prune(table.db, chosen, older_than_seconds=seconds)


def test_jobs_that_finished_long_ago_are_deleted_with_their_attempts(table: JobTable) -> None:
    _, old = finished(table, "old", days=100, count=3)
    _, new = finished(table, "new", days=80, count=2)
    assert prune(table) == 3
    assert [row.digest for row in table.submissions()] == ["new"]
    assert [table.attempts(job) for job in old] == [[], [], []]
    assert all(table.attempts(job) for job in new)
    assert prune(table) == 0


def test_one_job_that_is_not_final_or_not_old_keeps_its_submission(table: JobTable) -> None:
    unfinished, ids = finished(table, "open", days=100, count=3)
    table.retry(ids[0])
    late, ids = finished(table, "late", days=100, count=3)
    table.set(ids[0], finished_at=datetime.now(UTC))
    finished(table, "newest", days=0)
    assert prune(table) == 0
    assert {row.id for row in table.submissions()} >= {unfinished, late}


def test_pruning_deletes_in_batches_and_can_be_limited_to_one_submission(
    table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "_JOBS_PER_TRANSACTION", 2)
    finished(table, "one", days=100, count=3)
    two, _ = finished(table, "two", days=100, count=5)
    finished(table, "newest", days=0)
    batches: list[int] = []
    seconds = timedelta(days=90).total_seconds()
    chosen = jobs.find_prunable(table.db, older_than_seconds=seconds, submission=two)
    assert [(prunable.submission, prunable.jobs) for prunable in chosen] == [(two, 5)]
    jobs.prune(table.db, chosen, older_than_seconds=seconds, progress=batches.append)
    assert batches == [2, 2, 1]
    assert [row.digest for row in table.submissions()] == ["one", "newest"]


def test_a_job_reopened_while_its_submission_is_pruned_is_kept(table: JobTable) -> None:
    submission, ids = finished(table, "old", days=100, count=3)
    finished(table, "newest", days=0)
    seconds = timedelta(days=90).total_seconds()
    chosen = jobs.find_prunable(table.db, older_than_seconds=seconds)
    table.retry(ids[1])
    assert jobs.prune(table.db, chosen, older_than_seconds=seconds) == 2
    assert table.state(ids[1]) == "pending"
    assert submission in {row.id for row in table.submissions()}


def test_an_id_is_never_reused_so_a_lost_worker_holds_no_lease_of_the_new_job(
    table: JobTable,
) -> None:
    job = table.add_one()
    lost = table.run(job)
    jobs.succeed(table.db, lost, AttemptRecord())
    age(table, table.submissions()[0].id, days=100)
    prune(table)
    again = table.add_one(submission=table.submission("again"))
    assert again != job
    leased = table.run(again)
    with pytest.raises(LeaseLost):
        jobs.succeed(table.db, lost, AttemptRecord())
    jobs.succeed(table.db, leased, AttemptRecord())


def test_a_pruned_manifest_can_be_submitted_again_but_not_continued(table: JobTable) -> None:
    old, (job,) = finished(table, "old", days=100)
    row = new_job(table.job(job).line)
    finished(table, "newest", days=0)
    prune(table)
    with pytest.raises(InputError, match="was pruned while its rows were recorded; submit again"):
        submissions.record(table.db, old, [row])
    assert submissions.record(table.db, table.submission("old"), [row]) == []
