"""Invariants of the tables, and their equality with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.db.models import FINAL_STATES, STATES
from tests.shared.job_machine.model import ModelJob

Rows = Sequence[Any]
Model = Mapping[int, ModelJob]


def check(rows: Rows, attempts: Rows, model: Model) -> None:
    """rows: of the jobs table; attempts: of the attempts table."""
    the_tables_equal_the_model(rows, model)
    every_recorded_row_is_one_job_in_one_state(rows, model)
    an_output_has_at_most_one_owner(model)
    only_a_running_job_has_an_open_attempt(attempts, model)
    a_result_is_recorded_once_by_its_attempt(rows, attempts, model)


def the_tables_equal_the_model(rows: Rows, model: Model) -> None:
    actual = {
        row.id: (
            *(row.submission_id, row.line, row.content_key, row.seed, row.state, row.attempt),
            *(row.failures, row.losses, row.cancel_requested, row.worker, row.error_code),
        )
        for row in rows
    }
    assert actual == {
        job.id: (
            *(job.submission, job.line, job.key, job.seed, job.state, job.attempt),
            *(job.failures, job.losses, job.cancel_requested, job.worker, job.error),
        )
        for job in model.values()
    }


def every_recorded_row_is_one_job_in_one_state(rows: Rows, model: Model) -> None:
    assert len(rows) == len({row.content_key for row in rows}) == len(model)
    for row in rows:
        assert row.state in STATES
        assert (row.state == "running") == (row.worker is not None)
        assert (row.state == "running") == (row.lease_expires_at is not None)
        assert (row.state in FINAL_STATES) == (row.finished_at is not None)
        assert row.state != "failed" or row.error_code


def an_output_has_at_most_one_owner(model: Model) -> None:
    for output in {job.row.output for job in model.values()}:
        owners = [job for job in model.values() if job.owns(output)]
        assert len(owners) <= 1, owners


def only_a_running_job_has_an_open_attempt(attempts: Rows, model: Model) -> None:
    outcomes: dict[int, dict[int, str | None]] = {job_id: {} for job_id in model}
    for row in attempts:
        outcomes[row.job_id][row.attempt] = row.outcome
        assert (row.outcome is None) == (row.finished_at is None)
        assert row.finished_at is None or row.started_at <= row.finished_at
    for job_id, recorded in outcomes.items():
        job = model[job_id]
        assert recorded == dict(enumerate(job.outcomes, start=1))
        still_open = [number for number, outcome in recorded.items() if outcome is None]
        assert still_open == ([job.attempt] if job.state == "running" else [])


def a_result_is_recorded_once_by_its_attempt(rows: Rows, attempts: Rows, model: Model) -> None:
    results: dict[int, list[str]] = {job_id: [] for job_id in model}
    for row in sorted(attempts, key=lambda row: row.attempt):
        assert (row.result_sha256 is not None) == (row.outcome == "succeeded")
        if row.result_sha256:
            results[row.job_id].append(row.result_sha256)
    assert results == {job_id: job.results for job_id, job in model.items()}
    for row in rows:
        assert row.result_sha256 == (results[row.id][-1] if results[row.id] else None)
