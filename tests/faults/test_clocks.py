"""Only the clock of the database matters."""

from __future__ import annotations

from tests.faults.scenario import Scenario


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
