"""A worker process: which errors end it, and what it logs."""

from __future__ import annotations

import logging

import pytest

from shared.errors import EngineError, InpaintError, MaskError, PostprocessError
from workers import worker_process
from workers.worker_process import MAX_FAILED_JOBS, DeviceHealth

BROKEN = EngineError("the device does not answer")


def ends_the_process(*attempts: tuple[int, InpaintError | None]) -> bool:
    """attempts: each one's job and error."""
    health = DeviceHealth("cpu")
    return any(health.note(job, error) for job, error in attempts)


def test_a_device_that_fails_one_job_after_another_takes_no_more() -> None:
    failures = [(job, BROKEN) for job in range(MAX_FAILED_JOBS)]
    assert ends_the_process(*failures)
    assert not ends_the_process(*failures[1:], (99, None), failures[0])


def test_a_job_that_fails_repeatedly_is_no_fault_of_the_device() -> None:
    assert not ends_the_process(*[(7, BROKEN)] * 20)


@pytest.mark.parametrize("error", [PostprocessError("no weights"), MaskError("empty")])
def test_errors_of_plugins_and_masks_are_no_fault_of_the_device(error: InpaintError) -> None:
    assert not ends_the_process(*[(job, error) for job in range(20)])


@pytest.mark.parametrize(
    ("logger", "keeps_traceback"),
    [("celery.worker.consumer", False), ("celery.bootsteps", False), ("workers.job_runner", True)],
)
def test_a_lost_broker_is_logged_in_one_line_and_our_defects_keep_their_traceback(
    logger: str, keeps_traceback: bool
) -> None:
    error = ConnectionError("gone")
    exc_info = (ConnectionError, error, None)
    record = logging.LogRecord(logger, logging.ERROR, "", 1, "Error on stopping Hub", (), exc_info)
    assert worker_process._shorten_celery_record(record)
    assert bool(record.exc_info) is keeps_traceback
