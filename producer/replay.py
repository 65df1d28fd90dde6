"""``inpaint-jobs replay``: a finished job run again here, by a worker's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.command_errors import last_error
from shared.errors import EngineUnavailable, InpaintError
from shared.processes import EX_UNAVAILABLE
from shared.settings import Settings


def replay(settings: Settings, job: int, *, device: str, roots: Sequence[Path]) -> dict[str, Any]:
    """What ``workers.replay`` prints: ``same``, both hashes, and what else differs.

    roots: folders allowed besides the settings' own. Raises EngineUnavailable and
    InpaintError with the worker's message. The producer itself loads no engine.
    """
    allowed = ",".join(str(root) for root in (*settings.roots, *roots))
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "workers.replay", "--job", str(job), "--device", device],
        env={**os.environ, "INPAINT_ROOTS": allowed},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 0:
        found: dict[str, Any] = json.loads(ran.stdout)
        return found
    error_class = EngineUnavailable if ran.returncode == EX_UNAVAILABLE else InpaintError
    raise error_class(
        last_error(ran.stderr, "inpaint-jobs", default="the replay exited without an error message")
    )
