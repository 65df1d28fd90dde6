"""One job, top to bottom: acquire, fetch, decode, plan, inpaint, composite, encode, put, finish."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from shared import images, jobs, masks, regions
from shared.db import Database
from shared.errors import (
    Cancelled,
    DatabaseUnavailable,
    InpaintError,
    Interrupted,
    LeaseLost,
    OutputConflict,
    OutputRefused,
    Released,
)
from shared.images import Picture
from shared.jobs import AttemptRecord, Holder, LeasedJob
from shared.masks import Mask
from shared.params import MAX_SEED, is_file, is_native
from shared.regions import Region
from shared.retry import RetryPolicy
from shared.settings import Settings
from shared.storage import Storage, remove_leftovers
from workers import composite
from workers.engines.protocol import Engine, Interruption, Pixels, RegionWork, Report

log = logging.getLogger(__name__)

PUT_TRIES = 3
MAX_PAUSE_SECONDS = 5.0
REFUSED_PAUSE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a worker process works with."""

    settings: Settings
    db: Database
    storage: Storage
    engine: Engine
    holder: Holder
    running: Running
    retry: RetryPolicy


@dataclass(frozen=True, kw_only=True)
class Held:
    """A job in this process's hands."""

    job: LeasedJob
    record: AttemptRecord
    interruption: Interruption


