"""Only the database's clock counts."""

from __future__ import annotations

import pytest

from tests.faults.site import Site


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_worker_whose_clock_is_ten_minutes_off_changes_nothing(site: Site, seconds: int) -> None:
    site.add(60)
    site.fleet.start("--concurrency", "2")
    site.fleet.environment["FAULTS_CLOCK"] = str(seconds)
    site.fleet.start("--concurrency", "2")
    site.finish()
    workers = set()
    for job in site.expected:
        (attempt,) = site.fleet.bench.attempts(job)
        assert attempt.outcome == "succeeded"
        assert abs((attempt.finished_at - site.fleet.bench.job(job).created_at).seconds) < 300
        workers.add(attempt.worker)
    assert len(workers) == 2
    site.check()
