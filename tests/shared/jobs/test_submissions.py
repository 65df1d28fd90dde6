"""Recording: one submission per digest, one job per content key, also for concurrent producers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from shared.jobs.submissions import OpenedSubmission, close_submission, open_submission, record
from shared.params import Params
from tests.job_table import JobTable, new_job


def test_the_same_digest_opens_the_same_submission(table: JobTable) -> None:
    def opened() -> OpenedSubmission:
        return open_submission(
            table.db, manifest="/m.csv", digest="d", options="{}", rows=2, invalid=0
        )

    first, second = opened(), opened()
    assert first.id == second.id
    assert (first.resumed, second.resumed, second.interrupted) == (False, True, True)
    close_submission(table.db, first.id)
    recorded = table.submissions()[0].recorded_at
    assert (opened().resumed, opened().interrupted) == (True, False)
    close_submission(table.db, first.id)
    assert table.submissions()[0].recorded_at == recorded


def test_concurrent_producers_open_one_submission_and_record_each_row_once(table: JobTable) -> None:
    rows = [new_job(line) for line in range(2, 202)]
    barrier = Barrier(4)

    def submit(_: int) -> int:
        barrier.wait()
        submission = table.submission("same")
        return sum(
            len(chunk) - len(record(table.db, submission, chunk))
            for chunk in (rows[:100], rows[100:])
        )

    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(submit, range(4)))
    assert sum(added) == 200
    assert len(table.states()) == 200
    assert len(table.submissions()) == 1


def test_record_returns_the_rows_that_have_a_job_already(table: JobTable) -> None:
    submission = table.submission()
    rows = [new_job(line) for line in range(2, 6)]
    assert record(table.db, submission, rows[:2]) == []
    assert record(table.db, submission, rows) == rows[:2]
    twins = [new_job(9, image="/x"), new_job(10, image="/x", content_key=b"twin")]
    twins[0] = new_job(9, image="/x", content_key=b"twin")
    assert record(table.db, submission, twins) == [twins[1]]
    assert record(table.db, submission, []) == []


def test_a_job_has_the_values_of_its_row(table: JobTable) -> None:
    row = new_job(
        7,
        key='a "quoted"\tsku,\n画 \\N \\.',
        image="/images/ä\\ 1.png",
        mask="box:1,2,3,4",
        params=Params(prompt="été, \\t {x}", seed=2**63 - 1),
        priority=-1000,
    )
    submission = table.submission()
    assert record(table.db, submission, [row, new_job(8, key=None)]) == []
    job = table.job(1)
    for name in row.__dataclass_fields__:
        assert getattr(job, name) == getattr(row, name)
    assert job.submission_id == submission
    assert table.job(2).key is None


def test_the_same_work_in_another_submission_is_not_recorded_again(table: JobTable) -> None:
    row = new_job(2)
    assert record(table.db, table.submission("first"), [row]) == []
    assert record(table.db, table.submission("second"), [row]) == [row]
    assert table.job(1).submission_id == 1
