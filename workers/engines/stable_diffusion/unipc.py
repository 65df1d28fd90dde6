"""Steps of unipc, a second-order predictor-corrector (Zhao et al. 2023, algorithms 1 and 2).

B(h) = exp(-h) - 1, x0 prediction. Each step first corrects its latents with the new x0, then
predicts the next ones. Coefficients with a prime are the current step's, without are the previous
step's:

    x0 = (latents - sigma' * noise) / alpha'
    corrected = latents_weight * previous_corrected - x0_weight * x0_1
                - x0_weight * (rho * slope_2 + new_rho * (x0 - x0_1))
    next = latents_weight' * corrected - x0_weight' * x0 - x0_weight' * (rho' * slope_1)

``x0_1`` and ``x0_2`` are the x0 of one and two steps before. ``slope_2`` is (x0_2 - x0_1) / ratio
and ``slope_1`` is (x0_1 - x0) / ratio', with the ratio of the two steps' distances in log-SNR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COLUMNS = (
    *("alpha", "sigma", "is_corrected"),
    *("corrector_latents_weight", "corrector_x0_weight"),
    *("corrector_rho", "corrector_ratio", "corrector_new_rho"),
    *("latents_weight", "x0_weight", "rho", "ratio"),
)
HISTORY_LENGTH = 3


def step(
    coefficients: Tensor, latents: Tensor, noise: Tensor, history: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the next latents and the next history, all (N, C, H, W) float32.

    coefficients: (N, COLUMNS). noise: predicted, guidance applied. history: x0 of one and two
    steps before and the corrected latents of the previous step; any finite values at the first.
    """
    column = dict(zip(COLUMNS, coefficients[..., None, None, None].unbind(1), strict=True))
    x0_1, x0_2, previous_corrected = history
    # The order of these operations is diffusers': another order rounds differently.
    x0 = (latents - column["sigma"] * noise) / column["alpha"]
    slope = column["corrector_rho"] * ((x0_2 - x0_1) / column["corrector_ratio"])
    corrected = column["corrector_latents_weight"] * previous_corrected
    corrected = corrected - column["corrector_x0_weight"] * x0_1
    corrected -= column["corrector_x0_weight"] * (slope + column["corrector_new_rho"] * (x0 - x0_1))
    latents = torch.where(column["is_corrected"] > 0, corrected, latents)
    slope = column["rho"] * ((x0_1 - x0) / column["ratio"])
    first_order = column["latents_weight"] * latents - column["x0_weight"] * x0
    return first_order - column["x0_weight"] * slope, (x0, x0_1, latents)


def unipc(scheduler: Any, skipped: int) -> Mapping[str, Tensor] | None:
    """Columns of UniPCMultistepScheduler; None if its configuration selects another variant."""
    if not _is_supported(scheduler.config):
        return None
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    lambdas = torch.log(alphas) - torch.log(sigmas)  # half log-SNR
    h = lambdas[1:] - lambdas[:-1]  # of step n, from n to n + 1
    steps = torch.arange(len(h))
    # diffusers runs the first step, and by default the last one, at first order.
    is_second_order = steps > skipped
    if scheduler.config.lower_order_final:
        is_second_order &= steps < len(h) - 1
    previous_h = lambdas[:-1].roll(1) - lambdas[:-1]  # negative: towards the step before
    predictor = {
        "latents_weight": sigmas[1:] / sigmas[:-1],
        "x0_weight": alphas[1:] * torch.expm1(-h),
        "rho": torch.where(is_second_order, 0.5, 0.0),
        "ratio": torch.where(is_second_order, previous_h / h, 1.0),
    }
    columns = {
        "alpha": alphas[:-1],
        "sigma": sigmas[:-1],
        "is_corrected": (steps > skipped).float(),
        **predictor,
        **_corrector_columns(predictor, h, is_second_order),
    }
    return {name: column[skipped:] for name, column in columns.items()}


def _corrector_columns(
    predictor: Mapping[str, Tensor], h: Tensor, is_second_order: Tensor
) -> dict[str, Tensor]:
    rho, new_rho = _corrector_weights(h, predictor["ratio"], is_second_order)
    corrector = {
        "corrector_latents_weight": predictor["latents_weight"],
        "corrector_x0_weight": predictor["x0_weight"],
        "corrector_rho": rho,
        "corrector_ratio": predictor["ratio"],
        "corrector_new_rho": new_rho,
    }
    # The corrector repeats the previous step, knowing x0 at its end: hence that step's values.
    return {name: column.roll(1) for name, column in corrector.items()}


def _is_supported(config: Any) -> bool:
    variant = (config.solver_order, config.solver_type, config.predict_x0, config.solver_p)
    is_plain = not config.disable_corrector and not config.use_flow_sigmas
    return variant == (2, "bh2", True, None) and is_plain


def _corrector_weights(h: Tensor, ratio: Tensor, is_second_order: Tensor) -> tuple[Tensor, Tensor]:
    """Solve each step's 2 x 2 system for the weights of the earlier slope and of the new one.

    The right side is (h phi_2, 2 h phi_3) / B(h) with diffusers' recurrence for phi.
    """
    h_phi_1 = torch.expm1(-h)  # also B(h)
    h_phi_2 = h_phi_1 / -h - 1
    h_phi_3 = h_phi_2 / -h - 0.5
    right_side = torch.stack([h_phi_2 / h_phi_1, h_phi_3 * 2 / h_phi_1], dim=1)
    ones = torch.ones_like(ratio)
    matrices = torch.stack([ones, ones, ratio, ones], dim=1).reshape(-1, 2, 2)
    matrices[~is_second_order] = torch.eye(2)
    rho, new_rho = torch.linalg.solve(matrices, right_side).unbind(1)
    return torch.where(is_second_order, rho, 0.0), torch.where(is_second_order, new_rho, 0.5)
