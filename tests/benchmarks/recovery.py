"""How soon work continues after a fault, with the default settings.

python -m tests.benchmarks.recovery
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests import servers
from tests.benchmarks.side_by_side import print_row
from tests.faults.scenario import Scenario, make_catalog
from tests.workers.fleet import Fleet, wait_for

LONG = "steps 1000000"
DEFAULTS = ("INPAINT_MAINTENANCE_SECONDS", "INPAINT_LEASE_SECONDS", "INPAINT_HEARTBEAT_SECONDS")


def main() -> None:
    print_row("recovery", "seconds", "aim")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        with servers.redis_server(folder) as broker, servers.postgres_server(folder) as cluster:
            for number, (fault, aim, measure) in enumerate(FAULTS):
                with _scenario(folder / str(number), broker, cluster) as scenario:
                    print_row(f"  {fault}", f"{measure(scenario, broker):.1f}", aim)


@contextmanager
def _scenario(folder: Path, broker: servers.Redis, cluster: servers.Postgres) -> Iterator[Scenario]:
    folder.mkdir()
    with redis.Redis.from_url(broker.url) as client:
        client.flushall()
    fleet = Fleet(servers.create_database(cluster.url), broker.url, folder)
    scenario = Scenario(fleet=fleet, catalog=make_catalog(folder))
    for variable in DEFAULTS:
        del fleet.environment[variable]
    yield scenario
    for process in fleet.processes:
        process.kill()
    fleet.close()


def _seconds_until(happened: Callable[[], bool]) -> float:
    start = time.monotonic()
    wait_for(happened, seconds=300)
    return time.monotonic() - start


def _process_killed(scenario: Scenario, _broker: servers.Redis) -> float:
    """Its supervisor sees that, and starts another."""
    (job,) = scenario.add(1, prompt=LONG)
    scenario.fleet.start("--concurrency", "1")
    wait_for(lambda: scenario.count("running") == 1)
    (child,) = scenario.fleet.children()
    os.kill(child, signal.SIGKILL)
    return _seconds_until(lambda: _attempts_started(scenario, job) == 2)


def _machine_lost(scenario: Scenario, _broker: servers.Redis) -> float:
    """Supervisor and worker process are gone; another machine detects it by the expired lease."""
    (job,) = scenario.add(1, prompt=LONG)
    lost = scenario.fleet.start("--concurrency", "1")
    wait_for(lambda: scenario.count("running") == 1)
    children = scenario.fleet.children()
    scenario.fleet.start("--concurrency", "1")
    wait_for(lambda: len(scenario.fleet.children()) == 2)
    lost.send_signal(signal.SIGSTOP)  # else it would see its process exit, and reap it at once
    for child in children:
        os.kill(child, signal.SIGKILL)
    return _seconds_until(lambda: _attempts_started(scenario, job) == 2)


def _attempts_started(scenario: Scenario, job: int) -> int:
    row = scenario.fleet.harness.job(job)
    return int(row.attempt) if row.state == "running" else 0


def _flushed(scenario: Scenario, broker: servers.Redis) -> float:
    """FLUSHALL while a thousand jobs are queued, until all messages are published again."""
    scenario.add(1, prompt=LONG)
    scenario.fleet.start("--concurrency", "1")
    wait_for(lambda: scenario.count("running") == 1)
    scenario.add(1000, prompt=LONG)
    wait_for(lambda: scenario.fleet.queue.length("opencv") == 1000)
    with redis.Redis.from_url(broker.url) as client:
        client.flushall()
    return _seconds_until(lambda: scenario.fleet.queue.length("opencv") >= 1000)


def _redis_back(scenario: Scenario, broker: servers.Redis) -> float:
    """Redis is down for five seconds; from its restart until a worker finishes a job again."""
    scenario.add(500, prompt="steps 5")
    scenario.fleet.start("--concurrency", "1")
    scenario.wait_for_successes(5)
    broker.kill()
    time.sleep(5)
    broker.start()
    done = scenario.count("succeeded")
    return _seconds_until(lambda: scenario.count("succeeded") > done)


FAULTS = (
    ("a worker process is killed: its job runs again", "75", _process_killed),
    ("a machine is lost: its job runs elsewhere", "75", _machine_lost),
    ("FLUSHALL: the queue is full again", "30", _flushed),
    ("Redis is back: jobs are acquired again", "2", _redis_back),
)

if __name__ == "__main__":
    main()
