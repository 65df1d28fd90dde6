"""inpaint-worker: one process per device, restarted when it dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import click

from shared import embedded, processes, schema, settings
from shared.db import Database
from shared.errors import EngineUnavailable, InpaintError, UnavailableError
from shared.params import engine_name, is_native
from shared.processes import EX_UNAVAILABLE, SAME_SIGNAL_SECONDS
from shared.settings import Settings

STABLE_SECONDS = 60.0
MAX_PAUSE_SECONDS = 30.0
GRACE_SECONDS = 10.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--engine", help="sd2, opencv or diffusers:FOLDER_OR_HUB_ID[@REVISION].")
@click.option("--devices", default="all", show_default=True, help="all, cpu, or 0,1,...")
@click.option("--concurrency", type=click.IntRange(0, 256), help="Jobs in hand per process.")
@click.option("--max-batch", type=click.IntRange(1, 256), help="Rows per forward pass.")
@click.option("--check", is_flag=True, help="Load the engine on each device, say so, exit.")
def worker(
    engine: str | None,
    devices: str,
    concurrency: int | None,
    max_batch: int | None,
    check: bool,
) -> None:
    """Work on jobs until stopped: one process per device, one pipeline each.

    Run the same command on several machines and they form the fleet.
    """
    try:
        configured = settings.load()
        chosen = engine_name(engine or configured.engine)
        places = find_places(devices, engine=chosen)
        options = [
            *("--engine", chosen),
            *("--concurrency", str(configured.concurrency if concurrency is None else concurrency)),
            *("--max-batch", str(max_batch or configured.max_batch)),
        ]
        if check:
            sys.exit(_check(places, options))
        schema.ensure(db := Database(configured.database))
        db.close()
        sys.exit(Supervisor(configured, places, options).run())
    except InpaintError as error:
        click.echo(f"inpaint-worker: {error}", err=True)
        sys.exit(2)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs. ``cuda``: the index given to CUDA_VISIBLE_DEVICES, None for the CPU."""

    name: str
    cuda: str | None

    def command(self, options: Sequence[str]) -> list[str]:
        device = "cpu" if self.cuda is None else "cuda"
        return [
            *(sys.executable, "-m", "workers.tasks", *options),
            *("--device", device, "--name", self.name),
        ]

    def environment(self) -> dict[str, str]:
        visible = {} if self.cuda is None else {"CUDA_VISIBLE_DEVICES": self.cuda}
        return {**os.environ, **visible}


def find_places(devices: str, *, engine: str) -> list[Place]:
    """One place per device. Raises EngineUnavailable where a device is not there."""
    host = socket.gethostname()
    cpu = [Place(name=f"{host}-cpu", cuda=None)]
    if is_native(engine) and devices not in ("all", "cpu"):
        raise EngineUnavailable(f"--devices: {engine} runs on the CPU, not on {devices!r}; use cpu")
    if devices == "cpu" or is_native(engine):
        return cpu
    found = _cuda_indexes()
    if devices == "all":
        if not found:
            raise EngineUnavailable(
                f"no CUDA device for engine {engine!r}; on a machine without one, "
                "say --devices cpu (slow) or --engine opencv"
            )
        return [Place(name=f"{host}-cuda{index}", cuda=index) for index in found]
    wanted = [part.strip() for part in devices.split(",")]
    missing = [part for part in wanted if part not in found]
    if missing:
        known = ", ".join(found) or "none"
        raise EngineUnavailable(
            f"--devices: no CUDA device {missing[0]!r} here; there are: {known}"
        )
    return [Place(name=f"{host}-cuda{index}", cuda=index) for index in wanted]


def _cuda_indexes() -> list[str]:
    """What a child that loads torch sees; this process never touches CUDA."""
    answer = subprocess.run(
        [sys.executable, "-m", "workers.engines.devices"], capture_output=True, check=False
    )
    if answer.returncode != 0:
        raise EngineUnavailable(f"torch does not start: {_last_line(answer.stderr)}")
    found = json.loads(answer.stdout)
    if found["torch"] is None:
        raise EngineUnavailable("torch is not installed; pip install 'inpaint-batch[worker]'")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    indexes = visible.split(",") if visible else [str(n) for n in range(len(found["cuda"]))]
    return indexes[: len(found["cuda"])]


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _check(places: Sequence[Place], options: Sequence[str]) -> int:
    statuses = [
        subprocess.run([*place.command(options), "--check"], env=place.environment(), check=False)
        for place in places
    ]
    return max(status.returncode for status in statuses)


class Supervisor:
    """Keeps one process per place alive until a signal; the second signal kills them."""

    def __init__(
        self, configured: Settings, places: Sequence[Place], options: Sequence[str]
    ) -> None:
        self._redis = embedded.EmbeddedRedis(configured)
        self._children = [_Child(place, options) for place in places]
        self._stopping = False
        self._asked = 0.0

    def run(self) -> int:
        """Returns the exit status: 0 after a signal, 69 where no engine can be loaded."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._redis.ensure()
            while not self._stopping:
                self._tend()
                if all(child.given_up for child in self._children):
                    return EX_UNAVAILABLE
                time.sleep(0.2)
            return self._stop_children()
        finally:
            self._redis.close()

    def _tend(self) -> None:
        try:
            self._redis.ensure()
        except UnavailableError as error:
            click.echo(f"inpaint-worker: {error}", err=True)
        for child in self._children:
            child.tend(time.monotonic())

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping and time.monotonic() - self._asked > SAME_SIGNAL_SECONDS:
            for child in self._children:
                child.kill()
        if not self._stopping:
            self._asked = time.monotonic()
        self._stopping = True

    def _stop_children(self) -> int:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait(GRACE_SECONDS)
        return 0


class _Child:
    def __init__(self, place: Place, options: Sequence[str]) -> None:
        self._place = place
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._start_after = 0.0
        self._pause = 0.5
        self.given_up = False

    def tend(self, now: float) -> None:
        """Starts it, and starts it again when it died; waits longer the faster it dies."""
        if self.given_up:
            return
        if self._process is not None and (status := self._process.poll()) is not None:
            self._note_death(status, now)
        if self._process is None and now >= self._start_after and not self.given_up:
            command = self._place.command(self._options)
            self._process = processes.spawn(command, env=self._place.environment())
            self._started = now

    def _note_death(self, status: int, now: float) -> None:
        self._process = None
        if status == EX_UNAVAILABLE:
            self.given_up = True
            return
        self._pause = (
            0.5 if now - self._started > STABLE_SECONDS else min(self._pause * 2, MAX_PAUSE_SECONDS)
        )
        self._start_after = now + self._pause
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        click.echo(
            f"inpaint-worker: {self._place.name} ended with {reason}; "
            f"starting it again in {self._pause:g} s",
            err=True,
        )

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            processes.await_end(self._process, grace_seconds=seconds)


if __name__ == "__main__":
    worker()
