"""inpaint-jobs as a user runs it: every command but replay, sheet and doctor."""

from __future__ import annotations

import csv
import io
import json
import time
from threading import Thread
from typing import Any

import pytest

from shared import jobs
from shared.db import schema
from shared.db.models import STATES
from shared.errors import ImageError, InpaintError, OutOfMemory
from shared.jobs import AttemptRecord
from shared.jobs.queue import Queue
from shared.params import Params
from shared.presets import presets
from tests.job_table import RETRY_AT_ONCE, JobTable
from tests.producer.workspace import CommandResult, Workspace

BAD_IMAGE = ImageError("not an image")


def fail(table: JobTable, job: int, error: InpaintError = BAD_IMAGE) -> None:
    jobs.fail(table.db, table.run(job), AttemptRecord(), error, RETRY_AT_ONCE)


def assert_refused(result: CommandResult, message: str) -> None:
    assert (result.status, result.out) == (2, "")
    assert result.err == f"inpaint-jobs: {message}\n"


@pytest.fixture
def job_per_state(table: JobTable) -> dict[str, int]:
    """A job in each state, by the state's name."""
    names = ("succeeded", "failed", "cancelled", "running", "queued", "pending")
    jobs_by_state = dict(zip(names, table.add(6), strict=True))
    table.succeed(jobs_by_state["succeeded"], result_sha256="a" * 64)
    fail(table, jobs_by_state["failed"])
    table.cancel(jobs_by_state["cancelled"])
    table.run(jobs_by_state["running"])
    table.set(jobs_by_state["pending"], state="pending")
    assert [table.state(job) for job in jobs_by_state.values()] == list(names)
    return jobs_by_state


# --- status ----------------------------------------------------------------------------------


def test_status_without_jobs_says_so(workspace: Workspace) -> None:
    result = workspace.jobs("status")
    assert result.status == 0
    assert result.out.endswith("no jobs\n")


def test_status_counts_every_state(workspace: Workspace, job_per_state: dict[str, int]) -> None:
    result = workspace.jobs("status", 1)
    assert result.status == 0
    for state in STATES:
        assert f"{state} 1" in result.out
    assert "jobs/s" in result.out
    output = workspace.jobs("status", "--json").json
    assert {state: output[state] for state in STATES} == dict.fromkeys(STATES, 1)
    assert output["rate"] > 0
    assert output["seconds_left"] == pytest.approx(3 / output["rate"], rel=0.01)


def test_status_lists_the_newest_submissions_first(workspace: Workspace, table: JobTable) -> None:
    table.add(2)
    other = table.submission("other", manifest="/[b]other[/b].csv")
    table.succeed(table.add(submission=other)[0])
    lines = workspace.jobs("status").out.splitlines()
    first, second = (line.split() for line in lines if ".csv" in line)
    assert (first[0], first[1]) == ("2", "/[b]other[/b].csv")
    assert first[-5:] == ["1", "1", "0", "0", "0"]
    assert (second[0], second[-5:]) == ("1", ["1", "0", "0", "0", "2"])


def test_status_can_be_of_one_submission(workspace: Workspace, table: JobTable) -> None:
    table.add(2)
    table.succeed(table.add(submission=table.submission("other"))[0])
    assert workspace.jobs("status", 2).out == "succeeded 1\n"
    assert workspace.jobs("status", 2, "--json").json["succeeded"] == 1


