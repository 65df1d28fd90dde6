"""What the tests change inside a worker process: an engine that misbehaves as a job's prompt
says, a clock that is wrong, a disk that is full, timeouts that are short."""

from __future__ import annotations

import datetime
import errno
import os
import time
from pathlib import Path

from shared.errors import DeviceLost, EngineError
from shared.storage import s3
from workers.engines import opencv
from workers.engines.protocol import Pixels, RegionWork

STEP_SECONDS = 0.01


def _misbehave(work: RegionWork) -> Pixels:
    word, _, number = work.params.prompt.partition(" ")
    if word == "crash":
        os.abort()
    elif word == "hang":
        time.sleep(3600)
    elif word == "broken":
        raise EngineError("the device does not answer")
    elif word == "lost":
        raise DeviceLost("the device fell off the bus")
    elif word == "steps":
        for _ in range(int(number)):
            work.interruption.check()
            time.sleep(STEP_SECONDS)
    return _fill(work)


_fill, opencv.fill = opencv.fill, _misbehave


def _set_clock(seconds: float) -> None:
    right, real = time.time, datetime.datetime

    class Wrong(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    time.time = lambda: right() + seconds
    datetime.datetime = Wrong  # type: ignore[misc]


def _fill_disk(switch: Path) -> None:
    """While the file ``switch`` is there, no byte more fits on the disk."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if switch.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = fsync


if seconds := os.environ.get("FAULTS_CLOCK"):
    _set_clock(float(seconds))
if switch := os.environ.get("FAULTS_FULL_DISK"):
    _fill_disk(Path(switch))
if seconds := os.environ.get("FAULTS_S3_TIMEOUT"):
    s3.READ_SECONDS = float(seconds)
