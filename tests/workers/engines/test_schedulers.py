"""Schedulers come from the model's configuration and take few steps as well as many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from shared.errors import ParameterError
from shared.params import Scheduler
from tests.workers.engines.samples import DIFFUSERS_WARNS, params
from workers.engines.schedulers import CLASSES, Sampler, build_scheduler
from workers.engines.step_table import COLUMNS

pytestmark = DIFFUSERS_WARNS


@pytest.fixture
def config(tiny_model: Path) -> dict[str, object]:
    text = (tiny_model / "scheduler" / "scheduler_config.json").read_text()
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def test_every_scheduler_a_job_may_name_is_built() -> None:
    assert set(CLASSES) == set(get_args(Scheduler))


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_the_models_noise_schedule_is_kept(name: Scheduler, config: dict[str, object]) -> None:
    built = build_scheduler({**config, "prediction_type": "v_prediction"}, name)
    assert type(built).__name__ == CLASSES[name]
    assert built.config.beta_schedule == "scaled_linear"
    assert (built.config.beta_start, built.config.beta_end) == (0.00085, 0.012)
    assert built.config.prediction_type == "v_prediction"
    assert built.config.steps_offset == 1


def test_old_configurations_get_what_diffusers_pipelines_force(config: dict[str, object]) -> None:
    old = {**config, "clip_sample": True, "skip_prk_steps": False, "steps_offset": 0}
    assert build_scheduler(old, "ddim").config.clip_sample is False
    assert build_scheduler(old, "pndm").config.skip_prk_steps is True
    assert build_scheduler(old, "ddim").config.steps_offset == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("name", get_args(Scheduler))
def test_any_number_of_steps_ends_in_finite_latents(
    name: Scheduler, steps: int, config: dict[str, object]
) -> None:
    sampler = Sampler(
        config,
        params(scheduler=name, num_inference_steps=steps, strength=1.0),
        torch.Generator().manual_seed(0),
    )
    latents = sampler.start(sampler.draw((1, 4, 8, 8)), None)
    for step, row in enumerate(sampler.table.values):
        scaled = latents / row[COLUMNS.index("divisor")]
        latents = sampler.step(0.1 * scaled, step, latents)
    assert torch.isfinite(latents).all()
    assert len(sampler.timesteps) == steps + (name == "pndm" and steps > 1)


def test_strength_leaves_out_the_first_steps(config: dict[str, object]) -> None:
    full, part = (
        Sampler(config, params(num_inference_steps=10, strength=strength), torch.Generator())
        for strength in (1.0, 0.65)
    )
    assert part.timesteps.tolist() == full.timesteps.tolist()[4:]
    assert part.needs_image
    assert not full.needs_image


def test_no_step_left_is_the_users_mistake(config: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=r"1 at strength 0\.5 leaves no step"):
        Sampler(config, params(num_inference_steps=1, strength=0.5), torch.Generator())
