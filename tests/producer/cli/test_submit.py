"""The commands themselves: help, waiting, and what they do not import at the start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import click
import pytest

from producer.cli.command import parse_set_options, reporting_errors
from producer.cli.jobs import jobs_command
from producer.cli.submit import INTERRUPTED, submit
from shared import jobs
from shared.errors import ImageError, ParameterError
from shared.jobs import AttemptRecord
from shared.params import PARAMETERS
from tests.job_table import RETRY_AT_ONCE, JobTable
from tests.producer.workspace import Workspace, _run

COMMANDS: dict[str, tuple[click.Command, tuple[str, ...]]] = {
    "inpaint-submit": (submit, ()),
    **{
        f"inpaint-jobs {name}": (jobs_command, (name,))
        for name in jobs_command.list_commands(click.Context(jobs_command))
    },
}


def command_of(name: str) -> click.Command:
    command, path = COMMANDS[name]
    return command.commands[path[0]] if path and isinstance(command, click.Group) else command


# --- help ------------------------------------------------------------------------------------


def test_the_commands_are_complete() -> None:
    assert list(COMMANDS) == [
        "inpaint-submit",
        *(
            f"inpaint-jobs {name}"
            for name in (
                *("cancel", "doctor", "export", "list", "presets", "prune", "replay"),
                *("retry", "sheet", "show", "status", "upgrade"),
            )
        ),
    ]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option_of_a_command(name: str, flag: str) -> None:
    entry, path = COMMANDS[name]
    result = _run(entry, (*path, flag))
    assert result.status == 0
    for parameter in command_of(name).params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.out
    assert len(result.out.split("\n\n")) >= 3, "a usage, a sentence, the options"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_unless_its_name_suffices(name: str) -> None:
    plain = {"--state", "--submission", "--limit", "--format", "--help"}
    for parameter in command_of(name).params:
        if isinstance(parameter, click.Option) and parameter.opts[0] not in plain:
            assert parameter.help, f"{name} {parameter.opts[0]}"


def test_the_group_s_help_names_every_command() -> None:
    result = _run(jobs_command, ("--help",))
    for name in jobs_command.list_commands(click.Context(jobs_command)):
        assert f"  {name} " in result.out


def test_submit_has_every_documented_option() -> None:
    promised = (
        *("--output", "--mask", "--engine", "--preset", "--prompt", "--set", "--priority"),
        *("--dry-run", "--skip-invalid", "--root", "--wait", "--local", "--force", "--changed"),
        "--json",
    )
    options = {option for parameter in submit.params for option in parameter.opts}
    assert set(promised) <= options


@pytest.mark.parametrize("args", [(), ("--no-such",), ("m.csv", "n.csv")])
def test_a_wrong_call_exits_2_with_the_usage(args: tuple[str, ...]) -> None:
    result = _run(submit, args)
    assert result.status == 2
    assert result.err.startswith("Usage: ")


def test_set_options_are_parsed_and_checked() -> None:
    assert parse_set_options(("strength=0.5", " seed = 7", "prompt=a=b")) == {
        "strength": 0.5,
        "seed": 7,
        "prompt": "a=b",
    }
    with pytest.raises(ParameterError, match="write NAME=VALUE"):
        parse_set_options(("strength",))


def test_every_parameter_can_be_set(workspace: Workspace) -> None:
    good = {
        **{"mode": "tile", "scheduler": "ddim", "opencv_method": "telea", "prompt": "x"},
        **{"negative_prompt": "y", "width": "512", "height": "512", "eta": "0.5"},
        **{"mask_fit": "scale", "colour_fit": "ring", "text_box": "0,0,9,9", "text_color": "red"},
        **{"text_align": "left", "gate": "review", "format": "png"},
    }
    sets = [f"--set={name}={good.get(name, '1')}" for name in PARAMETERS]
    assert workspace.submit(workspace.catalog(1), *sets).status == 0


def test_ctrl_c_is_one_line_that_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit) as caught,
        reporting_errors("inpaint-submit", interrupted=INTERRUPTED),
    ):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == f"inpaint-submit: {INTERRUPTED}\n"


def test_a_second_sigterm_does_not_interrupt_the_cleanup_after_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopped: list[str] = []

    def run() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            stopped.append("workers")

    with (
        pytest.raises(SystemExit) as caught,
        reporting_errors("inpaint-submit", interrupted=INTERRUPTED),
    ):
        run()
    assert caught.value.code == 143
    assert stopped == ["workers"]
    assert capsys.readouterr().err == f"inpaint-submit: {INTERRUPTED}\n"
    assert signal.getsignal(signal.SIGTERM) == before


# --- waiting ---------------------------------------------------------------------------------


class Worker(Thread):
    """Ends the jobs that are queued: those in ``bad`` lines fail, the others succeed."""

    def __init__(self, table: JobTable, *, count: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._table, self._left, self._bad = table, count, bad

    def run(self) -> None:
        deadline = time.monotonic() + 20
        while self._left and time.monotonic() < deadline:
            time.sleep(0.05)
            with self._table.db.read() as connection:
                rows = connection.exec_driver_sql("SELECT id FROM jobs WHERE state = 'queued'")
                queued = list(rows.scalars())
            for job in queued:
                self._end(job)

    def _end(self, job: int) -> None:
        leased = self._table.acquire(job, seen=self._table.job(job).attempt)
        assert leased is not None
        if self._table.job(job).line in self._bad:
            error = ImageError("not [an] image")
            jobs.fail(self._table.db, leased, AttemptRecord(), error, RETRY_AT_ONCE)
        else:
            jobs.succeed(self._table.db, leased, AttemptRecord())
        self._left -= 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.cli.submit.POLL_SECONDS", 0.05)


@pytest.mark.usefixtures("quick")
def test_wait_ends_with_the_last_job_and_counts_the_outcomes(
    workspace: Workspace, table: JobTable
) -> None:
    worker = Worker(table, count=3)
    worker.start()
    result = workspace.submit(workspace.catalog(3), "--wait")
    worker.join()
    assert result.status == 0
    first, second, third = result.out.splitlines()
    assert first == "submission 1: 3 rows, 3 accepted"
    assert second.startswith("3 succeeded, 0 failed in ")
    assert third == f"results: {workspace.folder}/m-out"


@pytest.mark.usefixtures("quick")
def test_wait_exits_1_when_a_job_failed_and_names_the_errors(
    workspace: Workspace, table: JobTable
) -> None:
    worker = Worker(table, count=3, bad=(3,))
    worker.start()
    result = workspace.submit(workspace.catalog(3), "--wait")
    worker.join()
    assert result.status == 1
    assert "2 succeeded, 1 failed in " in result.out
    assert "  1 x bad_image: not [an] image" in result.out
    assert "after fixing the causes: inpaint-jobs retry --submission 1" in result.out


@pytest.mark.usefixtures("quick")
def test_wait_with_json_is_one_object_with_the_outcomes(
    workspace: Workspace, table: JobTable
) -> None:
    worker = Worker(table, count=2)
    worker.start()
    result = workspace.submit(workspace.catalog(2), "--wait", "--json")
    worker.join()
    assert result.status == 0
    assert len(result.out.splitlines()) == 1
    summary = result.json
    assert summary.pop("seconds") > 0
    assert summary == {
        "submission": 1,
        "rows": 2,
        "accepted": 2,
        "duplicates": 0,
        "invalid": 0,
        "succeeded": 2,
        "failed": 0,
        "review": 0,
    }


@pytest.mark.usefixtures("quick")
def test_wait_warns_once_that_no_worker_has_taken_a_job(
    workspace: Workspace, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.submit.NO_WORKER_SECONDS", 0.1)

    def give_up() -> None:
        time.sleep(0.8)
        table.cancel(1, 2)

    impatient = Thread(target=give_up)
    impatient.start()
    result = workspace.submit(workspace.catalog(2), "--wait")
    impatient.join()
    assert result.status == 0
    assert (
        result.err.count("no worker has taken a job yet; start: inpaint-worker --engine opencv")
        == 1
    )
    assert "2 cancelled" in result.out


@pytest.mark.usefixtures("quick")
def test_local_notes_once_that_its_worker_is_starting(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.submit.NO_WORKER_SECONDS", 0.0)
    result = workspace.submit(
        workspace.catalog(1), "--local", "--engine", "opencv", "--devices", "cpu"
    )
    assert result.err.count("the worker is starting; loading a model can take minutes: see ") == 1


# --- the real commands -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inpaint-submit", "inpaint-jobs"])
def test_an_installed_command_starts(command: str) -> None:
    path = Path(sys.executable).parent / command
    done = subprocess.run([path, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: {command} ")
    assert done.stderr == ""


# --- local ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "library", "extra"), [("sd2", "torch", "worker"), ("opencv", "cv2", "opencv")]
)
def test_an_engine_that_cannot_run_here_is_named_before_anything_is_recorded(
    workspace: Workspace,
    table: JobTable,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    library: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    result = workspace.submit(workspace.catalog(1), "--local", "--engine", engine)
    assert result.status == 2
    assert result.err == (
        f"inpaint-submit: {engine} cannot run here: {library} is not installed; pip install "
        f"'inpaint-batch[{extra}]', or submit without --local for workers elsewhere\n"
    )
    assert table.submissions() == []


# --- version and start-up --------------------------------------------------------------------


@pytest.mark.parametrize("command", [submit, jobs_command])
def test_version_is_that_of_the_installed_package(command: click.Command) -> None:
    result = _run(command, ("--version",))
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith(f", version {version('inpaint-batch')}\n")


def test_a_command_starts_without_jinja2() -> None:
    code = "import sys, producer.cli.submit, producer.cli.jobs; print('jinja2' in sys.modules)"
    started = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert (started.stdout, started.stderr) == ("False\n", "")
