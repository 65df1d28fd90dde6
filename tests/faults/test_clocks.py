"""Only the clock of the database matters, and it may jump."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.faults.scenario import Scenario, pause
from tests.workers.fleet import wait_for


def test_workers_whose_clocks_are_ten_minutes_off_behave_normally(scenario: Scenario) -> None:
    scenario.add(60)
    for seconds in (-600, 0, 600):
        scenario.fleet.environment["FAULTS_CLOCK"] = str(seconds)
        scenario.fleet.start("--concurrency", "1")
    scenario.finish()
    workers = set()
    for job in scenario.expected:
        (attempt,) = scenario.fleet.harness.attempts(job)
        assert attempt.outcome == "succeeded"
        waited = attempt.finished_at - scenario.fleet.harness.job(job).created_at
        assert abs(waited.total_seconds()) < 300
        workers.add(attempt.worker)
    assert len(workers) == 3
    scenario.assert_invariants()


# Found before PostgreSQL's own function, through the search path of new connections.
JUMPING_CLOCK = """
CREATE SCHEMA faults;
CREATE TABLE faults.jump (seconds integer);
INSERT INTO faults.jump VALUES (0);
CREATE FUNCTION faults.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT pg_catalog.statement_timestamp() + seconds * interval '1 second' FROM faults.jump $$;
"""


def test_no_lease_is_lost_when_the_clock_of_the_database_jumps(scenario: Scenario) -> None:
    url = scenario.db.url
    with scenario.db.write() as connection:
        connection.exec_driver_sql(JUMPING_CLOCK)
        path = "faults, pg_catalog, public"
        connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" SET search_path = {path}')
    scenario.add(60, prompt="steps 60")
    lost, _ = (scenario.fleet.start("--concurrency", "2") for _ in range(2))
    scenario.wait_for_successes(4)
    for _ in range(4):
        with scenario.db.write() as connection:
            connection.exec_driver_sql("UPDATE faults.jump SET seconds = seconds + 600")
        pause(0.7)  # several rounds of reaping, a heartbeat each
    assert [row.attempt for row in _running_or_done(scenario) if row.attempt > 1] == []
    _kill_with_worker(scenario, lost.pid)
    scenario.finish()
    rows = _running_or_done(scenario)
    assert sorted({row.attempt for row in rows}) == [1, 2]
    assert 1 <= sum(row.losses for row in rows) <= 2  # the jobs of the killed worker
    scenario.assert_invariants()


def _running_or_done(scenario: Scenario) -> list[Any]:
    return [scenario.fleet.harness.job(job) for job in scenario.expected]


def _kill_with_worker(scenario: Scenario, supervisor: int) -> None:
    """Kills the first supervisor and its worker while that runs two jobs; nobody sees them exit."""
    wait_for(lambda: scenario.count("running") == 4)
    os.kill(supervisor, signal.SIGSTOP)
    os.kill(scenario.fleet.children()[0], signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