def test_watch_ends_when_no_job_is_left(
    workspace: Workspace, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.jobs.WATCH_SECONDS", 0.05)
    job = table.add_one()

    def work() -> None:
        time.sleep(0.2)
        table.succeed(job)

    worker = Thread(target=work)
    worker.start()
    result = workspace.jobs("status", "--watch")
    worker.join()
    assert result.status == 0
    assert "succeeded 1" in result.out


# --- list and show ---------------------------------------------------------------------------


def listed_jobs(result: CommandResult) -> list[int]:
    assert result.status == 0
    return [json.loads(line)["job"] for line in result.out.splitlines()]


def test_list_selects_by_state_error_and_submission(workspace: Workspace, table: JobTable) -> None:
    first, second, third = table.add(3)
    other = table.add(submission=table.submission("other"))[0]
    fail(table, first)
    fail(table, second, OutOfMemory("full"))
    fail(table, other)
    assert listed_jobs(workspace.jobs("list", "--json")) == [first, second, third, other]
    assert listed_jobs(workspace.jobs("list", "--json", "--state", "failed")) == [first, other]
    assert listed_jobs(workspace.jobs("list", "--json", "--error", "bad_image")) == [first, other]
    assert listed_jobs(workspace.jobs("list", "--json", "--error", "out_of_memory")) == [second]
    assert listed_jobs(workspace.jobs("list", "--json", "--submission", 1)) == [
        first,
        second,
        third,
    ]
    chosen = ("--submission", 2, "--error", "bad_image", "--state", "failed")
    assert listed_jobs(workspace.jobs("list", "--json", *chosen)) == [other]


def test_list_is_a_table_with_a_row_per_job(
    workspace: Workspace, job_per_state: dict[str, int]
) -> None:
    result = workspace.jobs("list")
    rows = [line.split() for line in result.out.splitlines() if "/images/" in line]
    assert [row[0] for row in rows] == [str(job) for job in job_per_state.values()]
    assert [row[4] for row in rows] == list(job_per_state)
    assert "bad_image" in result.out


def test_list_says_that_there_are_more_jobs(workspace: Workspace, table: JobTable) -> None:
    table.add(3)
    result = workspace.jobs("list", "--limit", 2, "--json")
    assert len(listed_jobs(result)) == 2
    result = workspace.jobs("list", "--limit", 2)
    assert "more jobs: raise --limit" in result.err
    assert workspace.jobs("list", "--limit", 3).err == ""


def test_show_prints_every_parameter_and_every_attempt(
    workspace: Workspace, table: JobTable
) -> None:
    more = {"text": "SALE", "postprocess": "faces", "format": "png", "quality": 90}
    params = Params(prompt="a [bold]cup[/bold]", seed=123456789012, scheduler="euler", **more)
    job = table.add_one(params=params, priority=5)
    fail(table, job, OutOfMemory("the device is full"))
    table.succeed(
        job,
        image_sha256="1" * 64,
        mask_sha256="2" * 64,
        result_sha256="3" * 64,
        width=640,
        height=480,
        regions=1,
        windows=2,
        timings={"fetch": 0.0123, "inpaint": 2.5},
    )
    result = workspace.jobs("show", job)
    assert result.status == 0
    for name in json.loads(params.to_json()):
        assert name in result.out
    for text in (
        *("a [bold]cup[/bold]", "123456789012", "euler", "sku-2", "/images/2.png"),
        *("attempt 1", "retried", "out_of_memory", "the device is full", "attempt 2"),
        *("1" * 64, "2" * 64, "3" * 64, "640", "480", "12.3 ms", "2.50 s", "as above"),
        *("w1", "cpu", "r1", "succeeded"),
    ):
        assert text in result.out, text


def test_show_as_json_has_the_same_content(workspace: Workspace, table: JobTable) -> None:
    job = table.add_one(params=Params(seed=7))
    table.succeed(job, timings={"fetch": 0.5})
    output = workspace.jobs("show", job, "--json").json
    assert output["params"]["num_inference_steps"] == 50
    assert (output["seed"], output["state"]) == (7, "succeeded")
    (attempt,) = output["attempts"]
    assert (attempt["outcome"], attempt["timings"]) == ("succeeded", {"fetch": 0.5})
    assert attempt["started_at"].endswith("+00:00")


def test_show_prints_the_parameters_of_an_earlier_attempt(
    workspace: Workspace, table: JobTable
) -> None:
    job = table.add_one()
    fail(table, job)
    assert workspace.jobs("retry", job, "--set", "strength=0.61").status == 0
    output = workspace.jobs("show", job, "--json").json
    assert output["params"]["strength"] == 0.61
    assert output["attempts"][0]["params"]["strength"] == 0.8
    assert '"strength":0.8' in workspace.jobs("show", job).out


# --- retry and cancel ------------------------------------------------------------------------


def test_retry_queues_a_finished_job_again(
    workspace: Workspace, table: JobTable, redis_url: str
) -> None:
    job = table.add_one()
    table.succeed(job)
    result = workspace.jobs("retry", job)
    assert (result.status, result.out) == (0, "1 job to run again\n")
    assert table.state(job) == "queued"
    queue = Queue(redis_url)
    assert queue.ready_messages("opencv") == {(job, 1)}
    queue.close()


def test_retry_changes_parameters(workspace: Workspace, table: JobTable) -> None:
    job = table.add_one(params=Params(seed=3))
    fail(table, job)
    workspace.jobs(
        "retry", job, "--set", "strength=0.6", "--set", "seed=4", "--set", "prompt=a cup"
    )
    leased = table.acquire(job, seen=1)
    assert leased is not None
    assert leased.params == Params(seed=4, strength=0.6, prompt="a cup")


def test_retry_selects_failed_jobs_by_submission_and_error(
    workspace: Workspace, table: JobTable
) -> None:
    first, second, done = table.add(3)
    other = table.add(submission=table.submission("other"))[0]
    table.succeed(done)
    fail(table, first)
    for _ in range(5):
        fail(table, second, OutOfMemory("full"))
    fail(table, other)
    assert workspace.jobs("retry", "--submission", 1, "--error", "bad_image").out.startswith(
        "1 job "
    )
    assert table.states() == ["queued", "failed", "succeeded", "failed"]
    assert workspace.jobs("retry", "--error", "bad_image").out.startswith("1 job ")
    assert workspace.jobs("retry", "--submission", 1).out.startswith("1 job ")
    assert table.states() == ["queued", "queued", "succeeded", "queued"]
    assert workspace.jobs("retry", "--submission", 1).out.startswith("0 jobs")


def test_retry_of_an_unfinished_job_is_refused(
    workspace: Workspace, job_per_state: dict[str, int]
) -> None:
    for state in ("running", "queued", "pending"):
        assert_refused(
            workspace.jobs("retry", job_per_state["failed"], job_per_state[state]),
            f"job {job_per_state[state]} is {state}; only final jobs run again",
        )


def test_retry_when_the_broker_is_down_says_so(
    workspace: Workspace, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = table.add_one()
    table.succeed(job)
    monkeypatch.setenv("INPAINT_BROKER_URL", "redis://127.0.0.1:1/0")
    result = workspace.jobs("retry", job)
    assert (result.status, result.out) == (0, "1 job to run again\n")
    assert "when it is back" in result.err


def test_cancel_cancels_waiting_jobs_and_asks_running_ones_to_stop(
    workspace: Workspace, job_per_state: dict[str, int]
) -> None:
    result = workspace.jobs("cancel", "--submission", 1)
    assert (result.status, result.out) == (0, "2 cancelled, 1 running ones asked to stop\n")
    assert workspace.jobs(
        "cancel", job_per_state["succeeded"], job_per_state["running"]
    ).out.startswith("0 cancelled")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("show", 99), "job 99 does not exist; see inpaint-jobs list"),
        (("retry", 99), "job 99 does not exist; see inpaint-jobs list"),
        (("retry", 1, 98, 99), "job 98 does not exist; see inpaint-jobs list"),
        (("cancel", 99), "job 99 does not exist; see inpaint-jobs list"),
        (("status", 99), "submission 99 does not exist; see inpaint-jobs status"),
        (("list", "--submission", 99), "submission 99 does not exist; see inpaint-jobs status"),
        (("retry", "--submission", 99), "submission 99 does not exist; see inpaint-jobs status"),
        (("cancel", "--submission", 99), "submission 99 does not exist; see inpaint-jobs status"),
        (("export", "--submission", 99), "submission 99 does not exist; see inpaint-jobs status"),
        (("retry",), "name jobs, --submission or --error"),
        (("cancel",), "name jobs or --submission"),
        (("retry", 1, "--set", "x"), "--set 'x': write NAME=VALUE"),
        (
            ("retry", 1, "--set", "strength=2"),
            "strength: '2' is not allowed; use a number above 0 and up to 1",
        ),
        (
            ("retry", 1, "--set", "scheduler=euler", "--set", "eta=0.5"),
            "eta: 0.5 has no meaning for scheduler 'euler'; use 0, or scheduler ddim",
        ),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    workspace: Workspace, table: JobTable, command: tuple[object, ...], message: str
) -> None:
    job = table.add_one()
    fail(table, job)
    before = table.job(job)
    assert_refused(workspace.jobs(*command), message)
    assert table.job(job) == before


