"""inpaint-worker: one process per device, restarted when it dies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import get_args

import click

from shared import embedded_redis, jobs, processes, settings
from shared.command_errors import exit_on_error, print_error
from shared.db import Database, schema
from shared.engines import engine_name, engine_spec
from shared.errors import EngineUnavailable, UnavailableError
from shared.processes import (
    EX_DEVICE_LOST,
    EX_DEVICE_LOST_LATER,
    EX_UNAVAILABLE,
    SAME_SIGNAL_SECONDS,
)
from shared.settings import Compile, Quantization, Settings
from workers.pixel_budget import default_megapixels

PROGRAM = "inpaint-worker"
MIN_PAUSE_SECONDS = 0.5
GRACE_SECONDS = 10.0
MAX_DEVICE_LOSSES = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--engine", help="sd2, opencv or diffusers:FOLDER_OR_HUB_ID[@REVISION].")
@click.option("--devices", default="all", show_default=True, help="all, cpu, or 0,1,...")
@click.option("--concurrency", type=click.IntRange(0, 256), help="Jobs in hand per process.")
@click.option("--max-batch", help="Rows per forward pass, or auto.")
@click.option("--deterministic", is_flag=True, default=None, help="The same bits in any company.")
@click.option("--compile", type=click.Choice(get_args(Compile)), help="torch.compile for the UNet.")
@click.option("--quantization", type=click.Choice(get_args(Quantization)), help="8-bit weights.")
@click.option("--check", is_flag=True, help="Load the engine on each device, say so, exit.")
def worker(
    engine: str | None,
    devices: str,
    concurrency: int | None,
    max_batch: str | None,
    deterministic: bool | None,
    compile: Compile | None,
    quantization: Quantization | None,
    check: bool,
) -> None:
    """Work on jobs until stopped: one process per device, one pipeline each.

    Run the same command on several machines and they form the fleet.
    """
    given = {
        "max_batch": max_batch,
        "deterministic": deterministic,
        "compile": compile,
        "quantization": quantization,
    }
    with exit_on_error(PROGRAM):
        configured = settings.load(**{k: v for k, v in given.items() if v is not None})
        chosen = engine_name(engine or configured.engine)
        places = find_places(devices, engine=chosen)
        options = [
            *("--engine", chosen),
            *("--concurrency", str(configured.concurrency if concurrency is None else concurrency)),
            *("--max-batch", str(configured.max_batch), "--compile", configured.compile),
            *("--quantization", configured.quantization),
            *("--megapixel-budget", str(_megapixel_budget(configured, len(places)))),
            *(["--deterministic"] if configured.deterministic else []),
        ]
        if check:
            sys.exit(_check(places, options))
        schema.ensure(db := Database(configured.database, pool_size=1))
        sys.exit(Supervisor(configured, db, places, options).run())


def _megapixel_budget(configured: Settings, processes: int) -> int:
    return configured.megapixel_budget or default_megapixels(processes)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs. ``cuda``: the index given to CUDA_VISIBLE_DEVICES, None for the CPU."""

    name: str
    cuda: str | None

    def command(self, options: Sequence[str], *, worker: str) -> list[str]:
        """worker: the name plus what tells one life of the process from the next."""
        device = "cpu" if self.cuda is None else "cuda"
        return [
            *(sys.executable, "-P", "-m", "workers.worker_process", *options),
            *("--device", device, "--name", self.name, "--worker", worker),
        ]

    def environment(self) -> dict[str, str]:
        visible = {} if self.cuda is None else {"CUDA_VISIBLE_DEVICES": self.cuda}
        return {**os.environ, **visible}


