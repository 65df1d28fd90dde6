"""The steps of a scheduler as numbers, so that regions with different ones advance together.

The operations and their order are diffusers', so that on the CPU the results are the same to the
last bit. What is in no table goes through diffusers' scheduler, region by region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engines.stable_diffusion import linear_steps, unipc

COMMON_COLUMNS = ("timestep", "divisor", "guidance")

StepFunction = Callable[
    [Tensor, Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]
]


@dataclass(frozen=True, kw_only=True)
class StepFormula:
    """One step of some schedulers, with a row of numbers for each region.

    advance: rows without their head, latents, noise and history to the next latents and history.
    history: how many tensors of the latents' shape a step leaves to the next one.
    """

    columns: tuple[str, ...]
    step: StepFunction
    history: int


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """(steps, columns) float32: the head, then the formula's columns where there is one.

    divisor: what the latents are divided by for the UNet. guidance: the guidance scale.
    """

    values: Tensor
    formula: StepFormula | None


def build_table(
    scheduler: Any, name: str, *, skipped: int, eta: float, guidance: float
) -> ScheduleTable:
    """The steps that are left after ``skipped``; the scheduler's timesteps are set."""
    timesteps = scheduler.timesteps[skipped:]
    divisor = torch.ones(len(timesteps))
    if name in ("euler", "euler_a"):
        divisor = (scheduler.sigmas[skipped:-1] ** 2 + 1) ** 0.5
    head = [timesteps.float(), divisor, torch.full((len(timesteps),), guidance)]
    known = _coefficients(scheduler, name, skipped) if eta == 0 else None
    if known is None:
        return ScheduleTable(values=torch.stack(head, dim=1), formula=None)
    formula, columns = known
    none = torch.zeros(len(timesteps))
    body = [columns.get(column, none) for column in formula.columns]
    return ScheduleTable(values=torch.stack([*head, *body], dim=1), formula=formula)


def apply_guidance(rows: Tensor, without: Tensor, prediction: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022); exact where both predictions are one.

    rows: (N, columns), one of the table for each. The others: (N, C, H, W).
    """
    scale = rows[:, COMMON_COLUMNS.index("guidance"), None, None, None]
    return without + scale * (prediction - without)


def _coefficients(
    scheduler: Any, name: str, skipped: int
) -> tuple[StepFormula, Mapping[str, Tensor]] | None:
    """None where the model's configuration asks for something else than the plain formula."""
    config = scheduler.config
    plain = config.prediction_type == "epsilon" and not getattr(config, "thresholding", False)
    if not plain or name not in FORMULAS:
        return None
    formula, coefficients = FORMULAS[name]
    columns = coefficients(scheduler, skipped)
    return None if columns is None else (formula, columns)


LINEAR = StepFormula(
    columns=linear_steps.COLUMNS, step=linear_steps.step, history=linear_steps.HISTORY_LENGTH
)
UNIPC = StepFormula(columns=unipc.COLUMNS, step=unipc.step, history=unipc.HISTORY_LENGTH)
FORMULAS: Mapping[str, tuple[StepFormula, Callable[[Any, int], Mapping[str, Tensor] | None]]] = {
    "ddim": (LINEAR, linear_steps.ddim),
    "euler": (LINEAR, linear_steps.euler),
    "dpmpp_2m": (LINEAR, linear_steps.dpmpp_2m),
    "unipc": (UNIPC, unipc.unipc),
}
