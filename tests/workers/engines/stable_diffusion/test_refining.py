"""A large hole painted again at full detail, with a real model's every part, and replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.workers.bench import Workbench, pixels
from workers.engines import load_engine
from workers.replay import replay

SIZE, HOLE = (1000, 1000), (60, 60, 940, 940)


def test_a_hole_is_painted_again_and_its_record_is_enough_to_do_it_once_more(
    tmp_path: Path, tiny_model: Path
) -> None:
    url, name = f"sqlite:///{tmp_path / 'inpaint.db'}", f"diffusers:{tiny_model}"
    engine = load_engine(name, device="cpu", deterministic=True)
    bench = Workbench(
        *(url, tmp_path, engine), database_url=url, roots=(tmp_path,), deterministic=True
    )
    job = bench.add(
        image=bench.picture("in.png", SIZE),
        mask=bench.mask("mask.png", SIZE, HOLE),
        output=bench.path("out.png"),
        engine=name,
        num_inference_steps=2,
        guidance_scale=1.0,
        refine_strength=0.5,
    )
    bench.run(job, engine=name)
    (attempt,) = bench.attempts(job)
    assert (attempt.outcome, attempt.regions, attempt.windows) == ("succeeded", 2, 1 + 4)
    assert '"refine_strength":0.5' in attempt.params
    changed = (pixels(bench.path("in.png")) != pixels(bench.path("out.png"))).any(axis=-1)
    left, top, right, bottom = HOLE
    assert changed[top:bottom, left:right].mean() > 0.9
    assert np.count_nonzero(changed) == np.count_nonzero(changed[top:bottom, left:right])
    assert replay(bench.bench.settings, job, device="cpu")["same"]
    engine.close()
    bench.close()
