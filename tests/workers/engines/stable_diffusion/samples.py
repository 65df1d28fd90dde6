"""Regions and engines for the tests, and hooks that record what the UNet runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
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

# diffusers' sigma schedulers pass torch tensors to np.array: numpy 2 warns, and it works.
IGNORE_DIFFUSERS_WARNING = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def params(**values: Any) -> Params:
    """Defaults for the tests: few steps and a window of 64 px."""
    return Params(
        **{"prompt": "a red cat", "num_inference_steps": 5, "width": 64, "height": 64, **values}
    )


def region_work(
    *,
    windows: tuple[Box, ...] = (WINDOW,),
    size: tuple[int, int] | None = None,
    mask: Pixels | None = None,
    seed: int = 1,
    image_seed: int = 0,
    interruption: Interruption | None = None,
    **values: Any,
) -> RegionWork:
    """An image of random pixels, with a mask aligned to the latents' 8 px blocks.

    size: (width, height); by default what the windows cover.
    """
    width, height = size or (max(b.right for b in windows), max(b.bottom for b in windows))
    image = np.random.default_rng(image_seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mask is None:
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[16:48, 16 : width - 16] = 255
    return RegionWork(
        image=image,
        mask=mask,
        windows=windows,
        params=params(**values),
        seed=seed,
        interruption=interruption or Interruption(),
    )


def load_tiny(folder: Path) -> Components:
    return load_components(str(folder), None, EngineOptions(device="cpu"))


@contextmanager
def open_engine(components: Components, **options: Any) -> Iterator[DiffusionEngine]:
    """A diffusion engine over loaded components, closed at the end."""
    engine = DiffusionEngine(name="tiny", components=components, options=EngineOptions(**options))
    try:
        yield engine
    finally:
        engine.close()


class UNetWatch:
    """Records the rows of each UNet forward pass, and blocks passes while ``gate`` is clear.

    entered: set when a pass begins. before: called with the number of rows; may raise.
    """

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.before: Callable[[int], object] | None = None
        unet.register_forward_pre_hook(self._enter)

    def _enter(self, module: Any, args: tuple[Any, ...]) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        self.rows.append(len(args[0]))
        if self.before is not None:
            self.before(len(args[0]))
