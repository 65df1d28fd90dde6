"""``--local``: everything that is missing, started for the length of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from shared import embedded_redis, processes
from shared.command_errors import last_error
from shared.engines import engine_spec
from shared.errors import EngineUnavailable
from shared.settings import Settings

GRACE_SECONDS = 12.0


def require_engines(engines: Iterable[str]) -> None:
    """Raises EngineUnavailable where an engine cannot run here for want of a library.

    Nothing is imported: a worker says what else is wrong, this is known before any row is
    recorded.
    """
    for engine in sorted(engines):
        spec = engine_spec(engine)
        if find_spec(spec.library) is None:
            raise EngineUnavailable(
                f"{engine} cannot run here: {spec.library} is not installed; pip install "
                f"'inpaint-batch[{spec.extra}]', or submit without --local for workers elsewhere"
            )


class LocalWorkers:
    """``inpaint-worker`` once per engine; what they print goes to ``log``."""

    def __init__(
        self, settings: Settings, *, engines: Iterable[str], devices: str, roots: Sequence[Path]
    ) -> None:
        self.log = settings.home / "worker.log"
        self._stack = ExitStack()
        file = self._stack.enter_context(self.log.open("wb"))
        allowed = ",".join(str(root) for root in roots)
        self._processes = [
            processes.spawn(
                [
                    *(sys.executable, "-P", "-m", "workers.supervisor"),
                    *("--engine", engine, "--devices", devices),
                ],
                env={**os.environ, "INPAINT_ROOTS": allowed},
                stdout=file,
                stderr=file,
            )
            for engine in sorted(engines)
        ]

    def check(self) -> None:
        """Raises EngineUnavailable with the worker's own reason where one has given up."""
        if any(process.poll() is not None for process in self._processes):
            raise EngineUnavailable(f"{self._reason()} (see {self.log})")

    def _reason(self) -> str:
        return last_error(
            self.log.read_text(errors="replace"),
            "inpaint-worker",
            default="the worker exited without an error message",
        )

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            _reap(process)
        self._stack.close()


def _reap(process: subprocess.Popen[bytes]) -> None:
    processes.wait_or_kill(process, grace_seconds=GRACE_SECONDS)


@contextmanager
def running_redis(settings: Settings) -> Iterator[None]:
    """The embedded Redis, unless a broker is configured."""
    with embedded_redis.EmbeddedRedis(settings):
        yield


@contextmanager
def running_workers(
    settings: Settings, *, engines: Iterable[str], devices: str, roots: Sequence[Path]
) -> Iterator[LocalWorkers]:
    workers = LocalWorkers(settings, engines=engines, devices=devices, roots=roots)
    try:
        yield workers
    finally:
        workers.close()
