"""Steps of ddim, euler and dpmpp_2m: one linear formula with different coefficients.

    x0 = (latents - sigma * noise) / alpha
    next = latents_weight * latents + x0_weight * x0 + direction_weight * direction
           + correction_weight * correction_scale * (x0 - x0 of the previous step)

``direction`` is the predicted noise, or for euler (latents - x0) / sigma. The last term makes
dpmpp_2m a linear two-step method; it is 0 for the others.

ddim: Song et al. 2021, equation 12. euler: Karras et al. 2022, algorithm 1. dpmpp_2m: Lu et al.
2022, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COLUMNS = (
    *("alpha", "sigma", "latents_weight", "x0_weight", "direction_weight"),
    *("uses_x0_direction", "correction_weight", "correction_scale"),
)
HISTORY_LENGTH = 1


def step(
    coefficients: Tensor, latents: Tensor, noise: Tensor, history: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the next latents and (x0,), all (N, C, H, W) float32.

    coefficients: (N, COLUMNS). noise: predicted, guidance applied. history: x0 of the previous
    step; any finite values at the first.
    """
    column = dict(zip(COLUMNS, coefficients[..., None, None, None].unbind(1), strict=True))
    (previous_x0,) = history
    # The order of these operations is diffusers': another order rounds differently.
    x0 = (latents - column["sigma"] * noise) / column["alpha"]
    # Algebraically the noise again; euler in diffusers computes it, and rounds, this way.
    x0_direction = (latents - x0) / column["sigma"]
    direction = torch.where(column["uses_x0_direction"] > 0, x0_direction, noise)
    first_order = column["latents_weight"] * latents + column["x0_weight"] * x0
    first_order = first_order + column["direction_weight"] * direction
    correction = column["correction_scale"] * (x0 - previous_x0)
    return first_order + column["correction_weight"] * correction, (x0,)


def ddim(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
    """Columns of DDIMScheduler with eta 0, (steps,) each."""
    timesteps = scheduler.timesteps[skipped:]
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    next_timesteps = timesteps - stride
    alphas = scheduler.alphas_cumprod
    alpha = alphas[timesteps]
    next_alpha = torch.where(
        next_timesteps >= 0, alphas[next_timesteps.clamp(min=0)], scheduler.final_alpha_cumprod
    )
    return {
        "alpha": alpha**0.5,
        "sigma": (1 - alpha) ** 0.5,
        "x0_weight": next_alpha**0.5,
        "direction_weight": (1 - next_alpha) ** 0.5,
    }


def euler(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
    """Columns of EulerDiscreteScheduler, (steps,) each."""
    sigmas = scheduler.sigmas[skipped:]
    ones = torch.ones(len(sigmas) - 1)
    return {
        "alpha": ones,
        "sigma": sigmas[:-1],
        "latents_weight": ones,
        "direction_weight": sigmas[1:] - sigmas[:-1],
        "uses_x0_direction": ones,
    }


def dpmpp_2m(scheduler: Any, skipped: int) -> Mapping[str, Tensor] | None:
    """Columns of DPMSolverMultistepScheduler; None if its configuration selects another solver.

    With half log-SNR lambda = log(alpha / sigma) and h its growth over a step: latents_weight is
    sigma_next / sigma, x0_weight is -alpha_next * (exp(-h) - 1).
    """
    config = scheduler.config
    solver = (config.algorithm_type, config.solver_order, config.solver_type)
    if solver != ("dpmsolver++", 2, "midpoint"):
        return None
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    lambdas = torch.log(alphas) - torch.log(sigmas)
    h = lambdas[1:] - lambdas[:-1]
    shrink = alphas[1:] * (torch.exp(-h) - 1.0)
    previous_h = torch.cat([h[:1], h[:-1]])
    correction_scale = 1.0 / (previous_h / h)
    is_first_order = _first_order_steps(config, len(h), skipped)
    columns = {
        "alpha": alphas[:-1],
        "sigma": sigmas[:-1],
        "latents_weight": sigmas[1:] / sigmas[:-1],
        "x0_weight": -shrink,
        "correction_weight": torch.where(is_first_order, 0.0, -0.5 * shrink),
        "correction_scale": torch.where(is_first_order, 0.0, correction_scale),
    }
    return {name: column[skipped:] for name, column in columns.items()}


def _first_order_steps(config: Any, steps: int, skipped: int) -> Tensor:
    """Return (steps,) bool: the first step, which has no previous x0, and diffusers' last ones."""
    is_first_order = torch.zeros(steps, dtype=torch.bool)
    is_first_order[skipped] = True
    is_first_order[-1] |= (
        config.euler_at_final
        or (config.lower_order_final and steps < 15)
        or config.final_sigmas_type == "zero"
    )
    return is_first_order
