"""``inpaint-jobs replay``: runs a finished job again on this machine, with the worker's code."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.command_errors import last_error
from shared.errors import EngineUnavailable, InpaintError
from shared.processes import EX_UNAVAILABLE, module_command
from shared.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """How the result of a replay compares with the recorded one.

    largest_difference: of any pixel in levels (0 to 255) from the published result; None if
    that is gone or was replaced. differs: inputs that changed, and ``engine_revision``.
    """

    job: int
    same: bool
    largest_difference: int | None
    result_sha256: str
    recorded_sha256: str
    differs: list[str]


def replay(settings: Settings, job: int, *, device: str, roots: Sequence[Path]) -> ReplayResult:
    """Run ``workers.replay`` in a process of its own, since the producer loads no engine.

    roots: folders that files may be read from, in addition to the settings'. Raises
    EngineUnavailable or InpaintError with the message of the process.
    """
    allowed = ",".join(str(root) for root in (*settings.roots, *roots))
    process = subprocess.run(
        [*module_command("workers.replay"), "--job", str(job), "--device", device],
        env={**os.environ, "INPAINT_ROOTS": allowed},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode == 0:
        return ReplayResult(**json.loads(process.stdout))
    error_class = EngineUnavailable if process.returncode == EX_UNAVAILABLE else InpaintError
    default = "the replay exited without an error message"
    raise error_class(last_error(process.stderr, "inpaint-jobs", default=default))
