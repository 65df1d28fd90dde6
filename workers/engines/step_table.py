"""The steps of a scheduler as numbers, so that regions with different ones advance together.

ddim (Song et al. 2021, equation 12), euler (Karras et al. 2022, algorithm 1) and dpmpp_2m (Lu
et al. 2022, algorithm 2) are one formula with different coefficients:

    image = (latents - sigma * noise) / alpha
    next = keep * latents + to_image * image + along * direction + bend * change

``direction`` is the noise, or for euler (latents - image) / sigma; ``change`` is how far
``image`` moved since the step before. The operations and their order are diffusers', so that
on the CPU the results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS = (
    *("timestep", "divisor", "guidance"),
    *("alpha", "sigma", "keep", "to_image", "along", "is_ray", "bend", "change"),
)


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """(steps, columns) float32. ``is_whole``: the step itself is in it, not only its input.

    divisor: what the latents are divided by for the UNet. guidance: the guidance scale.
    """

    values: Tensor
    is_whole: bool


def tabulate(scheduler: Any, name: str, *, skipped: int, eta: float, guidance: float) -> StepTable:
    """The steps that are left after ``skipped``; the scheduler's timesteps are set."""
    timesteps = scheduler.timesteps[skipped:]
    divisor = torch.ones(len(timesteps))
    if name in ("euler", "euler_a"):
        divisor = (scheduler.sigmas[skipped:-1] ** 2 + 1) ** 0.5
    known = _coefficients(scheduler, name, skipped) if eta == 0 else None
    columns = {
        "timestep": timesteps.float(),
        "divisor": divisor,
        "guidance": torch.full((len(timesteps),), guidance),
        **(known or {}),
    }
    none = torch.zeros(len(timesteps))
    values = torch.stack([columns.get(column, none) for column in COLUMNS], dim=1)
    return StepTable(values=values, is_whole=known is not None)


def guide(rows: Tensor, without: Tensor, prediction: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022); exact where both predictions are one.

    rows: (N, columns), one of the table for each. The others: (N, C, H, W).
    """
    scale = rows[:, COLUMNS.index("guidance"), None, None, None]
    return without + scale * (prediction - without)


def advance(
    rows: Tensor, latents: Tensor, last_image: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The next latents and the image they lead to, both (N, C, H, W) float32.

    rows: (N, columns). last_image: what the step before led to; any finite values before the
    first. noise: predicted, with guidance.
    """
    of = dict(zip(COLUMNS, rows[..., None, None, None].unbind(1), strict=True))
    image = (latents - of["sigma"] * noise) / of["alpha"]
    direction = torch.where(of["is_ray"] > 0, (latents - image) / of["sigma"], noise)
    moved = of["keep"] * latents + of["to_image"] * image + of["along"] * direction
    return moved + of["bend"] * (of["change"] * (image - last_image)), image


def _coefficients(scheduler: Any, name: str, skipped: int) -> Mapping[str, Tensor] | None:
    """None where the model's configuration asks for something else than the plain formula."""
    config = scheduler.config
    plain = config.prediction_type == "epsilon" and not getattr(config, "thresholding", False)
    return FORMULAS[name](scheduler, skipped) if plain and name in FORMULAS else None


def _ddim(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
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


def _euler(scheduler: Any, skipped: int) -> Mapping[str, Tensor]:
    sigmas = scheduler.sigmas[skipped:]
    one = torch.ones(len(sigmas) - 1)
    return {
        "alpha": one,
        "sigma": sigmas[:-1],
        "keep": one,
        "along": sigmas[1:] - sigmas[:-1],
        "is_ray": one,
    }


def _dpmpp_2m(scheduler: Any, skipped: int) -> Mapping[str, Tensor] | None:
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


FORMULAS: Mapping[str, Callable[[Any, int], Mapping[str, Tensor] | None]] = {
    "ddim": _ddim,
    "euler": _euler,
    "dpmpp_2m": _dpmpp_2m,
}