def find_places(devices: str, *, engine: str) -> list[Place]:
    """One place per device. Raises EngineUnavailable where a device is not there."""
    host = socket.gethostname()
    cpu = [Place(name=f"{host}-cpu", cuda=None)]
    if engine_spec(engine).device == "cpu" and devices not in ("all", "cpu"):
        raise EngineUnavailable(f"--devices: {engine} runs on the CPU, not on {devices!r}; use cpu")
    if devices == "cpu" or engine_spec(engine).device == "cpu":
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
        [sys.executable, "-P", "-m", "workers.engines.stable_diffusion.devices"],
        capture_output=True,
        check=False,
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
        subprocess.run(
            [*place.command(options, worker=place.name), "--check"],
            env=place.environment(),
            check=False,
        )
        for place in places
    ]
    return max(status.returncode for status in statuses)


class Supervisor:
    """Keeps one process per place alive until a signal; the second signal kills them."""

    def __init__(
        self, configured: Settings, db: Database, places: Sequence[Place], options: Sequence[str]
    ) -> None:
        self._redis = embedded_redis.EmbeddedRedis(configured)
        self._db = db
        self._children = [
            _Child(place, options, self._take_back, stable_seconds=configured.lease_seconds)
            for place in places
        ]
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
            self._db.close()

    def _take_back(self, worker: str, reason: str) -> None:
        """A process that ended holds nothing any more; nobody needs to wait for its leases."""
        try:
            reaped = jobs.reap_worker(self._db, worker=worker, reason=reason)
        except UnavailableError as error:
            print_error(PROGRAM, f"{error}; its jobs wait for their leases to end")
            return
        for lost in reaped:
            print_error(PROGRAM, f"job {lost.job}: {reason}; now {lost.state}")

    def _tend(self) -> None:
        try:
            self._redis.ensure()
        except UnavailableError as error:
            print_error(PROGRAM, error)
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
    def __init__(
        self,
        place: Place,
        options: Sequence[str],
        take_back: Callable[[str, str], None],
        *,
        stable_seconds: float,
    ) -> None:
        """stable_seconds: one that lived so long is started again at once when it dies."""
        self._place = place
        self._options = options
        self._take_back = take_back
        self._worker = ""
        self._device_losses = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._start_after = 0.0
        self._pause = MIN_PAUSE_SECONDS
        self._stable_seconds = stable_seconds
        self.given_up = False

    def tend(self, now: float) -> None:
        """Starts it, and starts it again when it died; waits longer the faster it dies."""
        if self.given_up:
            return
        if self._process is not None and (status := self._process.poll()) is not None:
            self._note_death(status, now)
        if self._process is None and now >= self._start_after and not self.given_up:
            self._worker = f"{self._place.name}-{secrets.token_hex(4)}"
            command = self._place.command(self._options, worker=self._worker)
            self._process = processes.spawn(command, env=self._place.environment())
            self._started = now

    def _note_death(self, status: int, now: float) -> None:
        self._process = None
        reason = f"signal {-status}" if status < 0 else f"status {status}"
        self._take_back(self._worker, f"the worker process ended with {reason}")
        self._count_device_losses(status)
        if status == EX_UNAVAILABLE or self.given_up:
            self.given_up = True
            return
        is_stable = now - self._started > self._stable_seconds
        longest = max(self._stable_seconds / 2, MIN_PAUSE_SECONDS)
        self._pause = MIN_PAUSE_SECONDS if is_stable else min(self._pause * 2, longest)
        self._start_after = now + self._pause
        print_error(
            PROGRAM,
            f"{self._place.name} ended with {reason}; starting it again in {self._pause:g} s",
        )

    def _count_device_losses(self, status: int) -> None:
        if status != EX_DEVICE_LOST:
            self._device_losses = int(status == EX_DEVICE_LOST_LATER)
            return
        self._device_losses += 1
        if self._device_losses >= MAX_DEVICE_LOSSES:
            self.given_up = True
            print_error(
                PROGRAM,
                f"{self._place.name} was lost {self._device_losses} times in a row without "
                "finishing a job; it is not started again. Look at its log and at nvidia-smi, "
                "then start inpaint-worker again",
            )

    def terminate(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            status = processes.wait_or_kill(self._process, grace_seconds=seconds)
            if status:
                self._take_back(self._worker, f"the worker was killed (status {status})")


if __name__ == "__main__":
    worker()
