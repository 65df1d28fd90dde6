"""Errors as one line on stderr, with the exit status of their kind."""

from __future__ import annotations

import pytest

from shared.console_errors import exit_on_error, print_error
from shared.errors import EngineUnavailable, InpaintError, InputError


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


def test_a_line_names_its_program(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("inpaint-worker", "job 7 was lost")
    assert capsys.readouterr().err == "inpaint-worker: job 7 was lost\n"
