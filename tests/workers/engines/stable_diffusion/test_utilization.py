"""The share of time in which a device thread had nothing running."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.workers.engines.stable_diffusion.samples import components, engine, region
from workers.engines.stable_diffusion.utilization import Utilization


def test_idle_is_what_lies_between_the_calls() -> None:
    times = iter([10.0, 13.0, 14.0, 20.0])
    usage = Utilization(clock=lambda: next(times))
    for _ in range(2):
        with usage.measure():
            pass
    assert usage.seconds == 10
    assert usage.idle_share == pytest.approx(0.1)


def test_without_a_call_nothing_was_idle() -> None:
    assert (Utilization().seconds, Utilization().idle_share) == (0, 0)


def test_an_engine_says_at_its_end_how_idle_its_device_was(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = components(tiny_model)
    with caplog.at_level(logging.INFO), engine(parts) as ours:
        ours.submit(region(num_inference_steps=20)).result(60)
    found = re.search(r"cpu: in use for (\S+) s, idle in between for (\S+)%", caplog.text)
    assert found
    assert float(found[1]) > 0
    assert 0 <= float(found[2]) < 100
