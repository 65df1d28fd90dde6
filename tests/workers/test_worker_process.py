"""A worker process: when it ends by itself, and what it logs."""

from __future__ import annotations

import logging

import pytest

from shared.errors import EngineError, InpaintError, MaskError, PostprocessError
from workers import worker_process
from workers.worker_process import FAILURES_OF_A_DEVICE, Health

BROKEN = EngineError("the device does not answer")


def ends(*outcomes: tuple[int, InpaintError | None]) -> bool:
    health = Health("cpu")
    return any(health.note(job, ended) for job, ended in outcomes)


def test_a_device_that_fails_one_job_after_another_takes_no_more() -> None:
    failures = [(job, BROKEN) for job in range(FAILURES_OF_A_DEVICE)]
    assert ends(*failures)
    assert not ends(*failures[1:], (99, None), failures[0])


def test_one_job_that_fails_again_and_again_says_nothing_about_the_device() -> None:
    assert not ends(*[(7, BROKEN)] * 20)


@pytest.mark.parametrize("error", [PostprocessError("no weights"), MaskError("empty")])
def test_nor_do_plugins_and_pictures(error: InpaintError) -> None:
    assert not ends(*[(job, error) for job in range(20)])


@pytest.mark.parametrize(
    ("logger", "told"),
    [("celery.worker.consumer", False), ("celery.bootsteps", False), ("workers.job_runner", True)],
)
def test_a_broker_that_fails_is_a_line_and_our_own_defects_keep_their_traceback(
    logger: str, told: bool
) -> None:
    error = ConnectionError("gone")
    raised = (ConnectionError, error, None)
    record = logging.LogRecord(logger, logging.ERROR, "", 1, "Error on stopping Hub", (), raised)
    assert worker_process._without_celery_s_traceback(record)
    assert bool(record.exc_info) is told
