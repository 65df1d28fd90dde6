"""The watchdog of a worker process; tests/faults/test_workers.py freezes a real one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.workers.fleet import wait_for
from workers.watchdog import CHECKS_PER_LIMIT, Watchdog, start_pings

LIMIT = 10.0


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog(LIMIT)
    yield watchdog
    watchdog.close_writer()
    watchdog.close()


def ping(watchdog: Watchdog) -> None:
    os.write(watchdog.writer, b".")


def checks_until_expired(watchdog: Watchdog, *, every: float) -> int:
    """How many checks, so many seconds apart, the watchdog needs without a ping."""
    checks = 1
    while not watchdog.is_expired(checks * every):
        checks += 1
        assert checks < 1000
    return checks


def test_it_expires_one_limit_after_the_last_ping(watchdog: Watchdog) -> None:
    for second in range(100):
        ping(watchdog)
        assert not watchdog.is_expired(second)
    assert [second for second in range(100, 112) if watchdog.is_expired(second)] == [109, 110, 111]


def test_it_never_expires_before_the_first_ping(watchdog: Watchdog) -> None:
    assert not any(watchdog.is_expired(second) for second in range(0, 3600, 5))


def test_the_time_in_which_the_supervisor_itself_did_not_run_counts_little(
    watchdog: Watchdog,
) -> None:
    ping(watchdog)
    assert not watchdog.is_expired(0)
    assert not watchdog.is_expired(10_000)
    ping(watchdog)
    assert checks_until_expired(watchdog, every=1000) >= CHECKS_PER_LIMIT


def test_pings_come_without_anybody_s_help(watchdog: Watchdog) -> None:
    # A copy: the thread writes to it until this process ends.
    start_pings(os.dup(watchdog.writer), limit_seconds=0.1)
    for _ in range(3):
        wait_for(lambda: bool(watchdog._read_pings()))
