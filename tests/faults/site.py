"""A site under test: a fleet, a few hundred jobs whose results are known, and the invariants.

Every job takes one of a few pictures, so that its result can be compared with the one that an
undisturbed run in this process gave.
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

PICTURES = 6
SIZE = (40, 40)
# Without the note of its own job in it, a result is the same for every job of a picture.
PLAIN: dict[str, Any] = {"provenance": False, "mask_feather": 0}
REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = REPOSITORY / "tests" / "faults" / "hooks"


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Pictures and masks in a folder, and the hash of each one's result."""

    folder: Path
    hashes: tuple[str, ...]

    def image(self, number: int) -> str:
        return str(self.folder / f"{number % PICTURES}.png")

    def mask(self, number: int) -> str:
        return str(self.folder / f"{number % PICTURES}-mask.png")


def make_catalog(folder: Path) -> Catalog:
    """Runs each picture once, where nothing disturbs it."""
    harness = WorkerHarness(f"sqlite:///{folder / 'undisturbed.db'}", folder, OpenCVEngine())
    hashes = []
    for number in range(PICTURES):
        image = harness.write_image(f"{number}.png", SIZE, seed=number)
        mask = harness.write_mask(f"{number}-mask.png", SIZE, (5 + number, 5, 30, 30))
        output = harness.path(f"undisturbed/{number}.png")
        job = harness.add(image=image, mask=mask, output=output, engine="opencv", **PLAIN)
        harness.run(job, engine="opencv")
        hashes.append(sha256(Path(output).read_bytes()).hexdigest())
    harness.close()
    return Catalog(folder=folder, hashes=tuple(hashes))


@dataclass
class Site:
    """outputs: a local folder or an S3 prefix that holds nothing but results."""

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
        """Jobs of two steps of 10 ms, or whatever the prompt says (see ``inside``); their ids."""
        opened = submissions.open_submission(
            self.db, manifest="m", digest="d", options="{}", rows=1, invalid=0
        )
        rows = [self._row(self._lines + n, prompt) for n in range(1, count + 1)]
        self._lines += count
        assert submissions.record(self.db, opened.id, rows) == []
        keys = [row.content_key for row in rows]
        with self.db.read() as connection:
            found = connection.execute(
                select(Job.id, Job.line).where(Job.content_key.in_(keys)).order_by(Job.id)
            ).all()
        for job, line in found:
            self.expected[job] = self.catalog.hashes[line % PICTURES]
        return [job for job, _ in found]

    def _row(self, line: int, prompt: str) -> NewJob:
        source = self.inputs or str(self.catalog.folder)
        parts: dict[str, Any] = {
            "image": f"{source}/{line % PICTURES}.png",
            "mask": f"{source}/{line % PICTURES}-mask.png",
            "output": f"{self.outputs}/{line}.png",
            "engine": "opencv",
            "params": Params(prompt=prompt, **PLAIN).to_json(),
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

    def is_done(self) -> bool:
        return self.count(*FINAL_STATES) == len(self.expected)

    def await_some(self, done: int, *, seconds: float = 60) -> None:
        """Until the work is in full swing: that many jobs have succeeded."""
        wait_for(lambda: self.count("succeeded") >= done, seconds=seconds)

    def finish(self, *, seconds: float = 90, retry: Sequence[str] = ()) -> None:
        """Waits for the last job, and lets those that failed with a code in ``retry`` run again."""

        def done() -> bool:
            for code in retry:
                jobs.retry(self.db, jobs.Selection(states=("failed",), error_code=code))
            return self.is_done() and (not retry or self.count("failed") == 0)

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

    def kill_a_process(self, chance: random.Random) -> bool:
        """SIGKILL to one of the worker processes, whatever it is doing; False where none is up."""
        children = self.fleet.children()
        if not children:
            return False
        with suppress(ProcessLookupError):
            os.kill(chance.choice(children), signal.SIGKILL)
        return True

    # --- the invariants ---

    def check(self, *, failed: dict[int, str] | None = None) -> None:
        """Stops the fleet and asserts what must hold. failed: job ids to their error codes."""
        wait_for(self._is_quiet, seconds=15)
        self.fleet.stop()
        wrong = self._violations(failed or {})
        assert not wrong, "\n".join(wrong)

    def _is_quiet(self) -> bool:
        return not self.fleet.queue.ready_messages(
            "opencv"
        ) and not self.fleet.queue.unacked_messages("opencv")

    def _violations(self, failed: dict[int, str]) -> list[str]:
        with self.db.read() as connection:
            rows = connection.execute(select(Job.__table__).order_by(Job.id)).all()
            ends = connection.execute(
                select(Attempt.__table__).order_by(Attempt.job_id, Attempt.attempt)
            ).all()
        attempts: dict[int, list[Any]] = {}
        for end in ends:
            attempts.setdefault(end.job_id, []).append(end)
        wrong = [
            f"job {row.id}: {text}"
            for row in rows
            for text in self._wrong(row, attempts.get(row.id, []), failed.get(row.id))
        ]
        wrong += self._left_behind({row.output for row in rows if row.state == "succeeded"})
        if len(rows) != len(self.expected):
            wrong.append(f"{len(rows)} jobs instead of {len(self.expected)}")
        lines = self.fleet.log().splitlines()
        for number, line in enumerate(lines):
            if _is_alarming(line):
                wrong.append("\n".join(lines[max(number - 3, 0) : number + 40]))
        return wrong

    def _wrong(self, row: Any, attempts: list[Any], error: str | None) -> list[str]:
        wrong = []
        if [one.attempt for one in attempts] != list(range(1, row.attempt + 1)):
            wrong.append(f"attempts {[one.attempt for one in attempts]} of {row.attempt}")
        if any(one.outcome is None or one.finished_at is None for one in attempts):
            wrong.append(f"an attempt without an end: {[one.outcome for one in attempts]}")
        succeeded = [one for one in attempts if one.outcome == "succeeded"]
        if error:
            if (row.state, row.error_code) != ("failed", error) or succeeded:
                wrong.append(f"{row.state} with {row.error_code}, expected {error}")
            return wrong
        if row.state != "succeeded" or len(succeeded) != 1 or succeeded != attempts[-1:]:
            wrong.append(f"{row.state} after {[one.outcome for one in attempts]}: {row.error_code}")
            return wrong
        data = self.storage.get(row.output, max_bytes=10**6).data
        hashes = {sha256(data).hexdigest(), row.result_sha256, succeeded[0].result_sha256}
        if hashes != {self.expected[row.id]}:
            wrong.append(f"its result is not the undisturbed run's: {hashes}")
        return wrong

    def _found(self) -> set[str]:
        """Everything that lies where the results go."""
        if not self.outputs.startswith("s3://"):
            return {str(path) for path in Path(self.outputs).iterdir()}
        bucket, _, prefix = self.outputs.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = {
            f"s3://{bucket}/{one['Key']}" for page in pages for one in page.get("Contents", ())
        }
        client.close()
        return found

    def _left_behind(self, outputs: set[str]) -> list[str]:
        found = self._found()
        return [f"left behind or missing: {path}" for path in sorted(found ^ outputs)]


def _is_alarming(line: str) -> bool:
    return "Traceback (most recent" in line or "unexpected error" in line


def pause(seconds: float) -> None:
    """How long a fault lasts: part of the scenario, not a wait for something."""
    time.sleep(seconds)
