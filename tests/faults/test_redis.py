"""Redis that dies, forgets, hangs or turns into a replica under the workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests import servers
from tests.faults.site import Catalog, Site, pause
from tests.workers.fleet import Fleet


@pytest.fixture
def redis_site(
    catalog: Catalog, postgres_url: str, own_redis: servers.Redis, tmp_path: Path
) -> Iterator[Site]:
    fleet = Fleet(postgres_url, own_redis.url, tmp_path.resolve())
    site = Site(fleet=fleet, catalog=catalog)
    fleet.start("--concurrency", "2")
    yield site
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
    """Longer than a lease: heartbeats may not wait for Redis."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    pause(3)
    os.kill(server.process.pid, signal.SIGCONT)


def stay_away(server: servers.Redis) -> None:
    server.kill()
    pause(3)
    server.start()


def become_a_replica(server: servers.Redis) -> None:
    """As in a failover: every write is refused until it is a master again."""
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", "1")
        pause(2)
        client.replicaof("NO", "ONE")


FAULTS = (crash, crash_and_lose_everything, flush, hang, stay_away, become_a_replica)


def test_whatever_happens_to_redis_every_job_ends_well(
    redis_site: Site, own_redis: servers.Redis
) -> None:
    site = redis_site
    for fault in FAULTS:
        site.add(60, prompt="steps 4")
        site.await_some(len(site.expected) - 50)
        fault(own_redis)
        site.finish()
    assert "lost" not in {
        attempt.outcome for job in site.expected for attempt in site.fleet.harness.attempts(job)
    }
    site.check()
