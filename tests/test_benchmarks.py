"""The GPU benchmark, run on a CPU with the tiny pipeline, so that it works when there is a GPU."""

from __future__ import annotations

import pytest

from tests.benchmarks.gpu.__main__ import CASES, TABLES, main
from tests.workers.engines.stable_diffusion.samples import IGNORE_DIFFUSERS_WARNING

pytestmark = IGNORE_DIFFUSERS_WARNING


def test_the_gpu_benchmark_runs_on_the_tiny_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny"])
    printed = capsys.readouterr().out
    *tables, cases = printed.split("\n## ")
    assert [table.partition("\n")[0] for table in tables[1:]] == list(TABLES)
    rows = [line.strip("| ").split(" | ") for line in cases.splitlines() if line.startswith("| (")]
    assert [row[0][1] for row in rows] == sorted(CASES)
    measured = {row[0][1]: float(row[1]) for row in rows if row[1] != "-"}
    assert set(measured) >= set("acdefg")
    assert all(rate > 0 for rate in measured.values())
    assert "failed" not in printed
    assert "| deterministic | bit-identical |" in printed
