"""How an engine is asked to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["xformers", "sliced"]
Dtype = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs, whatever it is; the OpenCV engine uses none of it.

    device: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
    max_batch: most rows of one UNet forward; a window with guidance takes two.
    attention: None is torch's own scaled dot product; ``sliced`` trades speed for memory.
    """

    device: str = "auto"
    max_batch: int = 8
    dtype: Dtype = "auto"
    attention: Attention | None = None
