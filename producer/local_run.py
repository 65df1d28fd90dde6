"""``--local``: starts a Redis and workers for the length of one run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from shared import embedded_redis, processes
from shared.command_errors import last_error
from shared.engines import engine_spec
from shared.errors import EngineUnavailable
from shared.settings import Settings

# The supervisor gives its workers 10 s; a little more lets it report before it is killed.
GRACE_SECONDS = 12.0


def require_engines(engines: Iterable[str]) -> None:
    """Raise EngineUnavailable if the library of an engine is not installed.

    The library is looked up but not imported. Any other fault is reported by the worker, after
    the rows are recorded; this one is known before.
    """
    for engine in sorted(engines):
        spec = engine_spec(engine)
        if find_spec(spec.library) is None:
            raise EngineUnavailable(
                f"{engine} cannot run here: {spec.library} is not installed; pip install "
                f"'inpaint-batch[{spec.extra}]', or submit without --local for workers elsewhere"
            )


class LocalWorkers:
    """One ``inpaint-worker`` per engine; their output goes to the file ``log``."""

    def __init__(
        self, settings: Settings, *, engines: Iterable[str], devices: str, roots: Sequence[Path]
    ) -> None:
        self.log = settings.home / "worker.log"
        self._stack = ExitStack()
        log_file = self._stack.enter_context(self.log.open("wb"))
        allowed = ",".join(str(root) for root in roots)
        self._processes = [
            processes.spawn(
                [
                    *processes.module_command("workers.supervisor"),
                    *("--engine", engine, "--devices", devices),
                ],
                env={**os.environ, "INPAINT_ROOTS": allowed},
                stdout=log_file,
                stderr=log_file,
            )
            for engine in sorted(engines)
        ]

    def check(self) -> None:
        """Raise EngineUnavailable with the worker's own message if one has exited."""
        if any(process.poll() is not None for process in self._processes):
            reason = last_error(
                self.log.read_text(errors="replace"),
                "inpaint-worker",
                default="the worker exited without an error message",
            )
            raise EngineUnavailable(f"{reason} (see {self.log})")

    def close(self) -> None:
        # All are asked to stop before the first is waited for, so that they stop together.
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            _wait_for_exit(process)
        self._stack.close()


def _wait_for_exit(process: subprocess.Popen[bytes]) -> None:
    processes.wait_or_kill(process, grace_seconds=GRACE_SECONDS)


@contextmanager
def running_redis(settings: Settings) -> Iterator[None]:
    """Run the embedded Redis, unless a broker is configured."""
    with embedded_redis.EmbeddedRedis(settings):
        yield


@contextmanager
def running_workers(
    settings: Settings, *, engines: Iterable[str], devices: str, roots: Sequence[Path]
) -> Iterator[LocalWorkers]:
    """Start the workers, and stop them at the end."""
    workers = LocalWorkers(settings, engines=engines, devices=devices, roots=roots)
    try:
        yield workers
    finally:
        workers.close()
