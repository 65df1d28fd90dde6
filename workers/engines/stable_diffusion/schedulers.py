"""Schedulers by name, built from the model's own configuration, one for each region."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from shared.errors import ParameterError, one_line
from shared.params import Params, Scheduler
from workers.engines.stable_diffusion.schedule_table import build_table

SCHEDULER_CLASSES: Mapping[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
PREDICTION_TYPES = ("epsilon", "v_prediction")
# diffusers' pipelines apply these to old configurations. Latents have no range to clip to.
OVERRIDES: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}


class Sampler:
    """One region's scheduler: its timesteps, its table of steps, and its random generator.

    All noise comes from ``generator``, on the CPU in float32, so that the result depends neither
    on the device nor on the model's dtype.
    """

    def __init__(
        self, config: Mapping[str, Any], params: Params, generator: torch.Generator
    ) -> None:
        """Raises ParameterError if the parameters leave no step, or too many for the scheduler."""
        self._scheduler = build_scheduler(config, params.scheduler)
        self._starts_from_noise = params.strength == 1.0
        self.generator = generator
        skipped = _set_timesteps(self._scheduler, params)
        self.timesteps: Tensor = self._scheduler.timesteps[skipped:]
        self.table = build_table(
            self._scheduler,
            params.scheduler,
            skipped=skipped,
            eta=params.eta,
            guidance=params.guidance_scale,
        )
        accepted = inspect.signature(self._scheduler.step).parameters
        options = {"eta": params.eta, "generator": generator}
        self._step_options = {name: options[name] for name in options if name in accepted}

    @property
    def needs_image_latents(self) -> bool:
        """Whether the first latents are the image plus noise: at any strength below 1."""
        return not self._starts_from_noise

    def draw_noise(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise, float32 on the CPU."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def initial_latents(self, noise: Tensor, image_latents: Tensor | None) -> Tensor:
        """Return the first latents, (1, C, h, w) float32; image_latents: None at strength 1."""
        if image_latents is None:
            return noise * self._scheduler.init_noise_sigma  # type: ignore[no-any-return]
        first_timestep = self.timesteps[:1]
        return self._scheduler.add_noise(  # type: ignore[no-any-return]
            image_latents, noise, first_timestep
        )

    def step(self, prediction: Tensor, step: int, latents: Tensor) -> Tensor:
        """Return diffusers' next latents, same shape, float32, for a scheduler without a table."""
        outputs = self._scheduler.step(
            prediction, self.timesteps[step], latents, **self._step_options, return_dict=False
        )
        return outputs[0]  # type: ignore[no-any-return]


def build_scheduler(config: Mapping[str, Any], name: Scheduler) -> Any:
    """Build a scheduler from the model's ``config``, ignoring keys that its class does not take.

    Raises ParameterError if the configuration does not fit the class.
    """
    try:
        return _build(config, name)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise ParameterError(
            f"scheduler {name!r} cannot be built from the model's scheduler_config.json: "
            f"{one_line(error)}; correct that file, or use another scheduler"
        ) from error


def _build(config: Mapping[str, Any], name: Scheduler) -> Any:
    scheduler_class = getattr(diffusers, SCHEDULER_CLASSES[name])
    accepted = inspect.signature(scheduler_class.__init__).parameters
    values = {**config, **OVERRIDES}
    if values.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {values['prediction_type']!r} is not supported")
    return scheduler_class.from_config({key: values[key] for key in values if key in accepted})


def _set_timesteps(scheduler: Any, params: Params) -> int:
    """Set the scheduler's timesteps and return how many of them strength skips.

    As ``get_timesteps`` of diffusers' inpainting pipeline: int(steps * strength) steps run.
    """
    steps = params.num_inference_steps
    steps_to_run = min(int(steps * params.strength), steps)
    _check_steps(scheduler, params, steps_to_run)
    scheduler.set_timesteps(steps, device="cpu")
    skipped = (steps - steps_to_run) * int(scheduler.order)
    # Otherwise a multistep scheduler searches for its first timestep, and may find a duplicate.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    # The schedule table scales the UNet's input; this keeps the scheduler from warning of that.
    scheduler.is_scale_input_called = True
    return skipped


def _check_steps(scheduler: Any, params: Params, steps_to_run: int) -> None:
    steps = params.num_inference_steps
    if steps_to_run < 1:
        raise ParameterError(
            f"num_inference_steps: {steps} at strength {params.strength:g} leaves no step; "
            "raise one of them"
        )
    max_steps = getattr(scheduler.config, "original_inference_steps", steps)  # LCM only
    if steps > max_steps:
        raise ParameterError(
            f"num_inference_steps: {steps} is more than scheduler {params.scheduler!r} supports; "
            f"use up to {max_steps}"
        )
