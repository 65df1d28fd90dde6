"""S3 that is overloaded, silent, slow or cuts responses, and S3 that denies access."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Bucket
from tests.faults.http_proxy import Answer, Fault, FaultProxy, Request
from tests.faults.scenario import IMAGES, Catalog, Scenario, pause
from tests.workers.fleet import Fleet, wait_for
from workers.pending_writes import MAX_RESULTS


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]).serving() as proxy:
        yield proxy


@pytest.fixture
def s3_scenario(
    catalog: Catalog,
    s3: Bucket,
    proxy: FaultProxy,
    postgres_url: str,
    redis_url: str,
    tmp_path: Path,
) -> Iterator[Scenario]:
    """Images and results are in a bucket that the workers reach through the proxy."""
    for number in range(IMAGES):
        for path in (catalog.image(number), catalog.mask(number)):
            s3.client.upload_file(path, s3.name, f"in/{Path(path).name}")
    fleet = Fleet(postgres_url, redis_url, tmp_path.resolve())
    scenario = Scenario(fleet=fleet, catalog=catalog, inputs=s3.uri("in"), outputs=s3.uri("out"))
    fleet.environment |= {"AWS_ENDPOINT_URL": proxy.url, "FAULTS_S3_TIMEOUT": "0.5"}
    yield scenario
    fleet.close()


_rng = random.Random(3)


def sometimes(share: float, answer: Answer, *, methods: str = "GET PUT HEAD") -> Fault:
    def fault(request: Request) -> Answer | None:
        chosen = request.method in methods.split() and _rng.random() < share
        return answer if chosen else None

    return fault


def burst(request: Request) -> Answer | None:
    """Sixty requests in a row fail: more than botocore retries."""
    return Answer(status=503, code="SlowDown") if request.number < 60 else None


FAULTS: dict[str, Fault] = {
    "503 bursts": burst,
    "503 here and there": sometimes(0.2, Answer(status=503, code="SlowDown")),
    "timeouts": sometimes(0.1, Answer(silent_seconds=1)),
    "resets in the middle of a body": sometimes(0.2, Answer(part=0.5, reset=True), methods="GET"),
    "truncated bodies": sometimes(0.2, Answer(part=0.5), methods="GET"),
    "answers to a PUT that are lost": sometimes(0.2, Answer(part=0, reset=True), methods="PUT"),
    "a slow link": sometimes(1.0, Answer(seconds_per_kib=0.02)),
}


def test_every_job_succeeds_after_each_fault_of_s3(
    s3_scenario: Scenario, proxy: FaultProxy
) -> None:
    s3_scenario.fleet.environment["INPAINT_MAX_FAILURES"] = "50"
    s3_scenario.fleet.start("--concurrency", "4")
    for name, fault in FAULTS.items():
        proxy.set(fault)
        s3_scenario.add(25, prompt="")
        s3_scenario.finish()
        assert proxy.fault_count, name
    proxy.set(None)
    s3_scenario.assert_invariants()


def test_denied_and_missing_objects_fail_the_job_at_once_with_their_codes(
    s3_scenario: Scenario, proxy: FaultProxy
) -> None:
    status = {"/in/1.png": 403, "/in/2-mask.png": 404}
    refused = {path: Answer(status=number) for path, number in status.items()}
    proxy.set(lambda r: next((a for path, a in refused.items() if r.path.endswith(path)), None))
    ids = s3_scenario.add(12)
    s3_scenario.fleet.start("--concurrency", "2")
    s3_scenario.finish()
    failed = dict.fromkeys(ids[0::6], "object_denied") | dict.fromkeys(ids[1::6], "object_missing")
    assert {len(s3_scenario.fleet.harness.attempts(job)) for job in failed} == {1}
    s3_scenario.assert_invariants(failed=failed)


DENIED = Answer(status=403, code="AccessDenied")
BLOCKED_MESSAGE = "write failed, retrying"


def test_a_bucket_that_denies_writes_blocks_the_worker(
    s3_scenario: Scenario, proxy: FaultProxy
) -> None:
    s3_scenario.add(60)
    s3_scenario.fleet.start("--concurrency", "2")
    s3_scenario.wait_for_successes(5)
    proxy.set(lambda r: DENIED if r.method == "PUT" else None)
    wait_for(lambda: s3_scenario.fleet.log().count(BLOCKED_MESSAGE) == MAX_RESULTS + 2)
    done = s3_scenario.count("succeeded")
    pause(1)
    assert s3_scenario.count("succeeded") == done
    assert s3_scenario.fleet.log().count(BLOCKED_MESSAGE) == MAX_RESULTS + 2
    proxy.set(None)
    s3_scenario.finish()
    assert {len(s3_scenario.fleet.harness.attempts(job)) for job in s3_scenario.expected} == {1}
    s3_scenario.assert_invariants()


def test_an_output_that_denies_writes_does_not_block_others(
    s3_scenario: Scenario, proxy: FaultProxy
) -> None:
    """The worker keeps the leases of the jobs whose writes it retries; it releases them on exit."""
    denied = {f"/{s3_scenario.outputs.removeprefix('s3://')}/{line}.png" for line in range(1, 5)}
    proxy.set(lambda r: DENIED if r.method == "PUT" and r.path in denied else None)
    ids = s3_scenario.add(10)
    s3_scenario.fleet.start("--concurrency", "2")
    s3_scenario.wait_for_successes(6)
    wait_for(lambda: s3_scenario.fleet.log().count(BLOCKED_MESSAGE) == 4)
    pause(3)  # longer than a lease
    assert [len(s3_scenario.fleet.harness.attempts(job)) for job in ids] == [1] * 10
    assert s3_scenario.count("running") == 4
    s3_scenario.fleet.stop()
    assert s3_scenario.count("pending", "queued") == 4
    proxy.set(None)
    s3_scenario.fleet.start("--concurrency", "2")
    s3_scenario.finish()
    outcomes = [
        [attempt.outcome for attempt in s3_scenario.fleet.harness.attempts(job)] for job in ids
    ]
    assert outcomes == [["released", "succeeded"]] * 4 + [["succeeded"]] * 6
    s3_scenario.assert_invariants()