@pytest.mark.parametrize("number", ["0", "-1", "x", str(2**63), "9" * 30])
@pytest.mark.parametrize("command", ["show", "retry", "cancel", "status"])
def test_a_number_that_no_job_can_have_is_refused(
    workspace: Workspace, command: str, number: str
) -> None:
    result = workspace.jobs(command, "--", number)
    assert result.status == 2
    assert f"{number}" in result.err


def test_the_largest_possible_number_is_an_unknown_job(workspace: Workspace) -> None:
    assert "does not exist" in workspace.jobs("show", 2**63 - 1).err


# --- export ----------------------------------------------------------------------------------


def test_export_holds_one_record_per_job_in_both_formats(
    workspace: Workspace, job_per_state: dict[str, int]
) -> None:
    result = workspace.jobs("export", "--format", "jsonl")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["job"] for record in records] == list(job_per_state.values())
    assert [record["state"] for record in records] == list(job_per_state)
    assert records[0]["result_sha256"] == "a" * 64
    assert records[1]["error_code"] == "bad_image"
    assert records[0]["params"]["scheduler"] == "ddim"
    assert records[5]["worker"] is None
    rows = list(csv.DictReader(io.StringIO(workspace.jobs("export").out)))
    assert [list(row) for row in rows] == [list(record) for record in records]
    for row, record in zip(rows, records, strict=True):
        for name, value in record.items():
            expected = "" if value is None else value
            if isinstance(expected, dict):
                assert json.loads(row[name]) == expected
            else:
                assert row[name] == str(expected)


