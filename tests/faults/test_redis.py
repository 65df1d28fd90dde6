"""Redis that crashes, loses its data, hangs or becomes a replica while workers run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests import servers
from tests.faults.scenario import Catalog, Scenario, pause
from tests.workers.fleet import Fleet


@pytest.fixture
def redis_scenario(
    catalog: Catalog, postgres_url: str, own_redis: servers.Redis, tmp_path: Path
) -> Iterator[Scenario]:
    fleet = Fleet(postgres_url, own_redis.url, tmp_path.resolve())
    scenario = Scenario(fleet=fleet, catalog=catalog)
    fleet.start("--concurrency", "2")
    yield scenario
    fleet.close()


def crash(server: servers.Redis) -> None:
    server.kill()
    server.start()


def crash_and_lose_everything(server: servers.Redis) -> None:
    server.kill()
    server.start(keep_data=False)


def flush(server: servers.Redis) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()


def hang(server: servers.Redis) -> None:
    """For longer than a lease: heartbeats must not wait for Redis."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    pause(3)
    os.kill(server.process.pid, signal.SIGCONT)


def stay_down(server: servers.Redis) -> None:
    server.kill()
    pause(3)
    server.start()


def become_a_replica(server: servers.Redis) -> None:
    """As in a failover: Redis refuses every write until it is a master again."""
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", "1")
        pause(2)
        client.replicaof("NO", "ONE")


FAULTS = (crash, crash_and_lose_everything, flush, hang, stay_down, become_a_replica)


def test_every_job_succeeds_after_each_fault_of_redis(
    redis_scenario: Scenario, own_redis: servers.Redis
) -> None:
    scenario = redis_scenario
    for fault in FAULTS:
        scenario.add(60, prompt="steps 4")
        scenario.wait_for_successes(len(scenario.expected) - 50)
        fault(own_redis)
        scenario.finish()
    assert "lost" not in {
        attempt.outcome
        for job in scenario.expected
        for attempt in scenario.fleet.harness.attempts(job)
    }
    scenario.assert_invariants()
