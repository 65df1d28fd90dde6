"""When a lease counts as abandoned."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from shared.jobs import FencingToken, RunningLease
from workers.lease_watch import LeaseWatch

TOKEN = FencingToken(job=1, attempt=1)
EXPIRES = datetime(2026, 1, 1, tzinfo=UTC)


def lease(renewals: int = 0) -> RunningLease:
    return RunningLease(token=TOKEN, expires_at=EXPIRES + timedelta(seconds=renewals))


def watch() -> LeaseWatch:
    return LeaseWatch(lease_seconds=60, max_gap_seconds=4)


def test_a_lease_is_abandoned_after_it_was_watched_for_its_length_without_a_renewal() -> None:
    watching = watch()
    found = [watching.abandoned([lease()], now=float(second)) for second in range(1000, 1063, 2)]
    assert found == [[]] * 30 + [[TOKEN]] * 2


def test_a_lease_that_is_renewed_is_never_abandoned() -> None:
    watching = watch()
    for second in range(0, 600, 2):
        assert watching.abandoned([lease(renewals=second // 15)], now=float(second)) == []


def test_an_outage_or_a_suspension_counts_as_one_short_gap() -> None:
    watching = watch()
    for now in (0.0, 2.0, 4000.0, 8000.0):
        assert watching.abandoned([lease()], now=now) == []


def test_another_attempt_of_the_job_is_watched_from_its_start() -> None:
    watching = watch()
    for second in range(0, 58, 2):
        watching.abandoned([lease()], now=float(second))
    again = RunningLease(token=FencingToken(job=1, attempt=2), expires_at=EXPIRES)
    assert watching.abandoned([again], now=60.0) == []
