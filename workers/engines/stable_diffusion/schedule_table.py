"""Scheduler steps as tables of coefficients, so that regions with different schedulers are stepped
together.

The operations and their order are diffusers', so that results on the CPU are bit-identical.
A scheduler without a table is stepped by diffusers, one region at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engines.stable_diffusion import linear_steps, unipc

COMMON_COLUMNS = ("timestep", "input_divisor", "guidance")

StepFunction = Callable[
    [Tensor, Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]
]


@dataclass(frozen=True, kw_only=True)
class StepFormula:
    """One step of one or several schedulers, computed from a row of coefficients per region.

    columns: names of the coefficients. step(coefficients, latents, noise, history): returns the
    next latents and the next history. history_length: tensors of the latents' shape that one
    step hands to the next.
    """

    columns: tuple[str, ...]
    step: StepFunction
    history_length: int


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """A region's steps. values: (steps, columns) float32, COMMON_COLUMNS first, then the formula's.

    timestep: the UNet's input. input_divisor: the UNet's latents are divided by it.
    guidance: the guidance scale. formula: None if diffusers must compute the steps.
    """

    values: Tensor
    formula: StepFormula | None


def build_table(
    scheduler: Any, name: str, *, skipped: int, eta: float, guidance: float
) -> ScheduleTable:
    """Tabulate the steps after the first ``skipped``; the scheduler's timesteps are already set."""
    timesteps = scheduler.timesteps[skipped:]
    input_divisor = torch.ones(len(timesteps))
    if name in ("euler", "euler_a"):
        # These schedulers' latents grow with sigma; see scale_model_input in diffusers.
        input_divisor = (scheduler.sigmas[skipped:-1] ** 2 + 1) ** 0.5
    common = [timesteps.float(), input_divisor, torch.full((len(timesteps),), guidance)]
    # With eta above 0 each step draws noise from the region's own generator.
    entry = _formula_and_coefficients(scheduler, name, skipped) if eta == 0 else None
    if entry is None:
        return ScheduleTable(values=torch.stack(common, dim=1), formula=None)
    formula, columns = entry
    # A scheduler names only the columns that it uses; the formula ignores a zero term.
    zeros = torch.zeros(len(timesteps))
    coefficients = [columns.get(column, zeros) for column in formula.columns]
    return ScheduleTable(values=torch.stack([*common, *coefficients], dim=1), formula=formula)


def apply_guidance(table_rows: Tensor, unconditional: Tensor, conditional: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022), (N, C, H, W) for one table row per region.

        noise = unconditional + guidance * (conditional - unconditional)

    Exact if both predictions are the same tensor, as they are without guidance.
    """
    guidance = table_rows[:, COMMON_COLUMNS.index("guidance"), None, None, None]
    return unconditional + guidance * (conditional - unconditional)


def _formula_and_coefficients(
    scheduler: Any, name: str, skipped: int
) -> tuple[StepFormula, Mapping[str, Tensor]] | None:
    """None if the model's configuration selects a variant that no formula here covers."""
    config = scheduler.config
    is_plain = config.prediction_type == "epsilon" and not getattr(config, "thresholding", False)
    if not is_plain or name not in FORMULAS:
        return None
    formula, coefficients = FORMULAS[name]
    columns = coefficients(scheduler, skipped)
    return None if columns is None else (formula, columns)


LINEAR = StepFormula(
    columns=linear_steps.COLUMNS,
    step=linear_steps.step,
    history_length=linear_steps.HISTORY_LENGTH,
)
UNIPC = StepFormula(columns=unipc.COLUMNS, step=unipc.step, history_length=unipc.HISTORY_LENGTH)
FORMULAS: Mapping[str, tuple[StepFormula, Callable[[Any, int], Mapping[str, Tensor] | None]]] = {
    "ddim": (LINEAR, linear_steps.ddim),
    "euler": (LINEAR, linear_steps.euler),
    "dpmpp_2m": (LINEAR, linear_steps.dpmpp_2m),
    "unipc": (UNIPC, unipc.unipc),
}
