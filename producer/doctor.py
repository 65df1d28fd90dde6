"""inpaint-jobs doctor: checks everything that a run needs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shared import embedded_redis
from shared.command_errors import last_error
from shared.db import Database, schema
from shared.errors import DatabaseUnavailable, InpaintError, UnavailableError
from shared.jobs.queue import Queue
from shared.processes import module_command
from shared.settings import Settings

# A model that is not in the cache yet is downloaded first.
ENGINE_CHECK_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    verdict: ``ok``, ``note`` (a fault for some uses only) or ``bad``; the text of a bad one
    ends with the remedy.
    """

    subject: str
    verdict: str
    text: str

    @property
    def is_bad(self) -> bool:
        return self.verdict == "bad"

    def __str__(self) -> str:
        return f"{self.subject:<9} {self.verdict:<5} {self.text}"


def run_checks(settings: Settings, *, engine: str | None, devices: str) -> Iterator[Check]:
    """Check database, broker, storage and engine; a bad one does not stop the others."""
    yield _check("database", lambda: _check_database(settings))
    yield _check_broker(settings)
    yield from _check_storage(settings)
    yield _check_engine(engine or settings.engine, devices)


def _check(subject: str, examine: Callable[[], str]) -> Check:
    """ok with the text that ``examine`` returns, or bad with the error that it raises."""
    try:
        return Check(subject=subject, verdict="ok", text=examine())
    except InpaintError as error:
        return Check(subject=subject, verdict="bad", text=str(error))


def _check_database(settings: Settings) -> str:
    db = Database(settings.database)
    try:
        # Apart from the schema check, whose errors have another remedy.
        _connect(db)
        schema.ensure(db)
        return f"{db}, revision {schema.current_revision(db)}"
    finally:
        db.close()


def _connect(db: Database) -> None:
    try:
        schema.current_revision(db)
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(f"{error}; check INPAINT_DATABASE_URL and the server") from error


def _check_broker(settings: Settings) -> Check:
    try:
        queue = Queue(embedded_redis.broker_url(settings))
    except UnavailableError as error:
        return Check(subject="broker", verdict="bad", text=str(error))
    try:
        return Check(subject="broker", verdict="ok", text=f"{queue}, version {queue.ping()}")
    except UnavailableError as error:
        if settings.broker_url is not None:
            return Check(subject="broker", verdict="bad", text=f"{error}; start Redis there")
        return _check("broker", lambda: _start_embedded_redis(settings))
    finally:
        queue.close()


def _start_embedded_redis(settings: Settings) -> str:
    with embedded_redis.EmbeddedRedis(settings):
        return "embedded, not running now; inpaint-worker and --local start it"


def _check_storage(settings: Settings) -> Iterator[Check]:
    for root in settings.roots:
        yield _check_root(root)
    for bucket in settings.buckets:
        yield _check("storage", lambda bucket=bucket: _check_bucket(bucket))  # type: ignore[misc]
    if not settings.buckets:
        text = "S3 was not checked: INPAINT_BUCKETS names no bucket"
        yield Check(subject="storage", verdict="note", text=text)


def _check_root(root: Path) -> Check:
    if os.access(root, os.R_OK | os.W_OK):
        return Check(subject="storage", verdict="ok", text=f"{root} can be read and written")
    return Check(
        subject="storage",
        verdict="bad",
        text=f"{root} cannot be written; create it, give this user access, or see INPAINT_ROOTS",
    )


def _check_bucket(bucket: str) -> str:
    from shared.storage import Storage

    try:
        Storage(roots=(), buckets=(bucket,)).check_bucket(bucket)
    except InpaintError as error:
        raise type(error)(f"{error}; check INPAINT_BUCKETS and AWS_ENDPOINT_URL") from error
    return f"s3://{bucket} answers"


def _check_engine(engine: str, devices: str) -> Check:
    """Load the engine with ``inpaint-worker --check``, since the producer loads none."""
    if find_spec("workers") is None:
        text = "no worker is installed here; a producer needs none"
        return Check(subject="engine", verdict="note", text=text)
    command = [
        *module_command("workers.supervisor"),
        *("--check", "--engine", engine, "--devices", devices),
    ]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=ENGINE_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"did not load within {ENGINE_CHECK_SECONDS} s; see its output: {' '.join(command)}"
        return Check(subject="engine", verdict="bad", text=text)
    if process.returncode == 0:
        return Check(subject="engine", verdict="ok", text="; ".join(process.stdout.splitlines()))
    default = "the check exited without an error message"
    reason = last_error(process.stderr, "inpaint-worker", default=default)
    return Check(subject="engine", verdict="bad", text=reason)
