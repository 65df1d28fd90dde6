"""A random mixture of all faults, with the same invariants at its end.

``make soak`` runs it for longer, with a random seed.
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

import psutil
import psycopg
import pytest
import redis
import sqlalchemy

from tests import servers
from tests.conftest import Bucket
from tests.faults.http_proxy import Answer, FaultProxy
from tests.faults.scenario import IMAGES, Catalog, Scenario, pause
from tests.workers.fleet import Fleet

SECONDS = float(os.environ.get("FAULTS_SECONDS", "20"))
SEED = int(os.environ.get("FAULTS_SEED") or "1")
RETRIED = ("worker_lost", "storage_unavailable", "database_unavailable")


@dataclass
class FaultInjector:
    """Everything that can fail. rng: chooses what does."""

    scenario: Scenario
    redis: servers.Redis
    postgres: servers.Postgres
    s3: FaultProxy
    rng: random.Random

    def kill_a_worker(self) -> None:
        self.scenario.kill_a_worker_process(self.rng)

    def freeze_a_worker(self) -> None:
        children = self.scenario.fleet.children()
        if children:
            chosen = self.rng.choice(children)
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                # Its supervisor would kill it, unless that is frozen too: then leases expire.
                frozen = [chosen, psutil.Process(chosen).ppid()][: self.rng.choice((1, 2))]
                self._signal(frozen, signal.SIGSTOP)
                pause(self.rng.uniform(0, 3))
                self._signal(frozen, signal.SIGCONT)

    def _signal(self, processes: list[int], number: signal.Signals) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def stop_a_supervisor(self) -> None:
        supervisor = self.rng.choice(self.supervisors())
        supervisor.send_signal(self.rng.choice((signal.SIGTERM, signal.SIGKILL)))

    def supervisors(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.scenario.fleet.processes if process.poll() is None]

    def keep_two_supervisors(self) -> None:
        """Restarts them, as a service manager does: without PostgreSQL one exits at its start."""
        for _ in range(2 - len(self.supervisors())):
            self.scenario.fleet.start("--concurrency", "2")

    def crash_redis(self) -> None:
        self.redis.kill()
        pause(self.rng.uniform(0, 1))
        self.redis.start(keep_data=self.rng.random() < 0.5)

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis.url) as client:
            client.flushall()

    def make_redis_a_replica(self) -> None:
        with redis.Redis.from_url(self.redis.url) as client:
            client.replicaof("127.0.0.1", "1")
            pause(self.rng.uniform(0, 2))
            client.replicaof("NO", "ONE")

    def restart_postgresql(self) -> None:
        self.postgres.stop()
        pause(self.rng.uniform(0, 1))
        self.postgres.start()

    def cut_connections(self) -> None:
        plain = sqlalchemy.make_url(self.postgres.url).set(drivername="postgresql")
        with psycopg.connect(plain.render_as_string(), autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'inpaint' AND random() < 0.5"
            )

    def disturb_s3(self) -> None:
        answer = self.rng.choice(
            (
                Answer(status=503, code="SlowDown"),
                Answer(part=0.5),
                Answer(part=0.5, reset=True),
                Answer(part=0, reset=True),
                Answer(silent_seconds=1),
            )
        )
        share = self.rng.uniform(0.1, 0.5)
        self.s3.set(lambda _request: answer if self.rng.random() < share else None)
        pause(self.rng.uniform(0, 1))

    def restore_s3(self) -> None:
        self.s3.set(None)

    def faults(self) -> list[Callable[[], None]]:
        return [
            *(self.kill_a_worker, self.freeze_a_worker, self.stop_a_supervisor),
            *(self.crash_redis, self.flush_redis, self.make_redis_a_replica),
            *(self.restart_postgresql, self.cut_connections),
            *(self.disturb_s3, self.restore_s3),
        ]


@pytest.fixture
def injector(
    catalog: Catalog, s3: Bucket, own_redis: servers.Redis, tmp_path: Path
) -> Iterator[FaultInjector]:
    for number in range(IMAGES):
        for path in (catalog.image(number), catalog.mask(number)):
            s3.client.upload_file(path, s3.name, f"in/{Path(path).name}")
    with (
        tempfile.TemporaryDirectory(prefix="t-") as name,
        servers.postgres_server(Path(name).resolve()) as postgres,
        FaultProxy(str(s3.client.meta.endpoint_url)).serving() as proxy,
    ):
        url = servers.create_database(postgres.url)
        fleet = Fleet(url, own_redis.url, tmp_path.resolve())
        scenario = Scenario(
            fleet=fleet, catalog=catalog, inputs=s3.uri("in"), outputs=s3.uri("out")
        )
        fleet.environment |= {
            "AWS_ENDPOINT_URL": proxy.url,
            "FAULTS_S3_TIMEOUT": "0.5",
            "INPAINT_MAX_FAILURES": "20",
        }
        rng = random.Random(SEED)
        yield FaultInjector(
            scenario=scenario, redis=own_redis, postgres=postgres, s3=proxy, rng=rng
        )
        fleet.close()


def test_a_random_mixture_of_faults_loses_and_duplicates_no_job(injector: FaultInjector) -> None:
    print(f"FAULTS_SEED={SEED} FAULTS_SECONDS={SECONDS:g}")
    scenario, fault_count = injector.scenario, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if scenario.count("pending", "queued") < 20:
            scenario.add(40)
        injector.keep_two_supervisors()
        injector.rng.choice(injector.faults())()
        pause(injector.rng.uniform(0, 1))
        fault_count += 1
    injector.restore_s3()
    injector.keep_two_supervisors()
    scenario.finish(seconds=150, retry=RETRIED)
    print(f"{fault_count} faults, {len(scenario.expected)} jobs")
    scenario.assert_invariants()
