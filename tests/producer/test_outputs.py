"""One output has one job: which job may take it over, and what happens to its former job."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Barrier

import pytest
from sqlalchemy import func, select

from shared import jobs
from shared.db import Database
from shared.db.models import Job
from shared.errors import InputError, LeaseLost
from shared.jobs import Selection, submissions
from shared.jobs.ownership import owns_output
from shared.jobs.submissions import NewJob
from tests.job_table import JobTable, new_job
from tests.producer.workspace import Workspace

COLUMNS = ("image", "mask", "output")


def manifest(workspace: Workspace, name: str, *, image: str = "1") -> str:
    workspace.catalog(2)
    row = (f"in/{image}.png", f"masks/{image}.png", "same.png")
    workspace.manifest([row], columns=COLUMNS, name=name)
    return name


def test_an_output_of_another_job_is_refused_and_that_job_named(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    result = workspace.submit(manifest(workspace, "b.csv", image="2"), "--output", "out")
    assert result.status == 2
    assert "line 2: output: " in result.err
    assert "is written by job 1 (submission 1)" in result.err
    assert "--force" in result.err
    assert len(table.states()) == 1


def test_skip_invalid_submits_the_rows_whose_output_is_free(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    rows = [("in/2.png", "masks/2.png", "same.png"), ("in/2.png", "masks/2.png", "other.png")]
    workspace.manifest(rows, columns=COLUMNS, name="b.csv")
    result = workspace.submit("b.csv", "--output", "out", "--skip-invalid")
    assert result.status == 0
    assert "1 accepted, 1 invalid and skipped" in result.out
    assert len(table.states()) == 2


def test_force_takes_over_the_output_and_marks_the_job_that_owned_it(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    table.succeed(1)
    assert (
        workspace.submit(
            manifest(workspace, "b.csv", image="2"), "--output", "out", "--force"
        ).status
        == 0
    )
    old = table.job(1)
    assert (old.state, old.error_code) == ("succeeded", "output_replaced")
    assert old.error_message == "submission 2 now writes this output"
    assert table.state(2) == "queued"


def test_force_cancels_a_job_that_would_still_write_there(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    workspace.submit(manifest(workspace, "b.csv", image="2"), "--output", "out", "--force")
    assert (table.state(1), table.job(1).error_code) == ("cancelled", "output_replaced")


def test_a_job_that_lost_its_output_is_not_retried_and_force_takes_it_back(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    workspace.submit(manifest(workspace, "b.csv", image="2"), "--output", "out", "--force")
    result = workspace.jobs("retry", 1)
    assert "0 jobs to run again" in result.out
    assert "1 skipped: a later submission writes their output" in result.err
    assert workspace.submit("a.csv", "--output", "out").status == 0  # nothing of it would run
    assert table.state(1) == "cancelled"
    workspace.submit("a.csv", "--output", "out", "--force")
    assert (table.state(1), table.state(2)) == ("queued", "cancelled")


def test_a_failed_job_s_output_is_free(workspace: Workspace, table: JobTable) -> None:
    workspace.submit(manifest(workspace, "a.csv"), "--output", "out")
    table.cancel(1)
    assert workspace.submit(manifest(workspace, "b.csv", image="2"), "--output", "out").status == 0


def test_of_two_producers_only_one_gets_an_output(db: Database) -> None:
    table = JobTable(db)
    owners = [table.submission(digest) for digest in ("a", "b")]
    together = Barrier(2)

    def record(owner: int) -> str:
        row = new_job(1, image=f"/images/{owner}.png", output="/results/same.png")
        together.wait()
        try:
            assert submissions.record(db, owner, [row]) == []
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        first, second = sorted(pool.map(record, owners))
    assert first == ""
    assert "line 1: output: '/results/same.png' is written by job 1 " in second


def owners(db: Database) -> list[int]:
    """How many jobs own each output, by the definition of the constraint."""
    with db.read() as connection:
        counted = select(func.count()).where(owns_output(Job)).group_by(Job.output)
        return list(connection.execute(counted).scalars())


def test_of_two_forces_at_once_each_output_has_one_owner(db: Database) -> None:
    """The transactions of two producers, ten times; none may fail either."""
    table = JobTable(db)
    outputs = [f"/results/{n}.png" for n in range(1, 21)]
    manifests = [
        (
            table.submission(mask),
            [new_job(n, mask=mask, output=output) for n, output in enumerate(outputs, start=1)],
        )
        for mask in ("alpha", "/masks/a.png")
    ]
    together = Barrier(2)

    def force(manifest: tuple[int, list[NewJob]]) -> None:
        submission, rows = manifest
        together.wait()
        existing = submissions.record(db, submission, rows, replace=True)
        lines = {row.content_key: row.line for row in existing}
        jobs.reopen_by_content_key(db, submission, lines, replace=True)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            list(pool.map(force, manifests))
            assert owners(db) == [1] * len(outputs)
            jobs.cancel(db, Selection())


def test_of_two_retries_at_once_one_gets_the_output(db: Database) -> None:
    table = JobTable(db)
    first = table.add_one(output="/results/a.png")
    table.cancel(first)
    second = table.add_one(output="/results/a.png", mask="alpha")
    together = Barrier(2)

    def retry(job: int) -> int:
        together.wait()
        return table.retry(job).count

    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            jobs.cancel(db, Selection())
            assert sorted(pool.map(retry, (first, second))) == [0, 1]
            assert owners(db) == [1]


def test_force_takes_back_an_output_whose_job_still_runs(db: Database) -> None:
    """The first job lost its output while it ran; its worker has not stopped yet."""
    table = JobTable(db)
    submission = table.submission("first")
    job = table.add_one(submission=submission, output="/results/a.png")
    leased = table.run(job)
    other = table.submission("second")
    rival = new_job(9, output="/results/a.png", mask="alpha")
    assert submissions.record(db, other, [rival], replace=True) == []
    lines = {table.job(job).content_key: table.job(job).line}
    assert jobs.reopen_by_content_key(db, submission, lines, replace=True) == 1
    assert table.states() == ["pending", "cancelled"]
    assert [attempt.outcome for attempt in table.attempts(job)] == ["cancelled"]
    with pytest.raises(LeaseLost):
        jobs.renew_lease(db, leased, lease_seconds=60)


SLOW_INSERTS = """
CREATE FUNCTION slow_insert() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END';
CREATE TRIGGER slow_insert BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION slow_insert()
"""


@contextmanager
def slow_inserts(db: Database) -> Iterator[None]:
    """Slow PostgreSQL down, so that two producers insert their rows at the same time."""
    if db.is_sqlite:
        yield
        return
    with db.write() as connection:
        connection.exec_driver_sql(SLOW_INSERTS)
    try:
        yield
    finally:
        with db.write() as connection:
            connection.exec_driver_sql("DROP FUNCTION slow_insert CASCADE")


def test_producers_with_the_same_rows_in_opposite_order_do_not_deadlock(db: Database) -> None:
    table = JobTable(db)
    owners = [table.submission(digest) for digest in ("a", "b")]
    rows = [new_job(line) for line in range(1, 201)]
    turned = [replace(row, line=201 - row.line) for row in rows[::-1]]
    together = Barrier(2)

    def record(owner: int, rows: list[NewJob]) -> int:
        together.wait()
        return len(rows) - len(submissions.record(db, owner, rows))

    with slow_inserts(db), ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(record, owners, (rows, turned))) == len(rows)


def test_force_runs_a_row_whose_job_was_changed_since(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.catalog(2)
    workspace.submit("m.csv")
    table.succeed(1)
    workspace.jobs("retry", 1, "--set", "opencv_radius=9")
    table.succeed(1)
    assert '"opencv_radius":9' in table.job(1).params
    assert "2 already recorded" in workspace.submit("m.csv").out
    table.succeed(2)
    assert "2 accepted" in workspace.submit("m.csv", "--force").out
    assert '"opencv_radius":5' in table.job(1).params
    assert table.states() == ["queued", "queued"]
    # And again the row and the job are the same work.
    assert "2 already recorded" in workspace.submit("m.csv").out


def test_a_row_of_an_earlier_submission_counts_as_still_to_run(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.catalog(3)
    workspace.submit("m.csv", "--output", "out")
    workspace.manifest([("in/2.png", "masks/2.png"), ("in/1.png", "masks/1.png")], name="b.csv")
    result = workspace.submit("b.csv", "--output", "out")
    assert "0 accepted, 2 already recorded" in result.out
    assert "2 still to run" in result.out
