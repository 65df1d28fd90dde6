"""A command that fails prints one line and exits with a status."""

from __future__ import annotations

import pytest

from shared.command_errors import exit_on_error, exit_with_error, last_error
from shared.errors import EngineUnavailable, InpaintError, InputError


def test_an_error_is_one_line_on_stderr_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_with_error("inpaint-submit", ValueError("no such file"))
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "inpaint-submit: no such file\n")


def test_the_exit_status_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_with_error("inpaint-worker", "no engine", status=69)
    assert caught.value.code == 69
    assert capsys.readouterr().err == "inpaint-worker: no engine\n"


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("noise\ninpaint-worker: first\ninpaint-worker: second\nnoise\n", "second"),
        ("Traceback\nValueError: x\n", "ValueError: x"),
        ("", "exited without an error message"),
    ],
)
def test_the_last_error_of_a_child_process_is_found(stderr: str, message: str) -> None:
    default = "exited without an error message"
    assert last_error(stderr, "inpaint-worker", default=default) == message


@pytest.mark.parametrize(
    ("error", "status"),
    [(InputError("no such file"), 1), (EngineUnavailable("no such file"), 69)],
)
def test_an_error_is_one_line_and_the_exit_status_of_its_kind(
    error: InpaintError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(SystemExit) as caught,
        exit_on_error("inpaint-worker", status=1, engine_unavailable=69),
    ):
        raise error
    assert caught.value.code == status
    assert capsys.readouterr().err == "inpaint-worker: no such file\n"


def test_a_mistake_of_the_user_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error("inpaint-submit"):
        raise EngineUnavailable("torch is not installed")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "inpaint-submit: torch is not installed\n"


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error("inpaint-submit"):
        raise ZeroDivisionError
