"""Child processes that try files, and a parent that detects crashes, hangs and memory growth.

A child stores each file's number in shared memory before it tries the file, so that the parent
knows which file ended it. A file is reproduced from the seed and its number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import psutil

FILE_SECONDS = 10.0  # of processor time
FILE_WALL_SECONDS = 180.0
MEMORY_BYTES = 1 << 30
FILES_PER_CHILD = 20_000
GROWTH_BYTES = 96 << 20
WARM_UP_FILES = 1_000
POLL_SECONDS = 0.05
NOT_STARTED = -1

Attempt = Callable[[bytes, Random], bool]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """kind: crash, hang, memory, leak, or the exception's name."""

    number: int
    kind: str
    text: str


@dataclass(kw_only=True)
class Report:
    """tried: files; images: those of them that were decoded."""

    tried: int = 0
    images: int = 0
    findings: list[Finding] = field(default_factory=list)


def fuzz(
    *,
    seed: int,
    folder: Path,
    files: int | None = None,
    minutes: float | None = None,
    first: int = 0,
    attempt: str = "tests.fuzz.trial:attempt",
    file_seconds: float = FILE_SECONDS,
    log: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Tries that many files, or for that many minutes; saves those with findings in the folder.

    attempt: ``module:function``, called in the children. file_seconds: of processor time.
    log: called with a line for each finding.
    """
    end = time.monotonic() + (minutes or 1e6) * 60
    report, number = Report(), first
    while time.monotonic() < end and (files is None or number < first + files):
        most = FILES_PER_CHILD if files is None else min(FILES_PER_CHILD, first + files - number)
        child = _Child(seed=seed, first=number, count=most, attempt=attempt)
        known = len(report.findings)
        number = child.watch(report, until=end, file_seconds=file_seconds)
        for finding in report.findings[known:]:
            log(_save(finding, seed, folder))
    return report


def _save(finding: Finding, seed: int, folder: Path) -> str:
    """Writes the finding's file; returns a line that describes the finding."""
    path = folder / f"{finding.kind}-{seed}-{finding.number}"
    if finding.kind != "leak":
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(seed, finding.number)[0])
    return f"{finding.kind}: {path}: {finding.text}"


def file_of(seed: int, number: int) -> tuple[bytes, Random]:
    """The file of that number, and the random numbers for what is done with it."""
    from tests.fuzz.mutations import mutated

    random = Random(f"{seed}-{number}")
    return mutated(random), random


class _Child:
    """One process. ``place``: shared memory with the current number and the count of images."""

    def __init__(self, *, seed: int, first: int, count: int, attempt: str) -> None:
        self._first, self._last = first, first + count
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        folder = Path(self._folder.name)
        self._findings, place = folder / "findings.jsonl", folder / "place"
        place.write_bytes(struct.pack("<qq", NOT_STARTED, 0))
        with place.open("r+b") as file:
            self._place = mmap.mmap(file.fileno(), 16)
        arguments = [str(seed), str(first), str(count), attempt, str(place), str(self._findings)]
        (folder / "tmp").mkdir()
        with (folder / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.runner", *arguments],
                env={**os.environ, "TMPDIR": str(folder / "tmp")},
                stderr=stderr,
            )

    def watch(self, report: Report, *, until: float, file_seconds: float) -> int:
        """Waits until the child has ended; returns the next number to try."""
        ended = self._ended(until, file_seconds)
        number, images = struct.unpack("<qq", self._place[:])
        stderr = (Path(self._folder.name) / "stderr").read_text(errors="replace")
        if number == NOT_STARTED and ended != "stopped":
            raise RuntimeError(f"the child did not start: {stderr}")
        number = max(number, self._first)
        report.images += images
        if self._findings.exists():
            lines = self._findings.read_text().splitlines()
            report.findings += [Finding(**json.loads(line)) for line in lines]
        if ended not in ("done", "stopped"):
            stderr = (Path(self._folder.name) / "stderr").read_text(errors="replace")
            report.findings.append(
                Finding(number=number, kind=ended, text=" ".join(stderr.split())[-1500:])
            )
            number += 1
        left = list((Path(self._folder.name) / "tmp").iterdir())
        if left and ended == "done":
            report.findings.append(Finding(number=number, kind="leak", text=f"left {left[:3]}"))
        report.tried += number - self._first
        self._place.close()
        self._folder.cleanup()
        return int(number)

    def _ended(self, until: float, file_seconds: float) -> str:
        tried, since, began = NOT_STARTED, time.monotonic(), 0.0
        while (status := self._process.poll()) is None:
            time.sleep(POLL_SECONDS)
            now, spent = time.monotonic(), self._cpu_seconds()
            (number, _) = struct.unpack("<qq", self._place[:])
            if number != tried:
                tried, since, began = number, now, spent
            if now > until:
                return self._stop(signal.SIGKILL, "stopped")
            is_slow = number != NOT_STARTED and spent - began > file_seconds
            if is_slow or now - since > FILE_WALL_SECONDS:
                return self._stop(signal.SIGABRT, "hang")
        return "done" if status == 0 else "crash"

    def _cpu_seconds(self) -> float:
        """The child's processor time, so that no file looks slow on a busy machine."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def _stop(self, number: int, outcome: str) -> str:
        self._process.send_signal(number)
        self._process.wait()
        return outcome


def main(arguments: list[str]) -> None:
    """The child: tries ``count`` files from ``first`` on."""
    seed, first, count = (int(text) for text in arguments[:3])
    module, _, name = arguments[3].partition(":")
    attempt: Attempt = getattr(import_module(module), name)
    faulthandler.enable()
    warnings.simplefilter("error")
    file_of(seed, first)
    _limit_memory()
    with Path(arguments[4]).open("r+b") as file, Path(arguments[5]).open("a") as findings:
        place = mmap.mmap(file.fileno(), 16)
        images, before = 0, None
        for number in range(first, first + count):
            struct.pack_into("<qq", place, 0, number, images)
            outcome = _try_file(attempt, seed, number)
            images += outcome is True
            if isinstance(outcome, Finding):
                _record(findings, outcome)
            if number == first + WARM_UP_FILES:
                before = _use()
        struct.pack_into("<qq", place, 0, first + count, images)
        if before is not None and (text := _growth(before, _use())):
            _record(findings, Finding(number=first + count, kind="leak", text=text))


def _record(findings: Any, finding: Finding) -> None:
    findings.write(json.dumps(asdict(finding)) + "\n")
    findings.flush()  # a crash at the next file loses nothing


def _try_file(attempt: Attempt, seed: int, number: int) -> bool | Finding:
    data, random = file_of(seed, number)
    try:
        return attempt(data, random)
    except MemoryError:
        return Finding(number=number, kind="memory", text=f"over {MEMORY_BYTES >> 20} MiB")
    except BaseException as error:  # noqa: BLE001 - any exception is a finding
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        return Finding(number=number, kind=type(error).__name__, text=f"{error} ({where})"[:500])


def _limit_memory() -> None:
    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, resource.RLIM_INFINITY))


def _use() -> tuple[int, int]:
    """Resident bytes and open files."""
    with Path("/proc/self/statm").open() as file:
        resident = int(file.read().split()[1]) * resource.getpagesize()
    return resident, len(list(Path("/proc/self/fd").iterdir()))


def _growth(before: tuple[int, int], after: tuple[int, int]) -> str:
    grown, files = after[0] - before[0], after[1] - before[1]
    if grown > GROWTH_BYTES or files > 0:
        return f"{grown >> 20} MiB and {files} open files more than after {WARM_UP_FILES:,} files"
    return ""


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1:])
