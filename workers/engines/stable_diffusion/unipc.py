"""unipc (Zhao et al. 2023, algorithms 1 and 2; second order, B(h) = exp(-h) - 1, image prediction).

Each step first corrects the latents by what the model says of them, then predicts the next ones:

    image = (latents - sigma * noise) / alpha
    corrected = keep * last - toward * image_1 - toward * (rho * slope_2 + new * (image - image_1))
    next = keep' * corrected - toward' * image - toward' * (rho' * slope_1)

``last`` are the corrected latents of the step before, ``image_1`` and ``image_2`` the images of
one and two steps before; a slope is the difference of an image and the one before it, over the
ratio of their distances in log-SNR.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COLUMNS = (
    *("alpha", "sigma"),
    *("is_corrected", "correct_keep", "correct_toward", "correct_rho", "correct_ratio"),
    *("correct_new", "keep", "toward", "rho", "ratio"),
)
HISTORY_LENGTH = 3


def step(
    rows: Tensor, latents: Tensor, noise: Tensor, history: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The next latents and history, all (N, C, H, W) float32.

    rows: (N, columns). noise: predicted, with guidance. history: the images of one and two steps
    before and the corrected latents of the last step; any finite values before the first.
    """
    of = dict(zip(COLUMNS, rows[..., None, None, None].unbind(1), strict=True))
    image_1, image_2, last = history
    image = (latents - of["sigma"] * noise) / of["alpha"]
    slope = of["correct_rho"] * ((image_2 - image_1) / of["correct_ratio"])
    corrected = of["correct_keep"] * last - of["correct_toward"] * image_1
    corrected -= of["correct_toward"] * (slope + of["correct_new"] * (image - image_1))
    latents = torch.where(of["is_corrected"] > 0, corrected, latents)
    slope = of["rho"] * ((image_1 - image) / of["ratio"])
    moved = of["keep"] * latents - of["toward"] * image
    return moved - of["toward"] * slope, (image, image_1, latents)


def unipc(scheduler: Any, skipped: int) -> Mapping[str, Tensor] | None:
    """None where the configuration asks for another variant."""
    config = scheduler.config
    kind = (config.solver_order, config.solver_type, config.predict_x0, config.solver_p)
    if kind != (2, "bh2", True, None) or config.disable_corrector or config.use_flow_sigmas:
        return None
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas)
    logs = torch.log(alphas) - torch.log(sigmas)
    widths = logs[1:] - logs[:-1]  # of step n, from n to n + 1
    steps = torch.arange(len(widths))
    is_second = steps > skipped
    if config.lower_order_final:
        is_second &= steps < len(widths) - 1
    toward = alphas[1:] * torch.expm1(-widths)
    # From a step's place to the one before, in widths of the step itself.
    ratio = torch.where(is_second, (logs[:-1].roll(1) - logs[:-1]) / widths, 1.0)
    rho, new = _corrector(widths, ratio, is_second)
    columns = {
        "keep": sigmas[1:] / sigmas[:-1],
        "toward": toward,
        "rho": torch.where(is_second, 0.5, 0.0),
        "ratio": ratio,
    }
    # The corrector goes over the step before again, from its end.
    before = {
        "correct_keep": columns["keep"],
        "correct_toward": toward,
        "correct_rho": rho,
        "correct_ratio": ratio,
        "correct_new": new,
    }
    found = {
        "alpha": alphas[:-1],
        "sigma": sigmas[:-1],
        "is_corrected": (steps > skipped).float(),
        **columns,
        **{name: column.roll(1) for name, column in before.items()},
    }
    return {name: column[skipped:] for name, column in found.items()}


def _corrector(widths: Tensor, ratio: Tensor, is_second: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the earlier slope and of the new one, for each step taken again."""
    growth = torch.expm1(-widths)
    first = growth / -widths - 1
    second = first / -widths - 0.5
    sides = torch.stack([first / growth, second * 2 / growth], dim=1)
    one = torch.ones_like(ratio)
    places = torch.stack([one, one, ratio, one], dim=1).reshape(-1, 2, 2)
    places[~is_second] = torch.eye(2)
    rho, new = torch.linalg.solve(places, sides).unbind(1)
    return torch.where(is_second, rho, 0.0), torch.where(is_second, new, 0.5)