class Running:
    """The jobs in this process's hands; shared by job threads, upkeep and shutdown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], Held] = {}
        self._taken: list[int] = []
        self._stopping = False
        # Set where the database did not answer: a lease may be ours without our knowing it.
        self.may_have_orphans = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @contextmanager
    def holding(self, job: LeasedJob, record: AttemptRecord) -> Iterator[Interruption]:
        held = Held(job=job, record=record, interruption=Interruption())
        with self._lock:
            self._held[job.id, job.attempt] = held
            if self._stopping:
                held.interruption.set(_released())
        try:
            yield held.interruption
        finally:
            with self._lock:
                del self._held[job.id, job.attempt]

    @contextmanager
    def taking(self, job: int) -> Iterator[None]:
        """While a message is worked on; the job may be leased without our knowing it yet."""
        with self._lock:
            self._taken.append(job)
        try:
            yield
        finally:
            with self._lock:
                self._taken.remove(job)

    def taken(self) -> set[int]:
        with self._lock:
            return set(self._taken)

    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def release_all(self) -> None:
        """Every job stops at its next step, and no new one starts. Safe in a signal handler."""
        self._stopping = True
        for held in list(self._held.values()):
            held.interruption.set(_released())


def _released() -> Released:
    return Released("the worker is shutting down")


def run_job(bench: Bench, *, job: int, seen_attempt: int) -> InpaintError | None:
    """Runs the job a message names, records what came of it, and returns what went wrong.

    Nothing did where the message is stale. Raises DatabaseUnavailable where nothing
    could be recorded: the lease is then given back, or runs out.
    """
    with bench.running.taking(job):
        return _run_leased(bench, job, seen_attempt)


def _run_leased(bench: Bench, job: int, seen_attempt: int) -> InpaintError | None:
    leased = _acquire(bench, job, seen_attempt)
    if leased is None:
        log.debug("job %s: the message for attempt %s is stale", job, seen_attempt)
        return None
    record = AttemptRecord()
    with bench.running.holding(leased, record) as interruption:
        output_version = ended = None
        try:
            output_version = _inpaint(bench, leased, record, interruption)
        except InpaintError as error:
            ended = error
        except MemoryError:
            ended = InpaintError("this machine is out of memory", code="host_out_of_memory")
            ended.retryable = True
        except Exception as error:
            log.exception("job %s: unexpected error", job)
            ended = InpaintError(f"{type(error).__name__}: {error}")
        _conclude(bench, leased, record, ended, output_version)
    return ended


def _acquire(bench: Bench, job: int, seen_attempt: int) -> LeasedJob | None:
    """Waits for a database that does not answer: other messages would fare no better."""
    pause = 0.1
    while True:
        try:
            return jobs.acquire(
                bench.db,
                job=job,
                seen_attempt=seen_attempt,
                holder=bench.holder,
                lease_seconds=bench.settings.lease_seconds,
            )
        except DatabaseUnavailable:
            bench.running.may_have_orphans = True
            if bench.running.stopping:
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)


def _inpaint(
    bench: Bench, job: LeasedJob, record: AttemptRecord, interruption: Interruption
) -> str:
    """Everything between the lease and the result's publication; the output's new version."""
    stage = _Stages(record, interruption)
    with stage("fetch"):
        fetched = _fetch(bench, job, record)
    with stage("decode"):
        picture, mask = _decode(bench.settings, job, fetched)
        record.width, record.height = picture.size
    with stage("plan"):
        plan = _plan(job, mask)
        record.regions, record.windows = len(plan), sum(len(r.windows) for r in plan)
    with stage("inpaint"):
        report = Report()
        filled = _fill(bench.engine, job, picture, mask, plan, interruption, report)
        record.memory_mode = report.memory or None
    with stage("composite"):
        result = composite.composite(
            picture, mask, plan, filled, job.params, fill_alpha=job.mask == "alpha"
        )
    with stage("encode"):
        data = images.encode(result, format=_output_format(job))
        record.result_sha256 = sha256(data).hexdigest()
    with stage("put"):
        return _put_patiently(bench, job, data, fetched.output_version, interruption)


class _Stages:
    """Times each stage into the record; an interruption is noticed between stages."""

    def __init__(self, record: AttemptRecord, interruption: Interruption) -> None:
        self._record = record
        self._interruption = interruption

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._interruption.check()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._record.timings[name] = time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class _Fetched:
    """output_version: what lay at the output before the work began; None: nothing."""

    image: bytes
    mask: bytes | None
    output_version: str | None


def _fetch(bench: Bench, job: LeasedJob, record: AttemptRecord) -> _Fetched:
    cap = bench.settings.max_object_bytes
    before = bench.storage.stat(job.output)
    image = bench.storage.get(job.image, max_bytes=cap)
    record.image_sha256, record.image_version = sha256(image.data).hexdigest(), image.version
    mask = None
    if is_file(job.mask):
        mask = bench.storage.get(job.mask, max_bytes=cap)
        record.mask_sha256, record.mask_version = sha256(mask.data).hexdigest(), mask.version
    return _Fetched(
        image=image.data,
        mask=mask.data if mask else None,
        output_version=before.version if before else None,
    )


def _decode(settings: Settings, job: LeasedJob, fetched: _Fetched) -> tuple[Picture, Mask]:
    """The picture, and where it is repainted: (H, W) bool."""
    picture = images.decode(fetched.image, max_pixels=settings.max_pixels)
    if fetched.mask is not None:
        grey = masks.decode_mask(fetched.mask, max_pixels=settings.max_pixels)
    elif job.mask == "alpha":
        grey = masks.alpha_mask(picture)
    else:
        grey = masks.box_mask(masks.parse_box(job.mask), picture.size)
    masks.check_size(grey, picture.size)
    repainted = masks.binary(grey, threshold=job.params.mask_threshold)
    return picture, masks.dilate(repainted, job.params.mask_dilation)


def _plan(job: LeasedJob, mask: Mask) -> tuple[Region, ...]:
    params = job.params
    window = (params.width, params.height)
    return regions.plan(mask, mode=params.mode, window=window, native=is_native(job.engine))


def _fill(
    engine: Engine,
    job: LeasedJob,
    picture: Picture,
    mask: Mask,
    plan: tuple[Region, ...],
    interruption: Interruption,
    report: Report,
) -> list[Pixels]:
    """Submits all regions before waiting for the first, so that they can share batches."""
    if not plan:
        return []
    rgb = picture.rgb()
    futures = []
    for index, region in enumerate(plan):
        image, region_mask = composite.cut(rgb, mask, region)
        work = RegionWork(
            image=image,
            mask=region_mask,
            windows=region.windows,
            params=job.params,
            seed=(job.params.seed + index) % (MAX_SEED + 1),
            interruption=interruption,
            report=report,
        )
        futures.append(engine.submit(work))
    return [np.asarray(future.result()) for future in futures]


def _output_format(job: LeasedJob) -> str | None:
    """What the output's name asks for; None, the image's own, where it asks for no change.

    The image may not be what its name says; a PNG called .jpg stays a PNG.
    """
    asked = images.format_of(job.output)
    return None if asked == images.format_of(job.image) else asked


def _put_patiently(
    bench: Bench, job: LeasedJob, data: bytes, seen: str | None, interruption: Interruption
) -> str:
    """Keeps the result while the output refuses it, which holds up this worker's other jobs.

    They would be refused as well. Raises OutputRefused after ``refused_seconds``.
    """
    deadline = time.monotonic() + bench.settings.refused_seconds
    waited = False
    while True:
        try:
            version = _put(bench, job, data, seen=seen)
        except OutputRefused as error:
            if time.monotonic() + REFUSED_PAUSE_SECONDS > deadline:
                raise
            if not waited:
                log.warning("job %s: pausing until it can be written: %s", job.id, error)
                # Only for whoever looks on; heartbeats say it where the database is away as well.
                with suppress(DatabaseUnavailable):
                    jobs.note(bench.db, job, error)
            waited = True
        else:
            if waited:
                log.info("job %s: written after all", job.id)
            return version
        interruption.wait(REFUSED_PAUSE_SECONDS)


def _put(bench: Bench, job: LeasedJob, data: bytes, *, seen: str | None) -> str:
    """Writes over the version seen, and over a newer one only while the lease is ours.

    A newer version comes from an attempt that lost its lease to us and wrote all the same.
    """
    remove_leftovers(job.output, [f"{job.id}-{n}" for n in range(1, job.attempt)])
    for _ in range(PUT_TRIES - 1):
        try:
            return _put_once(bench, job, data, seen)
        except OutputConflict:
            found = bench.storage.stat(job.output)
            seen = found.version if found else None
    return _put_once(bench, job, data, seen)


def _put_once(bench: Bench, job: LeasedJob, data: bytes, seen: str | None) -> str:
    lease = bench.settings.lease_seconds
    _persist(bench, lambda: jobs.confirm(bench.db, job, lease_seconds=lease))
    token = f"{job.id}-{job.attempt}"
    return bench.storage.put(job.output, data, if_version=seen, token=token)


def _conclude(
    bench: Bench,
    job: LeasedJob,
    record: AttemptRecord,
    ended: InpaintError | None,
    output_version: str | None,
) -> None:
    if isinstance(ended, LeaseLost):
        log.warning("%s", ended)
        return
    try:
        _persist(bench, lambda: _write_end(bench, job, record, ended, output_version))
    except LeaseLost as error:
        log.warning("%s", error)


def _write_end(
    bench: Bench,
    job: LeasedJob,
    record: AttemptRecord,
    ended: InpaintError | None,
    output_version: str | None,
) -> None:
    if ended is None:
        jobs.succeed(bench.db, job, record, output_version=output_version)
        seconds = sum(record.timings.values())
        log.info("job %s: succeeded in %.2f s, %s windows", job.id, seconds, record.windows)
    elif isinstance(ended, Cancelled):
        jobs.finish_cancelled(bench.db, job, record)
        log.info("job %s: cancelled", job.id)
    elif isinstance(ended, Interrupted):
        jobs.release(bench.db, job, record)
        log.info("job %s: released: %s", job.id, ended)
    else:
        wait = jobs.fail(bench.db, job, record, ended, bench.retry)
        what = "failed" if wait is None else f"failed, again in {wait:.0f} s"
        log.warning("job %s: %s: %s: %s", job.id, what, ended.code, ended)


def give_back(bench: Bench, *, keep: Collection[int] = ()) -> None:
    """Releases the jobs whose engine does not come to its next step; they run elsewhere.

    The attempt is over with that: whatever the engine still returns can no longer be put.
    keep: ids of jobs whose leases stay, for the reaper to count.
    """
    for held in bench.running.held():
        if held.job.id in keep:
            continue
        try:
            jobs.release(bench.db, held.job, held.record)
            log.info("job %s: released in the middle of a step", held.job.id)
        except (LeaseLost, DatabaseUnavailable) as error:
            log.warning("job %s: not released: %s", held.job.id, error)


def _persist(bench: Bench, write: Callable[[], None]) -> None:
    """Tries for as long as the lease may still be ours, then lets the reaper have the job."""
    deadline = time.monotonic() + bench.settings.lease_seconds
    pause = 0.1
    while True:
        try:
            write()
            return
        except DatabaseUnavailable:
            if time.monotonic() + pause > deadline:
                bench.running.may_have_orphans = True
                raise
        time.sleep(pause)
        pause = min(pause * 2, MAX_PAUSE_SECONDS)
