"""Only the database's clock counts."""

from __future__ import annotations

from tests.faults.site import Site


def test_workers_whose_clocks_are_ten_minutes_off_change_nothing(site: Site) -> None:
    site.add(60)
    for seconds in (-600, 0, 600):
        site.fleet.environment["FAULTS_CLOCK"] = str(seconds)
        site.fleet.start("--concurrency", "1")
    site.finish()
    workers = set()
    for job in site.expected:
        (attempt,) = site.fleet.harness.attempts(job)
        assert attempt.outcome == "succeeded"
        waited = attempt.finished_at - site.fleet.harness.job(job).created_at
        assert abs(waited.total_seconds()) < 300
        workers.add(attempt.worker)
    assert len(workers) == 3
    site.check()
