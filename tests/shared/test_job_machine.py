"""The job state machine under random events, on both databases.

``make soak`` runs it for many minutes, by ``pytest --hypothesis-profile=soak``.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from shared.db import Database
from tests.shared.job_machine.machine import JobMachine


@pytest.mark.timeout(0)
def test_no_order_of_events_loses_or_duplicates_a_job(
    db: Database, request: pytest.FixtureRequest
) -> None:
    is_soak = request.config.getoption("--hypothesis-profile") == "soak"
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: JobMachine(db),
        settings=settings(
            max_examples=500 if is_soak else 16,
            stateful_step_count=100 if is_soak else 60,
            # Shrinking a failure takes minutes: each step is a transaction.
            phases=tuple(Phase) if is_soak else (Phase.generate,),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
