"""Schedulers by name, built from the model's own configuration, one for each region."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from shared.errors import ParameterError
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
# What diffusers' pipelines force on old configurations; latents have no range to clip to.
OVERRIDES: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}


class Sampler:
    """The way of one region from noise to latents: which timesteps, and what each does.

    Every random draw comes from ``generator``, on the CPU and in float32 whatever the
    device and the model's dtype, so that they do not change the noise.
    """

    def __init__(
        self, config: Mapping[str, Any], params: Params, generator: torch.Generator
    ) -> None:
        """Raises ParameterError where the parameters leave no step, or too many for LCM."""
        self._scheduler = build_scheduler(config, params.scheduler)
        self._is_pure_noise = params.strength == 1.0
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
        choices = {"eta": params.eta, "generator": generator}
        self._step_options = {key: choices[key] for key in choices if key in accepted}

    @property
    def needs_image_latents(self) -> bool:
        """Whether the start is the image with noise, as for any strength below 1."""
        return not self._is_pure_noise

    def draw_noise(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise, float32 on the CPU."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def initial_latents(self, noise: Tensor, image_latents: Tensor | None) -> Tensor:
        """The first latents, (1, C, h, w) float32; with image latents if needed."""
        if image_latents is None:
            return noise * self._scheduler.init_noise_sigma  # type: ignore[no-any-return]
        first = self.timesteps[:1]
        return self._scheduler.add_noise(image_latents, noise, first)  # type: ignore[no-any-return]

    def step(self, prediction: Tensor, step: int, latents: Tensor) -> Tensor:
        """The latents one step on, same shape, float32, for steps that no table holds."""
        found = self._scheduler.step(
            prediction, self.timesteps[step], latents, **self._step_options, return_dict=False
        )
        return found[0]  # type: ignore[no-any-return]


def build_scheduler(config: Mapping[str, Any], name: Scheduler) -> Any:
    """A new scheduler; keys of ``config`` that its class does not know are left out.

    Raises ParameterError where the model's ``config`` does not suit it.
    """
    try:
        return _build(config, name)
    except (TypeError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise ParameterError(
            f"scheduler {name!r} cannot be built from the model's scheduler_config.json: "
            f"{' '.join(str(error).split())[:160]}; mend that file, or use another scheduler"
        ) from error


def _build(config: Mapping[str, Any], name: Scheduler) -> Any:
    kind = getattr(diffusers, SCHEDULER_CLASSES[name])
    known = inspect.signature(kind.__init__).parameters
    values = {**config, **OVERRIDES}
    if values.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {values['prediction_type']!r} is not known")
    return kind.from_config({key: values[key] for key in values if key in known})


def _set_timesteps(scheduler: Any, params: Params) -> int:
    """How many of the scheduler's timesteps are left out, which are set on the CPU.

    Strength decides how many of the steps are run, as in diffusers' ``get_timesteps``.
    """
    steps = params.num_inference_steps
    run = min(int(steps * params.strength), steps)
    if run < 1:
        raise ParameterError(
            f"num_inference_steps: {steps} at strength {params.strength:g} leaves no step; "
            "raise one of them"
        )
    most = getattr(scheduler.config, "original_inference_steps", steps)
    if steps > most:
        raise ParameterError(
            f"num_inference_steps: {steps} is more than scheduler {params.scheduler!r} takes; "
            f"use up to {most}"
        )
    scheduler.set_timesteps(steps, device="cpu")
    skipped = (steps - run) * int(scheduler.order)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    # The table scales the UNet's input; without this the scheduler warns that nobody did.
    scheduler.is_scale_input_called = True
    return skipped
