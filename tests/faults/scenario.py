"""A fleet under test: workers, a few hundred jobs with known results, and the invariants.

Every job uses one of a few images, so that its result can be compared with that of a run without
faults.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import boto3
from sqlalchemy import func, select

from shared import jobs
from shared.db.models import FINAL_STATES, Attempt, Job
from shared.jobs import submissions
from shared.jobs.submissions import NewJob
from shared.params import Params
from shared.storage import Storage
from tests.workers.fleet import Fleet, wait_for
from tests.workers.worker_harness import WorkerHarness
from workers.engines.opencv import OpenCVEngine

IMAGES = 6
SIZE = (40, 40)
# Provenance metadata names the job; without it all jobs of an image have the same result.
REPRODUCIBLE_PARAMS: dict[str, Any] = {"provenance": False, "mask_feather": 0}
REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = REPOSITORY / "tests" / "faults" / "hooks"


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Images and masks in a folder, and the SHA-256 of each image's expected result."""

    folder: Path
    hashes: tuple[str, ...]

    def image(self, number: int) -> str:
        return str(self.folder / f"{number % IMAGES}.png")

    def mask(self, number: int) -> str:
        return str(self.folder / f"{number % IMAGES}-mask.png")


def make_catalog(folder: Path) -> Catalog:
    """Runs each image once, without faults."""
    harness = WorkerHarness(f"sqlite:///{folder / 'undisturbed.db'}", folder, OpenCVEngine())
    hashes = []
    for number in range(IMAGES):
        image = harness.write_image(f"{number}.png", SIZE, seed=number)
        mask = harness.write_mask(f"{number}-mask.png", SIZE, (5 + number, 5, 30, 30))
        output = harness.path(f"undisturbed/{number}.png")
        job = harness.add(
            image=image, mask=mask, output=output, engine="opencv", **REPRODUCIBLE_PARAMS
        )
        harness.run(job, engine="opencv")
        hashes.append(sha256(Path(output).read_bytes()).hexdigest())
    harness.close()
    return Catalog(folder=folder, hashes=tuple(hashes))


