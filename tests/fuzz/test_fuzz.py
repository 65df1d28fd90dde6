"""A short run over hostile files, and runs in which one file does harm."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import runner
from tests.fuzz.runner import fuzz

HERE = "tests.fuzz.test_fuzz"
VICTIM = 3


def test_hostile_files_do_no_harm(tmp_path: Path) -> None:
    report = fuzz(seed=4, folder=tmp_path, files=900)
    assert report.findings == []
    assert report.tried == 900
    assert report.images > 150, "most files are refused too early to try much"


def crash(data: bytes, random: Random) -> bool:
    if _is_victim(data):
        os.abort()
    return True


def hang(data: bytes, random: Random) -> bool:
    while _is_victim(data):
        time.process_time()
    return True


def grow(data: bytes, random: Random) -> bool:
    return bool(bytearray(8 * runner.MEMORY_BYTES)) if _is_victim(data) else True


def fail(data: bytes, random: Random) -> bool:
    return not _is_victim(data) or bool({}["no"])


def _is_victim(data: bytes) -> bool:
    return data == runner.file_of(1, VICTIM)[0]


@pytest.mark.parametrize(
    ("attempt", "kind"),
    [(crash, "crash"), (hang, "hang"), (grow, "memory"), (fail, "KeyError")],
)
def test_harm_is_detected_and_its_file_is_saved(attempt: object, kind: str, tmp_path: Path) -> None:
    name = getattr(attempt, "__name__", "")
    report = fuzz(seed=1, folder=tmp_path, files=4, attempt=f"{HERE}:{name}", file_seconds=0.5)
    assert [(finding.kind, finding.number) for finding in report.findings] == [(kind, VICTIM)]
    assert report.tried == 4
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [runner.file_of(1, VICTIM)[0]]
