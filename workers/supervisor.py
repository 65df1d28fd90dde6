"""inpaint-worker: one worker process per device, restarted when it dies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
    module_command,
)
from shared.settings import Compile, Quantization, Settings
from workers.pixel_budget import default_megapixels
from workers.watchdog import Watchdog

PROGRAM = "inpaint-worker"
POLL_SECONDS = 0.2
MIN_PAUSE_SECONDS = 0.5
GRACE_SECONDS = 10.0
# A frozen process that is aborted needs a moment to write where its threads are.
ABORT_SECONDS = 1.0
MAX_DEVICE_LOSSES = 5
# Settings that options of this command override; worker processes read the environment instead.
OPTION_SETTINGS = {"concurrency", "max_batch", "compile", "quantization", "deterministic"}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="inpaint-batch", prog_name=PROGRAM)
@click.option("--engine", help="sd2, opencv or diffusers:FOLDER_OR_HUB_ID[@REVISION].")
@click.option("--devices", default="all", show_default=True, help="all, cpu, or 0,1,...")
@click.option(
    "--concurrency", type=click.IntRange(0, 256), help="Concurrent jobs per process; 0: automatic."
)
@click.option("--max-batch", help="Rows per forward pass, or auto.")
@click.option(
    "--deterministic",
    is_flag=True,
    default=None,
    help="Bit-identical results whatever else is in the batch.",
)
@click.option("--compile", type=click.Choice(get_args(Compile)), help="torch.compile for the UNet.")
@click.option("--quantization", type=click.Choice(get_args(Quantization)), help="8-bit weights.")
@click.option("--check", is_flag=True, help="Load the engine on each device, print it, exit.")
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
    """Work on jobs until stopped: one process per device.

    Run the same command on several machines and they form the fleet.
    """
    options = {
        "concurrency": concurrency,
        "max_batch": max_batch,
        "deterministic": deterministic,
        "compile": compile,
        "quantization": quantization,
    }
    with exit_on_error(PROGRAM):
        configured = settings.load(**{k: v for k, v in options.items() if v is not None})
        name = engine_name(engine or configured.engine)
        slots = find_slots(devices, engine=name)
        variables = settings_variables(configured, processes=len(slots))
        if check:
            sys.exit(_check(slots, name, variables))
        schema.ensure(db := Database(configured.database, pool_size=1))
        db.close()  # a connection that idles until a process dies may lead to a demoted server
        sys.exit(Supervisor(configured, db, slots, engine=name, variables=variables).run())


def settings_variables(configured: Settings, *, processes: int) -> dict[str, str]:
    """Return the environment variables that pass these settings to each worker process.

    processes: how many share the memory of this machine.
    """
    values = configured.model_dump(include=OPTION_SETTINGS)
    values["megapixel_budget"] = configured.megapixel_budget or default_megapixels(processes)
    return {_variable(name): str(value) for name, value in values.items()}


def _old_names(variables: Mapping[str, str]) -> list[str]:
    """Return the old names of these settings: a process that gets both names logs a warning."""
    renamed = settings.RENAMED.items()
    return [_variable(old) for old, new in renamed if _variable(new) in variables]


def _variable(setting: str) -> str:
    return settings.PREFIX + setting.upper()


@dataclass(frozen=True, kw_only=True)
class DeviceSlot:
    """A device for one worker process. name: host and device, stable over restarts.

    cuda_index: for CUDA_VISIBLE_DEVICES; None for the CPU.
    """

    name: str
    cuda_index: str | None

    def command(self, engine: str, *, worker: str) -> list[str]:
        """Return the command line of a worker process; worker: its unique name."""
        device = "cpu" if self.cuda_index is None else "cuda"
        return [
            *(*module_command("workers.worker_process"), "--engine", engine),
            *("--device", device, "--name", self.name, "--worker", worker),
        ]

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return this process's environment with ``variables`` set and only this device visible."""
        # A variable in lower case sets a setting too, and could take precedence.
        replaced = {*variables, *_old_names(variables)}
        inherited = {k: v for k, v in os.environ.items() if k.upper() not in replaced}
        visible = {} if self.cuda_index is None else {"CUDA_VISIBLE_DEVICES": self.cuda_index}
        return {**inherited, **variables, **visible}