def test_export_selects_by_submission_and_state(workspace: Workspace, table: JobTable) -> None:
    first, _ = table.add(2)
    other = table.add(submission=table.submission("other"))[0]
    table.cancel(first, other)

    def exported(*options: object) -> list[Any]:
        result = workspace.jobs("export", "--format", "jsonl", *options)
        return [json.loads(line)["job"] for line in result.out.splitlines()]

    assert exported("--state", "cancelled") == [first, other]
    assert exported("--submission", 2) == [other]
    assert exported("--submission", 1, "--state", "failed") == []


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r="])
def test_a_csv_export_contains_no_spreadsheet_formula(
    workspace: Workspace, table: JobTable, start: str
) -> None:
    key = f"{start}1+1"
    table.add_one(key=key, image=f"{start}a.png")
    (row,) = csv.DictReader(io.StringIO(workspace.jobs("export").out, newline=""))
    shown = start.replace("\r", "\\r")
    assert row["key"] == f"'{shown}1+1"
    assert row["image"] == f"'{shown}a.png"
    record = json.loads(workspace.jobs("export", "--format", "jsonl").out)
    assert record["key"] == key


def test_a_csv_export_contains_no_control_character(workspace: Workspace, table: JobTable) -> None:
    key = "a\x1b[31mred\x07\x7f\x9b\r\tb\n"
    job = table.add_one(key=key, image=f"{key}.png")
    out = workspace.jobs("export").out
    assert {c for c in out if not c.isprintable()} == {"\n", "\t"}
    (row,) = csv.DictReader(io.StringIO(out, newline=""))
    assert row["key"] == "a\\x1b[31mred\\x07\\x7f\\x9b\\r\tb\n"
    assert json.loads(workspace.jobs("export", "--format", "jsonl").out)["key"] == key
    assert row["job"] == str(job)


def test_quotes_newlines_and_unicode_survive_an_export(
    workspace: Workspace, table: JobTable
) -> None:
    key = 'ä "quoted", two\nlines 画'
    table.add_one(key=key)
    (row,) = csv.DictReader(io.StringIO(workspace.jobs("export").out, newline=""))
    assert row["key"] == key
    assert json.loads(workspace.jobs("export", "--format", "jsonl").out)["key"] == key


