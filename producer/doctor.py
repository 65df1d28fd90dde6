"""inpaint-jobs doctor: is everything there that a run needs?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from shared import embedded_redis
from shared.command_errors import last_error
from shared.db import Database, schema
from shared.errors import DatabaseUnavailable, InpaintError, UnavailableError
from shared.jobs.queue import Queue
from shared.settings import Settings

CHECK_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``ok``, ``note`` (fine for some uses) or ``bad``; ``text`` ends with the remedy."""

    what: str
    verdict: str
    text: str

    @property
    def bad(self) -> bool:
        return self.verdict == "bad"

    def __str__(self) -> str:
        return f"{self.what:<9} {self.verdict:<5} {self.text}"


def run_checks(settings: Settings, *, engine: str | None, devices: str) -> Iterator[Verdict]:
    yield _verdict("database", lambda: _database(settings))
    yield _broker(settings)
    yield from _storage(settings)
    yield _engine(engine or settings.engine, devices)


def _verdict(what: str, examined: Callable[[], str]) -> Verdict:
    try:
        return Verdict(what=what, verdict="ok", text=examined())
    except InpaintError as error:
        return Verdict(what=what, verdict="bad", text=str(error))


def _database(settings: Settings) -> str:
    db = Database(settings.database)
    try:
        _reach(db)
        schema.ensure(db)
        return f"{db}, revision {schema.current_revision(db)}"
    finally:
        db.close()


def _reach(db: Database) -> None:
    try:
        schema.current_revision(db)
    except DatabaseUnavailable as error:
        raise DatabaseUnavailable(f"{error}; check INPAINT_DATABASE_URL and the server") from error


def _broker(settings: Settings) -> Verdict:
    queue = Queue(embedded_redis.broker_url(settings))
    try:
        return Verdict(what="broker", verdict="ok", text=f"{queue}, version {queue.ping()}")
    except UnavailableError as error:
        if settings.broker_url is not None:
            return Verdict(what="broker", verdict="bad", text=f"{error}; start Redis there")
        return _embedded_broker(settings)
    finally:
        queue.close()


def _embedded_broker(settings: Settings) -> Verdict:
    def examined() -> str:
        with embedded_redis.EmbeddedRedis(settings):
            return "embedded, not running now; inpaint-worker and --local start it"

    return _verdict("broker", examined)


def _storage(settings: Settings) -> Iterator[Verdict]:
    for root in settings.roots:
        writable = os.access(root, os.R_OK | os.W_OK)
        yield Verdict(
            what="storage",
            verdict="ok" if writable else "bad",
            text=f"{root} can be read and written"
            if writable
            else f"{root} cannot be written; make it, give this user rights, or see INPAINT_ROOTS",
        )
    for bucket in settings.buckets:
        yield _verdict("storage", lambda bucket=bucket: _bucket(bucket))  # type: ignore[misc]
    if not settings.buckets:
        text = "S3 not tried: INPAINT_BUCKETS names no bucket"
        yield Verdict(what="storage", verdict="note", text=text)


def _bucket(bucket: str) -> str:
    from shared.storage import Storage

    try:
        Storage(roots=(), buckets=(bucket,)).check_bucket(bucket)
    except InpaintError as error:
        raise type(error)(f"{error}; check INPAINT_BUCKETS and AWS_ENDPOINT_URL") from error
    return f"s3://{bucket} answers"


def _engine(engine: str, devices: str) -> Verdict:
    """Loaded by the worker's own code, in a process of its own."""
    if find_spec("workers") is None:
        text = "no worker is installed here; fine for a producer"
        return Verdict(what="engine", verdict="note", text=text)
    command = [
        *(sys.executable, "-P", "-m", "workers.supervisor", "--check"),
        *("--engine", engine, "--devices", devices),
    ]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Verdict(what="engine", verdict="bad", text=f"did not load in {CHECK_SECONDS} s")
    if answer.returncode == 0:
        return Verdict(what="engine", verdict="ok", text="; ".join(answer.stdout.splitlines()))
    reason = last_error(
        answer.stderr, "inpaint-worker", default="the check exited without an error message"
    )
    return Verdict(what="engine", verdict="bad", text=reason)
