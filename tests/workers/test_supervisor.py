"""The supervisor: the processes that it starts, and which exit statuses it restarts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared import settings
from shared.processes import EX_DEVICE_LOST, EX_DEVICE_LOST_LATER, EX_UNAVAILABLE
from tests.workers.worker_harness import WorkerHarness
from workers.supervisor import (
    MAX_DEVICE_LOSSES,
    DeviceSlot,
    Supervisor,
    settings_variables,
    worker,
)


@dataclass(frozen=True, kw_only=True)
class ScriptedSlot(DeviceSlot):
    """A slot whose processes end at once, each with the next status of a list."""

    folder: Path
    statuses: tuple[int, ...]

    def command(self, engine: str, *, worker: str) -> list[str]:
        started = len(list(self.folder.glob("*.started")))
        (self.folder / f"{worker}.started").touch()
        return [sys.executable, "-I", "-S", "-c", f"raise SystemExit({self.statuses[started]})"]


def count_starts(tmp_path: Path, *statuses: int) -> int:
    """How many processes are started until the supervisor gives up."""
    harness = WorkerHarness(
        f"sqlite:///{tmp_path / 'i.db'}",
        tmp_path,
        broker_url="redis://127.0.0.1:1/0",
        lease_seconds=1,
        heartbeat_seconds=0.1,
    )
    slot = ScriptedSlot(name="host-cpu", cuda_index=None, folder=tmp_path, statuses=statuses)
    supervisor = Supervisor(
        harness.worker.settings, harness.db, [slot], engine="opencv", variables={}
    )
    assert supervisor.run() == EX_UNAVAILABLE
    harness.close()
    return len(list(tmp_path.glob("*.started")))


def test_a_device_that_is_lost_five_times_in_a_row_is_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    losses = (EX_DEVICE_LOST,) * MAX_DEVICE_LOSSES
    assert count_starts(tmp_path, *losses) == 5
    assert "host-cpu was lost 5 times in a row without finishing a job" in capfd.readouterr().err


def test_a_device_that_works_in_between_is_started_again(tmp_path: Path) -> None:
    statuses = (EX_DEVICE_LOST, EX_DEVICE_LOST_LATER, 1, EX_DEVICE_LOST, EX_UNAVAILABLE)
    assert count_starts(tmp_path, *statuses) == 5


def test_an_engine_that_cannot_be_loaded_is_not_tried_twice(tmp_path: Path) -> None:
    assert count_starts(tmp_path, EX_UNAVAILABLE) == 1


# --- settings of a worker process ------------------------------------------------------------

CHOSEN = {
    "concurrency": 3,
    "max_batch": 4,
    "compile": "auto",
    "quantization": "int8",
    "deterministic": True,
    "megapixel_budget": 100,
}
PRINT_SETTINGS = f"""
import json
from shared import settings
loaded = settings.load()
print(json.dumps({{name: getattr(loaded, name) for name in {list(CHOSEN)}}}))
"""


def settings_in_child(folder: Path, environment: dict[str, str]) -> dict[str, object]:
    """What a worker process loads in that folder and environment."""
    child = subprocess.run(
        [sys.executable, "-P", "-c", PRINT_SETTINGS],
        env=environment,
        cwd=folder,
        capture_output=True,
        check=True,
    )
    assert child.stderr == b""
    loaded: dict[str, object] = json.loads(child.stdout)
    return loaded


def test_a_process_has_the_supervisor_s_settings_whatever_its_environment_and_dotenv_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = settings_variables(settings.load(**CHOSEN), processes=1)
    (tmp_path / ".env").write_text("INPAINT_MAX_BATCH=16\nINPAINT_COMPILE=off\n")
    monkeypatch.setenv("INPAINT_MAX_BATCH", "8")
    monkeypatch.setenv("inpaint_concurrency", "9")
    monkeypatch.setenv("INPAINT_MEGAPIXELS_IN_HAND", "7")
    slot = DeviceSlot(name="host-cpu", cuda_index=None)
    assert settings_in_child(tmp_path, slot.environment(variables)) == CHOSEN


def test_each_process_has_its_share_of_the_machine_s_memory() -> None:
    configured = settings.load()
    budgets = [
        int(settings_variables(configured, processes=count)["INPAINT_MEGAPIXEL_BUDGET"])
        for count in (1, 2)
    ]
    assert budgets[1] == budgets[0] // 2 > 0


def test_a_process_sees_the_device_of_its_slot_only() -> None:
    slot = DeviceSlot(name="host-cuda3", cuda_index="3")
    environment = slot.environment({"INPAINT_COMPILE": "off"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_command_prints_its_version() -> None:
    result = CliRunner().invoke(worker, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("inpaint-worker, version ")