def test_an_export_without_jobs_is_a_header_or_empty(workspace: Workspace) -> None:
    assert workspace.jobs("export").out.startswith('"submission","job","line","key","state",')
    assert workspace.jobs("export", "--format", "jsonl").out == ""


# --- presets and upgrade ---------------------------------------------------------------------


def test_presets_are_printed_with_their_parameters(workspace: Workspace) -> None:
    result = workspace.jobs("presets")
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line.strip()}
    assert set(presets()) <= set(rows)
    assert rows["ecommerce"][1:4] == ["8.5", "70", "0.75"]
    assert rows["film"][1:5] == ["10", "80", "0.9", "1024x576"]
    output = workspace.jobs("presets", "--json").json
    assert list(output) == list(presets())
    assert output["portrait"]["strength"] == 0.55
    assert "{subject}" in output["portrait"]["prompt"]


def test_upgrade_prints_the_database_and_its_revision(workspace: Workspace) -> None:
    for _ in range(2):
        result = workspace.jobs("upgrade")
        assert result.status == 0
        assert (
            result.out
            == f"sqlite:///{workspace.folder}/.inpaint/inpaint.db is at revision {schema.HEAD}\n"
        )


def test_upgrade_never_prints_a_password(
    workspace: Workspace, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres_url.replace("postgres@", "postgres:hush@")
    monkeypatch.setenv("INPAINT_DATABASE_URL", url)
    result = workspace.jobs("upgrade")
    assert result.status == 0
    assert "hush" not in result.out
    assert f"is at revision {schema.HEAD}" in result.out


@pytest.mark.parametrize("command", ["status", "list", "export", "upgrade"])
def test_a_database_that_cannot_be_opened_is_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    workspace.write("file", "")
    monkeypatch.setenv("INPAINT_HOME", "file/home")
    result = workspace.jobs(command)
    assert_refused(
        result, f"database: {workspace.folder}/file/home: Not a directory; see INPAINT_HOME"
    )
    workspace.write("inpaint.db", b"no database at all, but long enough to look like a file" * 20)
    monkeypatch.setenv("INPAINT_DATABASE_URL", "sqlite:///inpaint.db")
    assert_refused(workspace.jobs(command), "database: file is not a database")


# --- prune ------------------------------------------------------------------------------------


def test_prune_shows_what_would_be_deleted_asks_and_deletes(
    workspace: Workspace, table: JobTable
) -> None:
    old = table.add_one(submission=table.submission("old", manifest="/old.csv"))
    table.succeed(old)
    table.add_one(submission=table.submission("new"))
    with table.db.write() as connection:
        for statement in ("submissions SET created_at", "jobs SET finished_at"):
            connection.exec_driver_sql(f"UPDATE {statement} = '2020-01-01' WHERE id = 1")
    shown = "submission 1: 1 jobs, /old.csv\n"
    dry_run = workspace.jobs("prune", "--older-than", "90d", "--dry-run")
    assert (dry_run.status, dry_run.out) == (0, shown)
    assert_refused = workspace.jobs("prune", "--older-than", "90d")
    assert (assert_refused.status, table.state(old)) == (2, "succeeded")
    assert "prune asks before it deletes; give --yes, or --dry-run to look" in assert_refused.err
    pruned = workspace.jobs("prune", "--older-than", "12h", "--yes")
    assert (pruned.status, pruned.out) == (0, f"{shown}1 jobs pruned\n")
    assert [row.digest for row in table.submissions()] == ["new"]
    again = workspace.jobs("prune", "--older-than", "90d", "--yes")
    assert again.out == "no submission finished longer ago than 90d\n"


@pytest.mark.parametrize("age", ["90", "0d", "-1d", "1w", "", "1.5d"])
def test_an_invalid_age_is_refused(workspace: Workspace, age: str) -> None:
    result = workspace.jobs("prune", f"--older-than={age}", "--yes")
    assert result.status == 2
    assert "is not an age; write 90d or 12h" in result.err


def test_pruning_an_unknown_submission_is_one_line(workspace: Workspace) -> None:
    result = workspace.jobs("prune", "--older-than", "1d", "--submission", 7, "--yes")
    assert result.err == "inpaint-jobs: submission 7 does not exist; see inpaint-jobs status\n"
