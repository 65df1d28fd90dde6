"""Child processes that do not outlive their parent, and the exit statuses of a worker process."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO

# Exit statuses of a worker process, numbered after sysexits.h.
# The engine cannot be loaded: a restart would not help.
EX_UNAVAILABLE = 69
# The engine hangs.
EX_STALLED = 70
# The device was lost before any job had succeeded on it since the process started.
EX_DEVICE_LOST = 74
# The device was lost after jobs had succeeded on it.
EX_DEVICE_LOST_LATER = 75
# Ctrl-C can arrive twice, from the terminal and from the parent: a signal that follows within this
# time is the same one, not the user's second.
SAME_SIGNAL_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


def module_command(module: str) -> list[str]:
    """Return the command line that runs a module of ours in another Python process."""
    # -P: the current folder is the user's; a workers/ in it must not be imported.
    return [sys.executable, "-P", "-m", module]


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts a command that gets SIGTERM when this process dies, even by SIGKILL (Linux only).

    Call it from a thread that lives as long as the process: the kernel sends the signal when the
    thread that spawned the child ends. The child has its own process group, so that Ctrl-C in the
    terminal reaches only the parent.
    """
    return subprocess.Popen(
        list(command),
        env=dict(env) if env is not None else None,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        process_group=0,
        preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one prctl call, prepared beforehand
    )


def _die_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    # Load libc before the fork: after it, another thread may hold the loader's lock for ever.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def set_parent_death_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return set_parent_death_signal


def stop(process: subprocess.Popen[bytes], *, grace_seconds: float) -> int:
    """Sends SIGTERM, and SIGKILL after ``grace_seconds``; returns the exit status."""
    if process.poll() is None:
        process.terminate()
    return wait_or_kill(process, grace_seconds=grace_seconds)


def wait_or_kill(process: subprocess.Popen[bytes], *, grace_seconds: float) -> int:
    """Waits for a process to end; sends SIGKILL after ``grace_seconds``. Returns the status."""
    try:
        return process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
