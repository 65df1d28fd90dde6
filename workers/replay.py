"""Runs a finished job again from its record, and says whether the result is the same.

Nothing is leased, recorded or published. Prints one JSON object; started by
``inpaint-jobs replay``. Exits 69 where the engine cannot be loaded, 1 for other errors.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass, replace
from hashlib import sha256

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
from workers.engines.protocol import Engine, Interruption
from workers.pipeline.render import Kit, render


@click.command()
@click.option("--job", type=int, required=True)
@click.option("--device", required=True)
def main(job: int, device: str) -> None:
    with exit_on_error("inpaint-jobs", status=1, engine_unavailable=EX_UNAVAILABLE):
        configured = settings.load()
        logging.basicConfig(level=configured.log_level, stream=sys.stderr)
        click.echo(json.dumps(replay(configured, job, device=device)))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the table says of a job's successful attempt."""

    job: LeasedJob
    engine_revision: str
    image_sha256: str | None
    mask_sha256: str | None
    inputs: dict[str, str]
    result_sha256: str | None


def replay(configured: Settings, job: int, *, device: str) -> dict[str, object]:
    """``same``, and what differs besides: inputs that have changed, another engine revision.

    The engine is quantized as it was, whatever the settings say now.
    largest_difference: in levels, from what lies at the output, where that is still the
    recorded result; engines that are not deterministic may differ by one or two.
    Raises InputError where the job has no result, and whatever rendering raises.
    """
    db = Database(configured.database)
    try:
        schema.ensure(db)
        recorded = _recorded(db, job)
    finally:
        db.close()
    engine = _engine(configured, recorded, device)
    kit = Kit(
        settings=configured,
        storage=Storage(roots=configured.roots, buckets=configured.buckets),
        engine=engine,
    )
    now = AttemptRecord()
    try:
        rendered = render(kit, recorded.job, now, Interruption(), gates=False)
    finally:
        engine.close()
    same = now.result_sha256 == recorded.result_sha256
    return {
        "job": job,
        "same": same,
        "largest_difference": 0 if same else _largest_difference(kit, recorded, rendered.data),
        "result_sha256": now.result_sha256,
        "recorded_sha256": recorded.result_sha256,
        "differs": list(_differences(recorded, now, engine.revision)),
    }


def _engine(configured: Settings, recorded: Recorded, device: str) -> Engine:
    chosen = recorded_quantization(recorded.engine_revision)
    options = replace(engine_options(configured, device), quantization=chosen)
    try:
        return load_engine(recorded.job.engine, options)
    except EngineUnavailable as error:
        if chosen == "off":
            raise
        raise EngineUnavailable(
            f"job {recorded.job.id} ran with quantization {chosen}, which cannot be repeated "
            f"here: {error}"
        ) from error


def _recorded(db: Database, job: int) -> Recorded:
    last = (
        select(Attempt.__table__)
        .where(Attempt.job_id == job, Attempt.outcome == "succeeded")
        .order_by(Attempt.attempt.desc())
    )
    with db.read() as connection:
        row = connection.execute(select(Job.__table__).where(Job.id == job)).first()
        attempt = connection.execute(last).first()
    if row is None:
        raise InputError(f"job {job} does not exist; see inpaint-jobs list")
    if attempt is None:
        raise InputError(f"job {job} has no result to compare with; see inpaint-jobs show {job}")
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
    return Recorded(
        job=leased,
        engine_revision=attempt.engine_revision,
        image_sha256=attempt.image_sha256,
        mask_sha256=attempt.mask_sha256,
        inputs=json.loads(attempt.inputs or "{}"),
        result_sha256=attempt.result_sha256,
    )


def _largest_difference(kit: Kit, recorded: Recorded, now: bytes) -> int | None:
    cap = kit.settings.max_object_bytes
    try:
        published = kit.storage.get(recorded.job.output, max_bytes=cap).data
    except InputError:
        return None
    if sha256(published).hexdigest() != recorded.result_sha256:
        return None
    one, other = (
        images.decode(data, max_pixels=kit.settings.max_pixels).pixels.astype(np.int32)
        for data in (published, now)
    )
    return int(np.abs(one - other).max()) if one.shape == other.shape else None


def _differences(recorded: Recorded, now: AttemptRecord, revision: str) -> list[str]:
    pairs = {
        "image": (recorded.image_sha256, now.image_sha256),
        "mask": (recorded.mask_sha256, now.mask_sha256),
        "engine_revision": (recorded.engine_revision, revision),
        **{place: (was, now.inputs.get(place)) for place, was in recorded.inputs.items()},
    }
    return [name for name, (was, is_now) in pairs.items() if was != is_now]


if __name__ == "__main__":
    main()
