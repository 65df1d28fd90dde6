"""Everything at once: a random mixture of faults, and the same invariants at its end.

``make soak`` runs it for longer, with a seed of its own.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy

from tests import servers
from tests.conftest import Bucket
from tests.faults.http_proxy import Answer, FaultProxy
from tests.faults.site import PICTURES, Catalog, Site, pause
from tests.workers.fleet import Fleet

SECONDS = float(os.environ.get("FAULTS_SECONDS", "20"))
SEED = int(os.environ.get("FAULTS_SEED") or "1")
RETRIED = ("worker_lost", "storage_unavailable", "database_unavailable")


@dataclass
class World:
    """Everything that can break, and the chance that decides what does."""

    site: Site
    redis: servers.Redis
    postgres: servers.Postgres
    s3: FaultProxy
    chance: random.Random

    def kill_a_worker(self) -> None:
        self.site.kill_a_process(self.chance)

    def freeze_a_worker(self) -> None:
        children = self.site.fleet.children()
        if children:
            chosen = self.chance.choice(children)
            with suppress(ProcessLookupError):
                os.kill(chosen, signal.SIGSTOP)
                pause(self.chance.uniform(0, 3))
                os.kill(chosen, signal.SIGCONT)

    def replace_a_launcher(self) -> None:
        launcher = self.chance.choice(self.launchers())
        launcher.send_signal(self.chance.choice((signal.SIGTERM, signal.SIGKILL)))

    def launchers(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.site.fleet.processes if process.poll() is None]

    def keep_two_launchers(self) -> None:
        """As a service manager does: one that starts while PostgreSQL is away ends at once."""
        for _ in range(2 - len(self.launchers())):
            self.site.fleet.start("--concurrency", "2")

    def crash_redis(self) -> None:
        self.redis.kill()
        pause(self.chance.uniform(0, 1))
        self.redis.start(keep_data=self.chance.random() < 0.5)

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis.url) as client:
            client.flushall()

    def make_redis_a_replica(self) -> None:
        with redis.Redis.from_url(self.redis.url) as client:
            client.replicaof("127.0.0.1", "1")
            pause(self.chance.uniform(0, 2))
            client.replicaof("NO", "ONE")

    def restart_postgresql(self) -> None:
        self.postgres.stop()
        pause(self.chance.uniform(0, 1))
        self.postgres.start()

    def cut_connections(self) -> None:
        plain = sqlalchemy.make_url(self.postgres.url).set(drivername="postgresql")
        with psycopg.connect(plain.render_as_string(), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'inpaint' AND random() < 0.5"
            )

    def disturb_s3(self) -> None:
        answer = self.chance.choice(
            (
                Answer(status=503, code="SlowDown"),
                Answer(part=0.5),
                Answer(part=0.5, reset=True),
                Answer(part=0, reset=True),
                Answer(silent_seconds=1),
            )
        )
        share = self.chance.uniform(0.1, 0.5)
        self.s3.set(lambda _request: answer if self.chance.random() < share else None)
        pause(self.chance.uniform(0, 1))

    def leave_s3_alone(self) -> None:
        self.s3.set(None)

    def faults(self) -> list[Callable[[], None]]:
        return [
            *(self.kill_a_worker, self.freeze_a_worker, self.replace_a_launcher),
            *(self.crash_redis, self.flush_redis, self.make_redis_a_replica),
            *(self.restart_postgresql, self.cut_connections),
            *(self.disturb_s3, self.leave_s3_alone),
        ]


@pytest.fixture
def world(
    catalog: Catalog, s3: Bucket, own_redis: servers.Redis, tmp_path: Path
) -> Iterator[World]:
    for number in range(PICTURES):
        for path in (catalog.image(number), catalog.mask(number)):
            s3.client.upload_file(path, s3.name, f"in/{Path(path).name}")
    with (
        tempfile.TemporaryDirectory(prefix="t-") as name,
        servers.postgres_server(Path(name).resolve()) as postgres,
        FaultProxy(str(s3.client.meta.endpoint_url)).serving() as proxy,
    ):
        url = servers.create_database(postgres.url)
        fleet = Fleet(url, own_redis.url, tmp_path.resolve())
        site = Site(fleet=fleet, catalog=catalog, inputs=s3.uri("in"), outputs=s3.uri("out"))
        fleet.environment |= {
            "AWS_ENDPOINT_URL": proxy.url,
            "FAULTS_S3_TIMEOUT": "0.5",
            "INPAINT_MAX_FAILURES": "20",
        }
        chance = random.Random(SEED)
        yield World(site=site, redis=own_redis, postgres=postgres, s3=proxy, chance=chance)
        fleet.close()


def test_a_random_mixture_of_faults_loses_and_doubles_nothing(world: World) -> None:
    print(f"FAULTS_SEED={SEED} FAULTS_SECONDS={SECONDS:g}")
    site, met = world.site, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if site.count("pending", "queued") < 20:
            site.add(40)
        world.keep_two_launchers()
        world.chance.choice(world.faults())()
        pause(world.chance.uniform(0, 1))
        met += 1
    world.leave_s3_alone()
    world.keep_two_launchers()
    site.finish(seconds=150, retry=RETRIED)
    print(f"{met} faults, {len(site.expected)} jobs")
    site.check()
