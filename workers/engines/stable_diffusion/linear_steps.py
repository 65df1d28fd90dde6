"""ddim (Song et al. 2021, equation 12), euler (Karras et al. 2022, algorithm 1) and dpmpp_2m (Lu et
al. 2022, algorithm 2): one formula with different coefficients.

    image = (latents - sigma * noise) / alpha
    next = keep * latents + to_image * image + along * direction + bend * change

``direction`` is the noise, or for euler (latents - image) / sigma; ``change`` is how far
``image`` moved since the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("alpha", "sigma", "keep", "to_image", "along", "is_ray", "bend", "change")
HISTORY_LENGTH = 1


def step(
    rows: Tensor, latents: Tensor, noise: Tensor, history: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The next latents and the image they lead to, all (N, C, H, W) float32.

    rows: (N, columns). noise: predicted, with guidance. history: the image that the step before
    led to; any finite values before the first.
    """
    of = dict(zip(COLUMNS, rows[..., None, None, None].unbind(1), strict=True))
    (last_image,) = history
    image = (latents - of["sigma"] * noise) / of["alpha"]
    direction = torch.where(of["is_ray"] > 0, (latents - image) / of["sigma"], noise)
    moved = of["keep"] * latents + of["to_image"] * image + of["along"] * direction
    return moved + of["bend"] * (of["change"] * (image - last_image)), (image,)


def ddim(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
    timesteps = scheduler.timesteps[skipped:]
    after = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod
    alpha = alphas[timesteps]
    next_alpha = torch.where(after >= 0, alphas[after.clamp(min=0)], scheduler.final_alpha_cumprod)
    return {
        "alpha": alpha**0.5,
        "sigma": (1 - alpha) ** 0.5,
        "to_image": next_alpha**0.5,
        "along": (1 - next_alpha) ** 0.5,
    }


def euler(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
    sigmas = scheduler.sigmas[skipped:]
    one = torch.ones(len(sigmas) - 1)
    return {
        "alpha": one,
        "sigma": sigmas[:-1],
        "keep": one,
        "along": sigmas[1:] - sigmas[:-1],
        "is_ray": one,
    }


def dpmpp_2m(scheduler: Any, skipped: int) -> Mapping[str, Tensor] | None:
    """None where the configuration asks for another variant."""
    config = scheduler.config
    kind = (config.algorithm_type, config.solver_order, config.solver_type)
    if kind != ("dpmsolver++", 2, "midpoint"):
        return None
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    logs = torch.log(alphas) - torch.log(sigmas)
    widths = logs[1:] - logs[:-1]
    shrink = alphas[1:] * (torch.exp(-widths) - 1.0)
    earlier = torch.cat([widths[:1], widths[:-1]])
    change = 1.0 / (earlier / widths)
    first_order = torch.zeros(len(widths), dtype=torch.bool)
    first_order[skipped] = True
    first_order[-1] |= (
        config.euler_at_final
        or (config.lower_order_final and len(widths) < 15)
        or config.final_sigmas_type == "zero"
    )
    columns = {
        "alpha": alphas[:-1],
        "sigma": sigmas[:-1],
        "keep": sigmas[1:] / sigmas[:-1],
        "to_image": -shrink,
        "bend": torch.where(first_order, 0.0, -0.5 * shrink),
        "change": torch.where(first_order, 0.0, change),
    }
    return {name: column[skipped:] for name, column in columns.items()}
