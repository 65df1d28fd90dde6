"""Schedulers from the model's configuration, and their steps as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from shared.errors import ParameterError
from shared.params import Scheduler
from tests.workers.engines.stable_diffusion.samples import IGNORE_DIFFUSERS_WARNING, params
from workers.engines.stable_diffusion.schedule_table import COMMON_COLUMNS, FORMULAS
from workers.engines.stable_diffusion.schedulers import SCHEDULER_CLASSES, Sampler, build_scheduler

pytestmark = IGNORE_DIFFUSERS_WARNING


@pytest.fixture
def config(tiny_model: Path) -> dict[str, object]:
    text = (tiny_model / "scheduler" / "scheduler_config.json").read_text()
    config = json.loads(text)
    assert isinstance(config, dict)
    return config


def test_every_scheduler_of_the_parameters_has_a_class() -> None:
    assert set(SCHEDULER_CLASSES) == set(get_args(Scheduler))


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_the_models_noise_schedule_is_kept(name: Scheduler, config: dict[str, object]) -> None:
    built = build_scheduler({**config, "prediction_type": "v_prediction"}, name)
    assert type(built).__name__ == SCHEDULER_CLASSES[name]
    assert built.config.beta_schedule == "scaled_linear"
    assert (built.config.beta_start, built.config.beta_end) == (0.00085, 0.012)
    assert built.config.prediction_type == "v_prediction"
    assert built.config.steps_offset == 1


def test_old_configurations_get_the_overrides_of_diffusers_pipelines(
    config: dict[str, object],
) -> None:
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
    latents = sampler.initial_latents(sampler.draw_noise((1, 4, 8, 8)), None)
    for step, row in enumerate(sampler.table.values):
        scaled = latents / row[COMMON_COLUMNS.index("input_divisor")]
        latents = sampler.step(0.1 * scaled, step, latents)
    assert torch.isfinite(latents).all()
    assert len(sampler.timesteps) == steps + (name == "pndm" and steps > 1)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [2, 3, 4, 20, 50])
@pytest.mark.parametrize("name", FORMULAS)
def test_steps_from_a_table_are_bit_identical_to_the_schedulers(
    name: Scheduler, steps: int, strength: float, config: dict[str, object]
) -> None:
    job_params = params(scheduler=name, num_inference_steps=steps, strength=strength)
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(config, job_params, generator)
    formula = sampler.table.formula
    assert formula is not None
    ours = theirs = sampler.draw_noise((2, 4, 8, 8))
    history = (ours,) * formula.history_length
    for step, row in enumerate(sampler.table.values[:, len(COMMON_COLUMNS) :]):
        noise = sampler.draw_noise((2, 4, 8, 8))
        theirs = sampler.step(noise, step, theirs)
        ours, history = formula.step(row.expand(2, -1), ours, noise, history)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_type": "bh1"}),
        ("unipc", {"disable_corrector": [0]}),
        ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("ddim", {"prediction_type": "v_prediction"}),
    ],
)
def test_other_variants_of_a_scheduler_have_no_table(
    name: Scheduler, variant: dict[str, object], config: dict[str, object]
) -> None:
    job_params = params(scheduler=name, num_inference_steps=4)
    assert Sampler(config, job_params, torch.Generator()).table.formula is not None
    assert Sampler({**config, **variant}, job_params, torch.Generator()).table.formula is None


def test_strength_skips_the_first_steps(config: dict[str, object]) -> None:
    full, part = (
        Sampler(config, params(num_inference_steps=10, strength=strength), torch.Generator())
        for strength in (1.0, 0.65)
    )
    assert part.timesteps.tolist() == full.timesteps.tolist()[4:]
    assert part.needs_image_latents
    assert not full.needs_image_latents


def test_parameters_that_leave_no_step_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=r"1 at strength 0\.5 leaves no step"):
        Sampler(config, params(num_inference_steps=1, strength=0.5), torch.Generator())