def find_slots(devices: str, *, engine: str) -> list[DeviceSlot]:
    """One slot per device. Raises EngineUnavailable if a device does not exist."""
    host = socket.gethostname()
    runs_on_cpu = engine_spec(engine).device == "cpu"
    if runs_on_cpu and devices not in ("all", "cpu"):
        raise EngineUnavailable(f"--devices: {engine} runs on the CPU, not on {devices!r}; use cpu")
    if runs_on_cpu or devices == "cpu":
        return [DeviceSlot(name=f"{host}-cpu", cuda_index=None)]
    indexes = _choose_cuda_indexes(devices, _cuda_indexes(), engine=engine)
    return [DeviceSlot(name=f"{host}-cuda{index}", cuda_index=index) for index in indexes]


def _choose_cuda_indexes(devices: str, available: Sequence[str], *, engine: str) -> Sequence[str]:
    if devices == "all":
        if not available:
            raise EngineUnavailable(
                f"no CUDA device for engine {engine!r}; on a machine without one, "
                "use --devices cpu (slow) or --engine opencv"
            )
        return available
    chosen = [part.strip() for part in devices.split(",")]
    missing = [index for index in chosen if index not in available]
    if missing:
        known = ", ".join(available) or "none"
        raise EngineUnavailable(
            f"--devices: no CUDA device {missing[0]!r} here; there are: {known}"
        )
    return chosen


