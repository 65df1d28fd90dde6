"""What holds of the tables at any time, and that they are what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.db.models import FINAL_STATES, STATES
from tests.shared.job_machine.model import Expected

Rows = Sequence[Any]
Model = Mapping[int, Expected]


def check(rows: Rows, attempts: Rows, model: Model) -> None:
    """rows: of the table of jobs."""
    the_tables_are_what_the_model_says(rows, model)
    every_accepted_row_is_one_job_in_one_state(rows, model)
    an_output_has_one_owner_at_most(model)
    only_a_running_job_has_an_open_attempt(attempts, model)
    a_result_is_recorded_once_by_the_attempt_that_made_it(rows, attempts, model)


def the_tables_are_what_the_model_says(rows: Rows, model: Model) -> None:
    found = {
        row.id: (
            *(row.submission_id, row.line, row.content_key, row.seed, row.state, row.attempt),
            *(row.failures, row.losses, row.cancel_requested, row.worker, row.error_code),
        )
        for row in rows
    }
    assert found == {
        one.id: (
            *(one.submission, one.line, one.key, one.seed, one.state, one.attempt),
            *(one.failures, one.losses, one.cancelling, one.worker, one.error),
        )
        for one in model.values()
    }


def every_accepted_row_is_one_job_in_one_state(rows: Rows, model: Model) -> None:
    assert len(rows) == len({row.content_key for row in rows}) == len(model)
    for row in rows:
        assert row.state in STATES
        assert (row.state == "running") == (row.worker is not None)
        assert (row.state == "running") == (row.lease_expires_at is not None)
        assert (row.state in FINAL_STATES) == (row.finished_at is not None)
        assert row.state != "failed" or row.error_code


def an_output_has_one_owner_at_most(model: Model) -> None:
    """Besides one that still runs and was told to stop."""
    for output in {one.row.output for one in model.values()}:
        owners = [one for one in model.values() if one.owns(output)]
        assert sum(one.error != "output_replaced" for one in owners) <= 1, owners


def only_a_running_job_has_an_open_attempt(attempts: Rows, model: Model) -> None:
    outcomes: dict[int, dict[int, str | None]] = {job: {} for job in model}
    for row in attempts:
        outcomes[row.job_id][row.attempt] = row.outcome
        assert (row.outcome is None) == (row.finished_at is None)
        assert row.finished_at is None or row.started_at <= row.finished_at
    for job, found in outcomes.items():
        one = model[job]
        assert found == dict(enumerate(one.outcomes, start=1))
        still_open = [number for number, outcome in found.items() if outcome is None]
        assert still_open == ([one.attempt] if one.state == "running" else [])


def a_result_is_recorded_once_by_the_attempt_that_made_it(
    rows: Rows, attempts: Rows, model: Model
) -> None:
    made: dict[int, list[str]] = {job: [] for job in model}
    for row in sorted(attempts, key=lambda row: row.attempt):
        assert (row.result_sha256 is not None) == (row.outcome == "succeeded")
        if row.result_sha256:
            made[row.job_id].append(row.result_sha256)
    assert made == {job: one.results for job, one in model.items()}
    for row in rows:
        assert row.result_sha256 == (made[row.id][-1] if made[row.id] else None)