@dataclass
class Scenario:
    """outputs, inputs: local folders or S3 prefixes. ``outputs`` contains nothing but results.

    expected: job number to the SHA-256 of its result.
    """

    fleet: Fleet
    catalog: Catalog
    outputs: str = ""
    inputs: str = ""
    expected: dict[int, str] = field(default_factory=dict)
    _lines: int = 0

    def __post_init__(self) -> None:
        self.outputs = self.outputs or self.fleet.harness.path("results")
        self.fleet.environment |= {
            "INPAINT_ROOTS": f"{self.fleet.folder},{self.catalog.folder}",
            "INPAINT_RETRY_BASE_SECONDS": "0.2",
            "INPAINT_RETRY_CAP_SECONDS": "1",
            "INPAINT_LEASE_SECONDS": "2",
            "PYTHONPATH": f"{HOOKS}:{REPOSITORY}",
        }
        self.storage = Storage(roots=[self.fleet.folder, self.catalog.folder], buckets=())

    # --- jobs ---

    def add(self, count: int, *, prompt: str = "steps 2") -> list[int]:
        """Adds jobs of two steps of 10 ms, or with the fault of the prompt; returns their numbers.

        The prompts are those of ``worker_faults``.
        """
        opened = submissions.open_submission(
            self.db, manifest="m", digest="d", options="{}", rows=1, invalid=0
        )
        rows = [self._row(self._lines + n, prompt) for n in range(1, count + 1)]
        self._lines += count
        assert submissions.record(self.db, opened.id, rows) == []
        keys = [row.content_key for row in rows]
        with self.db.read() as connection:
            recorded = connection.execute(
                select(Job.id, Job.line).where(Job.content_key.in_(keys)).order_by(Job.id)
            ).all()
        for job, line in recorded:
            self.expected[job] = self.catalog.hashes[line % IMAGES]
        return [job for job, _ in recorded]

    def _row(self, line: int, prompt: str) -> NewJob:
        source = self.inputs or str(self.catalog.folder)
        parts: dict[str, Any] = {
            "image": f"{source}/{line % IMAGES}.png",
            "mask": f"{source}/{line % IMAGES}-mask.png",
            "output": f"{self.outputs}/{line}.png",
            "engine": "opencv",
            "params": Params(prompt=prompt, **REPRODUCIBLE_PARAMS).to_json(),
            "seed": 7,
        }
        key = jobs.content_key(**parts)
        return NewJob(line=line, key=None, content_key=key, priority=0, **parts)

    @property
    def db(self) -> Any:
        return self.fleet.harness.db

    def count(self, *states: str) -> int:
        with self.db.read() as connection:
            query = select(func.count()).where(Job.state.in_(states))
            return int(connection.execute(query).scalar_one())

    def is_finished(self) -> bool:
        return self.count(*FINAL_STATES) == len(self.expected)

    def wait_for_successes(self, done: int, *, seconds: float = 60) -> None:
        """Waits until this many jobs have succeeded."""
        wait_for(lambda: self.count("succeeded") >= done, seconds=seconds)

    def finish(self, *, seconds: float = 90, retry: Sequence[str] = ()) -> None:
        """Waits until every job is final; retries those that failed with a code in ``retry``."""

        def done() -> bool:
            for code in retry:
                jobs.retry(self.db, jobs.Selection(states=("failed",), error_code=code))
            return self.is_finished() and (not retry or self.count("failed") == 0)

        try:
            wait_for(done, seconds=seconds)
        except AssertionError:
            raise AssertionError(f"not finished: {self._summary()}") from None

    def _summary(self) -> str:
        with self.db.read() as connection:
            counts = connection.execute(
                select(Job.state, Job.error_code, func.count()).group_by(Job.state, Job.error_code)
            ).all()
        return f"{[tuple(row) for row in counts]}\n{self.fleet.log()[-3000:]}"

    # --- faults ---

    def kill_a_worker_process(self, rng: random.Random) -> bool:
        """Sends SIGKILL to a random worker process; False if none is running."""
        children = self.fleet.children()
        if not children:
            return False
        with suppress(ProcessLookupError):
            os.kill(rng.choice(children), signal.SIGKILL)
        return True

    # --- the invariants ---

    def assert_invariants(self, *, failed: dict[int, str] | None = None) -> None:
        """Stops the fleet and checks every job, attempt, output and log line.

        failed: the jobs that must have failed, to their error codes.
        """
        wait_for(self._queue_is_empty, seconds=15)
        self.fleet.stop()
        violations = self._violations(failed or {})
        assert not violations, "\n".join(violations)

    def _queue_is_empty(self) -> bool:
        return not self.fleet.queue.ready_messages(
            "opencv"
        ) and not self.fleet.queue.unacked_messages("opencv")

    def _violations(self, failed: dict[int, str]) -> list[str]:
        with self.db.read() as connection:
            rows = connection.execute(select(Job.__table__).order_by(Job.id)).all()
            attempt_rows = connection.execute(
                select(Attempt.__table__).order_by(Attempt.job_id, Attempt.attempt)
            ).all()
        attempts: dict[int, list[Any]] = {}
        for attempt in attempt_rows:
            attempts.setdefault(attempt.job_id, []).append(attempt)
        violations = [
            f"job {row.id}: {text}"
            for row in rows
            for text in self._job_violations(row, attempts.get(row.id, []), failed.get(row.id))
        ]
        violations += self._output_violations(
            {row.output for row in rows if row.state == "succeeded"}
        )
        if len(rows) != len(self.expected):
            violations.append(f"{len(rows)} jobs instead of {len(self.expected)}")
        lines = self.fleet.log().splitlines()
        for number, line in enumerate(lines):
            if _is_unexpected(line):
                violations.append("\n".join(lines[max(number - 3, 0) : number + 40]))
        return violations

    def _job_violations(self, row: Any, attempts: list[Any], error: str | None) -> list[str]:
        violations = []
        if [attempt.attempt for attempt in attempts] != list(range(1, row.attempt + 1)):
            violations.append(
                f"attempts {[attempt.attempt for attempt in attempts]} of {row.attempt}"
            )
        if any(attempt.outcome is None or attempt.finished_at is None for attempt in attempts):
            violations.append(
                f"an attempt without an end: {[attempt.outcome for attempt in attempts]}"
            )
        succeeded = [attempt for attempt in attempts if attempt.outcome == "succeeded"]
        if error:
            if (row.state, row.error_code) != ("failed", error) or succeeded:
                violations.append(f"{row.state} with {row.error_code}, expected {error}")
            return violations
        if row.state != "succeeded" or len(succeeded) != 1 or succeeded != attempts[-1:]:
            violations.append(
                f"{row.state} after {[attempt.outcome for attempt in attempts]}: {row.error_code}"
            )
            return violations
        data = self.storage.get(row.output, max_bytes=10**6).data
        hashes = {sha256(data).hexdigest(), row.result_sha256, succeeded[0].result_sha256}
        if hashes != {self.expected[row.id]}:
            violations.append(f"its result differs from that of a run without faults: {hashes}")
        return violations

    def _stored_outputs(self) -> set[str]:
        """Every object under ``outputs``."""
        if not self.outputs.startswith("s3://"):
            return {str(path) for path in Path(self.outputs).iterdir()}
        bucket, _, prefix = self.outputs.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        client.close()
        return {f"s3://{bucket}/{key}" for key in keys}

    def _output_violations(self, outputs: set[str]) -> list[str]:
        differences = sorted(self._stored_outputs() ^ outputs)
        return [f"left behind or missing: {uri}" for uri in differences]


def _is_unexpected(line: str) -> bool:
    return "Traceback (most recent" in line or "unexpected error" in line


def pause(seconds: float) -> None:
    """Sleeps as part of the scenario (how long a fault lasts), not to wait for a condition."""
    time.sleep(seconds)
