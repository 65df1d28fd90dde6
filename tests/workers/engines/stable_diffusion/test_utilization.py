"""The share of time in which a device thread has no call running."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.workers.engines.stable_diffusion.samples import load_tiny, open_engine, region_work
from workers.engines.stable_diffusion.utilization import Utilization


def test_idle_time_is_the_time_between_calls() -> None:
    times = iter([10.0, 13.0, 14.0, 20.0])
    utilization = Utilization(clock=lambda: next(times))
    for _ in range(2):
        with utilization.measure():
            pass
    assert utilization.seconds == 10
    assert utilization.idle_share == pytest.approx(0.1)


def test_without_a_call_the_idle_share_is_0() -> None:
    assert (Utilization().seconds, Utilization().idle_share) == (0, 0)


def test_a_closed_engine_logs_its_idle_share(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), open_engine(load_tiny(tiny_model)) as engine:
        engine.submit(region_work(num_inference_steps=20)).result(60)
    match = re.search(r"cpu: in use for (\S+) s, device idle for (\S+)%", caplog.text)
    assert match
    assert float(match[1]) > 0
    assert 0 <= float(match[2]) < 100
