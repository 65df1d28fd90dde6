"""Child processes that do not outlive their parent."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

# Exit statuses of a worker process, after sysexits. 69: starting it again would not help.
EX_UNAVAILABLE = 69
# Its engine hangs.
EX_STALLED = 70
# Its device was lost, and no job had succeeded on it since the process started.
EX_DEVICE_LOST = 74
# Its device was lost, after jobs had succeeded.
EX_DEVICE_LOST_LATER = 75
# A launcher and a terminal may both pass one signal on: what comes this soon is no second one.
SAME_SIGNAL_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a command that gets SIGTERM when this process dies, kill -9 included (Linux).

    Call it from a thread that lives as long as the process: the kernel watches the thread.
    It gets a process group of its own, so that Ctrl-C reaches only its parent.
    """
    return subprocess.Popen(
        list(command),
        env=dict(env) if env is not None else None,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one prctl call, prepared beforehand
    )


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return ask


def stop(process: subprocess.Popen[bytes], *, grace_seconds: float) -> int:
    """SIGTERM, then SIGKILL after the grace; returns the exit status."""
    if process.poll() is None:
        process.terminate()
    return wait_or_kill(process, grace_seconds=grace_seconds)


def wait_or_kill(process: subprocess.Popen[bytes], *, grace_seconds: float) -> int:
    """Waits for a process that was asked to end; SIGKILL after the grace."""
    try:
        return process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
