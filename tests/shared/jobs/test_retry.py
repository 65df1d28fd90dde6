"""Delays grow, are spread, are capped, and end."""

from __future__ import annotations

import random

from shared.jobs.retry import RetryPolicy
from tests.job_table import UpperBound


def test_the_longest_delay_doubles_up_to_the_cap() -> None:
    policy = RetryPolicy(max_failures=9, base_seconds=30, cap_seconds=900, random=UpperBound())
    delays = [policy.delay_seconds(failures) for failures in range(1, 9)]
    assert delays == [30, 60, 120, 240, 480, 900, 900, 900]


def test_delays_are_spread_from_zero_to_the_longest() -> None:
    policy = RetryPolicy(random=random.Random(1))
    delays = [policy.delay_seconds(2) or 0 for _ in range(1000)]
    assert 0 <= min(delays) < 3
    assert 57 < max(delays) <= 60
    assert 27 < sum(delays) / len(delays) < 33


def test_the_last_failure_is_not_retried() -> None:
    policy = RetryPolicy(max_failures=3)
    assert policy.delay_seconds(2) is not None
    assert policy.delay_seconds(3) is policy.delay_seconds(4) is None
    assert RetryPolicy(max_failures=1).delay_seconds(1) is None


def test_many_failures_do_not_overflow() -> None:
    policy = RetryPolicy(max_failures=10_000, random=UpperBound())
    assert policy.delay_seconds(100) == 900
