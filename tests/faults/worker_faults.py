"""Faults inside a worker process, switched on by environment variables and prompts.

The prompt of a job makes the engine crash, hang or fail; variables set a wrong clock, a full disk
and short S3 timeouts.
"""

from __future__ import annotations

import ctypes
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
    fault, _, number = work.params.prompt.partition(" ")
    if fault == "crash":
        os.abort()
    elif fault == "freeze":
        # A PyDLL function keeps the interpreter lock: no thread of this process runs any more.
        ctypes.PyDLL(None).pause()
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "broken":
        raise EngineError("the device does not answer")
    elif fault == "lost":
        raise DeviceLost("the device fell off the bus")
    elif fault == "steps":
        for _ in range(int(number)):
            work.interruption.check()
            time.sleep(STEP_SECONDS)
    return _fill(work)


_fill, opencv.fill = opencv.fill, _misbehave


def _set_clock(seconds: float) -> None:
    """Puts this process's clock forward, or back if negative."""
    real_time, real = time.time, datetime.datetime

    class ShiftedDatetime(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    time.time = lambda: real_time() + seconds
    datetime.datetime = ShiftedDatetime  # type: ignore[misc]


def _fill_disk(switch: Path) -> None:
    """While the file ``switch`` exists, every fsync fails with ENOSPC."""
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if switch.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    os.fsync = fsync


if seconds := os.environ.get("FAULTS_CLOCK"):
    _set_clock(float(seconds))
if switch := os.environ.get("FAULTS_FULL_DISK"):
    _fill_disk(Path(switch))
if seconds := os.environ.get("FAULTS_S3_TIMEOUT"):
    s3.READ_SECONDS = float(seconds)
