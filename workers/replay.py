"""Runs a finished job again from its record and compares the results.

Nothing is leased, recorded or published. Prints one JSON object; started by
``inpaint-jobs replay``. Exits 69 if the engine cannot be loaded, 1 for other errors.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import click
import numpy as np
from sqlalchemy import select

from shared import images, settings
from shared.command_errors import exit_on_error
from shared.db import Database, schema
from shared.db.models import Attempt, Job
from shared.errors import EngineUnavailable, InputError
from shared.jobs import AttemptRecord, LeasedJob
from shared.params import Params
from shared.processes import EX_UNAVAILABLE
from shared.settings import Settings
from shared.storage import Storage
from workers.engines import load_engine
from workers.engines.options import engine_options, recorded_quantization
from workers.engines.protocol import Engine
from workers.job_context import JobContext
from workers.pipeline.render import render
from workers.worker_context import PipelineContext


@click.command()
@click.option("--job", type=int, required=True)
@click.option("--device", required=True)
def main(job: int, device: str) -> None:
    with exit_on_error("inpaint-jobs", status=1, engine_unavailable=EX_UNAVAILABLE):
        configured = settings.load()
        logging.basicConfig(level=configured.log_level, stream=sys.stderr)
        click.echo(json.dumps(replay(configured, job, device=device)))


@dataclass(frozen=True, kw_only=True)
class RecordedAttempt:
    """A job's last successful attempt, as the database has it. Hashes are SHA-256."""

    leased: LeasedJob
    engine_revision: str
    image_sha256: str | None
    mask_sha256: str | None
    inputs: dict[str, str]
    result_sha256: str | None


def replay(configured: Settings, job: int, *, device: str) -> dict[str, object]:
    """Run a job's last successful attempt again and compare the results.

    Returns ``same``, ``largest_difference`` in levels from the output (None unless that is
    still the recorded result), and ``differs``: the inputs and the engine revision that are no
    longer those recorded. Results of engines that are not deterministic may differ by one or
    two levels. The engine is quantized as recorded, whatever the settings are now. Raises
    InputError if the job has no result, and whatever rendering raises.
    """
    recorded = _load_recorded(configured, job)
    # A PipelineContext has neither a lease nor a database: it cannot publish or record.
    pipeline = PipelineContext(
        settings=configured,
        storage=Storage(roots=configured.roots, buckets=configured.buckets),
        engine=_load_engine(configured, recorded, device),
    )
    record, data = _render(pipeline, recorded)
    # Whole files: an encoder of another version may differ where the pixels do not.
    same = record.result_sha256 == recorded.result_sha256
    difference = 0 if same else _largest_difference(pipeline, recorded, data)
    return {
        "job": job,
        "same": same,
        "largest_difference": difference,
        "result_sha256": record.result_sha256,
        "recorded_sha256": recorded.result_sha256,
        "differs": _changed_inputs(recorded, record, pipeline.engine.revision),
    }


def _render(pipeline: PipelineContext, recorded: RecordedAttempt) -> tuple[AttemptRecord, bytes]:
    rerun = JobContext(leased=recorded.leased, apply_gates=False)
    try:
        rendered = render(pipeline, rerun)
    finally:
        pipeline.engine.close()
    return rerun.record, rendered.data


def _load_recorded(configured: Settings, job: int) -> RecordedAttempt:
    db = Database(configured.database)
    try:
        schema.ensure(db)
        return _read_recorded(db, job)
    finally:
        db.close()


def _load_engine(configured: Settings, recorded: RecordedAttempt, device: str) -> Engine:
    quantization = recorded_quantization(recorded.engine_revision)
    options = replace(engine_options(configured, device), quantization=quantization)
    try:
        return load_engine(recorded.leased.engine, options)
    except EngineUnavailable as error:
        if quantization == "off":
            raise
        raise EngineUnavailable(
            f"job {recorded.leased.id} ran with quantization {quantization}, which cannot be "
            f"repeated here: {error}"
        ) from error


def _read_recorded(db: Database, job: int) -> RecordedAttempt:
    last_success = (
        select(Attempt.__table__)
        .where(Attempt.job_id == job, Attempt.outcome == "succeeded")
        .order_by(Attempt.attempt.desc())
    )
    with db.read() as connection:
        row = connection.execute(select(Job.__table__).where(Job.id == job)).first()
        attempt = connection.execute(last_success).first()
    if row is None:
        raise InputError(f"job {job} does not exist; see inpaint-jobs list")
    if attempt is None:
        raise InputError(f"job {job} has no result to compare with; see inpaint-jobs show {job}")
    return _recorded_attempt(row, attempt)


def _recorded_attempt(row: Any, attempt: Any) -> RecordedAttempt:
    """row, attempt: of the tables of jobs and attempts."""
    # Engine, parameters and seed of the attempt: a retry may have changed the job's since.
    leased = LeasedJob(
        id=row.id,
        attempt=attempt.attempt,
        engine=attempt.engine,
        image=row.image,
        mask=row.mask,
        output=row.output,
        params=Params.from_json(attempt.params, seed=attempt.seed),
        priority=0,
        failures=0,
    )
    return RecordedAttempt(
        leased=leased,
        engine_revision=attempt.engine_revision,
        image_sha256=attempt.image_sha256,
        mask_sha256=attempt.mask_sha256,
        inputs=json.loads(attempt.inputs or "{}"),
        result_sha256=attempt.result_sha256,
    )


def _largest_difference(
    pipeline: PipelineContext, recorded: RecordedAttempt, data: bytes
) -> int | None:
    """Largest absolute difference of a channel, in levels; None without the recorded output."""
    settings = pipeline.settings
    try:
        # The record has a hash only, so the pixels come from the output if it is unchanged.
        output = pipeline.storage.get(recorded.leased.output, max_bytes=settings.max_object_bytes)
    except InputError:
        return None
    if sha256(output.data).hexdigest() != recorded.result_sha256:
        return None
    # int32: differences of unsigned pixels would wrap.
    before, after = (
        images.decode(file, max_pixels=settings.max_pixels).pixels.astype(np.int32)
        for file in (output.data, data)
    )
    return int(np.abs(before - after).max()) if before.shape == after.shape else None


def _changed_inputs(recorded: RecordedAttempt, record: AttemptRecord, revision: str) -> list[str]:
    pairs = {
        "image": (recorded.image_sha256, record.image_sha256),
        "mask": (recorded.mask_sha256, record.mask_sha256),
        "engine_revision": (recorded.engine_revision, revision),
        **{
            location: (hash_before, record.inputs.get(location))
            for location, hash_before in recorded.inputs.items()
        },
    }
    return [name for name, (before, after) in pairs.items() if before != after]


if __name__ == "__main__":
    main()