def _cuda_indexes() -> list[str]:
    """List the CUDA devices in a child process: this process must not initialise CUDA."""
    child = subprocess.run(
        module_command("workers.engines.stable_diffusion.devices"),
        capture_output=True,
        check=False,
    )
    if child.returncode != 0:
        raise EngineUnavailable(f"torch does not start: {_last_line(child.stderr)}")
    report = json.loads(child.stdout)
    if report["torch"] is None:
        raise EngineUnavailable("torch is not installed; pip install 'inpaint-batch[worker]'")
    count = len(report["cuda"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    indexes = visible.split(",") if visible else [str(index) for index in range(count)]
    return indexes[:count]


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _check(slots: Sequence[DeviceSlot], engine: str, variables: Mapping[str, str]) -> int:
    """Load the engine on each device in turn; return the highest exit status."""
    children = [
        subprocess.run(
            [*slot.command(engine, worker=slot.name), "--check"],
            env=slot.environment(variables),
            check=False,
        )
        for slot in slots
    ]
    return max(child.returncode for child in children)


class Supervisor:
    """Keeps one process per slot alive until a signal; a second signal kills them.

    variables: environment variables of every process.
    """

    def __init__(
        self,
        configured: Settings,
        db: Database,
        slots: Sequence[DeviceSlot],
        *,
        engine: str,
        variables: Mapping[str, str],
    ) -> None:
        self._redis = embedded_redis.EmbeddedRedis(configured)
        self._db = db
        self._children = [
            _Child(
                slot,
                engine=engine,
                variables=variables,
                reap=self._reap,
                stable_seconds=configured.lease_seconds,
                freeze_seconds=configured.freeze_limit_seconds,
            )
            for slot in slots
        ]
        self._stopping = False
        self._first_signal_at = 0.0

    def run(self) -> int:
        """Return the exit status: 0 after a signal, 69 once every slot is given up."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            # Before any worker starts: it would only log that the broker does not answer.
            self._redis.ensure()
            while not self._stopping:
                self._restart_dead_children()
                if all(child.given_up for child in self._children):
                    return EX_UNAVAILABLE
                time.sleep(POLL_SECONDS)
            return self._stop_children()
        finally:
            self._redis.close()
            self._db.close()

    def _restart_dead_children(self) -> None:
        try:
            self._redis.ensure()
        except UnavailableError as error:
            print_error(PROGRAM, error)
        for child in self._children:
            child.restart_if_exited(time.monotonic())

    def _reap(self, worker: str, reason: str) -> None:
        """End a dead process's attempts at once, instead of when their leases expire."""
        try:
            reaped = jobs.reap_worker(self._db, worker=worker, reason=reason)
        except UnavailableError as error:
            print_error(PROGRAM, f"{error}; the jobs of {worker} wait for their leases to expire")
            return
        finally:
            self._db.close()
        for lost in reaped:
            print_error(PROGRAM, f"job {lost.job}: {reason}; now {lost.state}")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        # A terminal and a service manager may both deliver the same request to stop.
        if self._stopping and time.monotonic() - self._first_signal_at > SAME_SIGNAL_SECONDS:
            for child in self._children:
                child.kill()
        if not self._stopping:
            self._first_signal_at = time.monotonic()
        self._stopping = True

    def _stop_children(self) -> int:
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait(GRACE_SECONDS)
        return 0


class _Child:
    """The worker process of one slot, started again when it exits."""

    def __init__(
        self,
        slot: DeviceSlot,
        *,
        engine: str,
        variables: Mapping[str, str],
        reap: Callable[[str, str], None],
        stable_seconds: float,
        freeze_seconds: float,
    ) -> None:
        """reap: called with a dead process's worker name and the reason.

        stable_seconds: a process that lived longer is restarted after the shortest pause.
        freeze_seconds: a process that does not run for this long is killed.
        """
        self._slot = slot
        self._engine = engine
        self._variables = variables
        self._reap = reap
        self._worker = ""
        self._device_losses = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: Watchdog | None = None
        self._freeze_seconds = freeze_seconds
        self._aborted_at: float | None = None
        self._started = 0.0
        self._start_after = 0.0
        self._pause = MIN_PAUSE_SECONDS
        self._stable_seconds = stable_seconds
        self.given_up = False

    def restart_if_exited(self, now: float) -> None:
        """Start the process unless it runs; each early exit doubles the pause before the next."""
        if self.given_up:
            return
        self._kill_if_frozen(now)
        if self._process is not None and (status := self._process.poll()) is not None:
            self._handle_exit(status, now)
        if self._process is None and now >= self._start_after and not self.given_up:
            self._start(now)

    def _start(self, now: float) -> None:
        # A new name for each process: it must not renew the leases of its predecessor.
        self._worker = f"{self._slot.name}-{secrets.token_hex(4)}"
        self._watchdog = watchdog = Watchdog(self._freeze_seconds)
        command = self._slot.command(self._engine, worker=self._worker)
        self._process = processes.spawn(
            [*command, "--watchdog", str(watchdog.writer)],
            env=self._slot.environment(self._variables),
            pass_fds=[watchdog.writer],
        )
        watchdog.close_writer()
        self._started, self._aborted_at = now, None

    def _kill_if_frozen(self, now: float) -> None:
        if self._process is None or self._watchdog is None:
            return
        if self._aborted_at is not None:
            # A process that is stopped, or busy with its core dump, does not end by an abort.
            if now - self._aborted_at > ABORT_SECONDS:
                self._process.kill()
        elif self._watchdog.is_expired(now):
            # faulthandler writes where every thread is; it needs no interpreter lock.
            self._process.send_signal(signal.SIGABRT)
            self._aborted_at = now

    def _handle_exit(self, status: int, now: float) -> None:
        reason = self._reason(status)
        self._process = None
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        self._reap(self._worker, f"the worker process {reason}")
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
            f"{self._slot.name} {reason}; starting it again in {self._pause:g} s",
        )

    def _reason(self, status: int) -> str:
        if self._aborted_at is not None:
            return f"did not run for {self._freeze_seconds:g} s and was killed"
        return "ended with " + (f"signal {-status}" if status < 0 else f"status {status}")

    def _count_device_losses(self, status: int) -> None:
        if status != EX_DEVICE_LOST:
            # A process that lost its device after a success is the first of a new series.
            self._device_losses = int(status == EX_DEVICE_LOST_LATER)
            return
        self._device_losses += 1
        if self._device_losses >= MAX_DEVICE_LOSSES:
            self.given_up = True
            print_error(
                PROGRAM,
                f"{self._slot.name} was lost {self._device_losses} times in a row without "
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
        """Wait for a terminated process to exit; kill it after ``seconds``."""
        if self._process is not None:
            status = processes.wait_or_kill(self._process, grace_seconds=seconds)
            # A process that exits with status 0 has released its jobs itself.
            if status:
                self._reap(self._worker, f"the worker was killed (status {status})")


if __name__ == "__main__":
    worker()
