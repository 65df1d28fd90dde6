"""Coarse-to-fine inpainting of a large hole with the tiny model, and its replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.workers.worker_harness import WorkerHarness, pixels
from workers.engines import load_engine
from workers.replay import replay

SIZE, HOLE = (1000, 1000), (60, 60, 940, 940)


def test_a_refined_hole_can_be_replayed_from_its_record(tmp_path: Path, tiny_model: Path) -> None:
    url, name = f"sqlite:///{tmp_path / 'inpaint.db'}", f"diffusers:{tiny_model}"
    engine = load_engine(name, device="cpu", deterministic=True)
    harness = WorkerHarness(
        *(url, tmp_path, engine), database_url=url, roots=(tmp_path,), deterministic=True
    )
    job = harness.add(
        image=harness.write_image("in.png", SIZE),
        mask=harness.write_mask("mask.png", SIZE, HOLE),
        output=harness.path("out.png"),
        engine=name,
        num_inference_steps=2,
        guidance_scale=1.0,
        refine_strength=0.5,
    )
    harness.run(job, engine=name)
    (attempt,) = harness.attempts(job)
    assert (attempt.outcome, attempt.regions, attempt.windows) == ("succeeded", 2, 1 + 4)
    assert '"refine_strength":0.5' in attempt.params
    changed = (pixels(harness.path("in.png")) != pixels(harness.path("out.png"))).any(axis=-1)
    left, top, right, bottom = HOLE
    assert changed[top:bottom, left:right].mean() > 0.9
    assert np.count_nonzero(changed) == np.count_nonzero(changed[top:bottom, left:right])
    assert replay(harness.worker.settings, job, device="cpu")["same"]
    engine.close()
    harness.close()
