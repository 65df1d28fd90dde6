"""Watchdog: a worker process pings its supervisor, which kills it once the pings stop.

A process cannot watch itself: native code that holds the interpreter lock stops every thread,
heartbeats and signal handlers included.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

MAX_PING_SECONDS = 1.0
PINGS_PER_LIMIT = 10
# The limit is reached by at least this many checks, all without a ping.
CHECKS_PER_LIMIT = 4
_PIPE_BYTES = 65536


class Watchdog:
    """The supervisor's end of a pipe that one worker process writes its pings to.

    Expires ``limit_seconds`` after the last ping. Before the first ping it never does: loading a
    model may hold the interpreter lock for long, and the process holds no lease yet.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._has_started = False
        self._silent_seconds = 0.0
        self._checked_at: float | None = None

    def is_expired(self, now: float) -> bool:
        """now: monotonic, in seconds."""
        elapsed = 0.0 if self._checked_at is None else now - self._checked_at
        self._checked_at = now
        if self._read_pings():
            self._has_started, self._silent_seconds = True, 0.0
        elif self._has_started:
            # After a long gap between two checks this process was suspended, perhaps with the
            # whole machine: the gap counts as a short one.
            self._silent_seconds += min(elapsed, self._limit_seconds / CHECKS_PER_LIMIT)
        return self._silent_seconds >= self._limit_seconds

    def _read_pings(self) -> bytes:
        try:
            return os.read(self._reader, _PIPE_BYTES)
        except BlockingIOError:
            return b""

    def close_writer(self) -> None:
        """Call it once the process is started: it has its own copy."""
        os.close(self.writer)

    def close(self) -> None:
        os.close(self._reader)


def start_pings(writer: int, *, limit_seconds: float) -> None:
    """Pings from a thread of its own for as long as this process runs.

    writer: descriptor of the pipe's end. limit_seconds: the limit of its Watchdog.
    """
    seconds = min(MAX_PING_SECONDS, limit_seconds / PINGS_PER_LIMIT)
    # Not to be inherited: a grandchild could outlive this process.
    os.set_inheritable(writer, False)
    threading.Thread(target=_ping, args=(writer, seconds), name="pings", daemon=True).start()


def _ping(writer: int, seconds: float) -> None:
    # The supervisor may be gone; this process then gets SIGTERM anyway.
    with suppress(BrokenPipeError):
        while True:
            os.write(writer, b".")
            time.sleep(seconds)
