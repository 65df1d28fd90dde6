"""Regions and engines for the tests, and watches on what a model computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.geometry.box import Box
from shared.params import Params
from workers.engines.options import EngineOptions
from workers.engines.protocol import Interruption, Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components, load_components
from workers.engines.stable_diffusion.engine import DiffusionEngine

WINDOW = Box(0, 0, 64, 64)

# diffusers' sigma schedulers hand torch tensors to np.array; numpy 2 warns, and it works.
IGNORE_DIFFUSERS_WARNING = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def params(**values: Any) -> Params:
    """Few steps and a 64 px window, unless said otherwise."""
    return Params(
        **{"prompt": "a red cat", "num_inference_steps": 5, "width": 64, "height": 64, **values}
    )


def region(
    *,
    windows: tuple[Box, ...] = (WINDOW,),
    size: tuple[int, int] | None = None,
    mask: Pixels | None = None,
    seed: int = 1,
    picture: int = 0,
    stop: Interruption | None = None,
    **values: Any,
) -> RegionWork:
    """Noise for a picture, with a mask aligned to the latents' 8 px blocks.

    size: (width, height), by default just what the windows cover.
    """
    width, height = size or (max(b.right for b in windows), max(b.bottom for b in windows))
    image = np.random.default_rng(picture).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mask is None:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[16:48, 16 : width - 16] = 255
    return RegionWork(
        image=image,
        mask=mask,
        windows=windows,
        params=params(**values),
        seed=seed,
        interruption=stop or Interruption(),
    )


def components(folder: Path) -> Components:
    return load_components(str(folder), None, EngineOptions(device="cpu"))


@contextmanager
def engine(parts: Components, **options: Any) -> Iterator[DiffusionEngine]:
    """A diffusion engine over loaded components, closed at the end."""
    found = DiffusionEngine(name="tiny", components=parts, options=EngineOptions(**options))
    try:
        yield found
    finally:
        found.close()


class UNetWatch:
    """Counts the UNet's forwards, and holds them back while ``gate`` is clear."""

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.before: Any = None
        unet.register_forward_pre_hook(self._enter)

    def _enter(self, module: Any, args: tuple[Any, ...]) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        self.rows.append(len(args[0]))
        if self.before is not None:
            self.before(len(args[0]))
