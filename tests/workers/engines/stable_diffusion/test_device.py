"""On a device that is not the host: which tensors lie where, and what is copied and when.

torch's meta device stands for a GPU. Its tensors have no values: reading one, which on a GPU would
wait for all work under way, is an error, and every operation is watched for tensors of two devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.geometry.box import Box
from shared.params import Scheduler
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    components,
    region,
)
from workers.engines.options import EngineOptions
from workers.engines.protocol import RegionWork
from workers.engines.stable_diffusion import denoiser as module
from workers.engines.stable_diffusion.batching import choose_rows, group_by_formula
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.denoiser import Denoiser
from workers.engines.stable_diffusion.host_device_copy import CopyStreams
from workers.engines.stable_diffusion.region_state import (
    DenoisingRegion,
    PreparedRegion,
    prepare_region,
    tensor_to_image,
)

pytestmark = IGNORE_DIFFUSERS_WARNING

DEVICE = torch.device("meta")
CANVAS = (Box(0, 0, 64, 64), Box(40, 0, 104, 64))
COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)
TABLED = ("ddim", "euler", "dpmpp_2m", "unipc")


class Watched(TorchDispatchMode):
    """Counts copies from the host; no other operation may see tensors of both devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = Counter[str]()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES:
            self.copies[self.phase] += len({one.device for one in (*given, found)}) > 1
        else:  # a number on the host is handed over with the call
            assert len({one.device for one in given if one.ndim}) < 2, func
        return found


class Uploading(CopyStreams):
    """Without the streams and the pinned memory, which only CUDA has."""

    def upload(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.to(DEVICE) for tensor in tensors]


@pytest.fixture
def parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Components:
    """On the host as yet, for drafts are drawn up there."""
    monkeypatch.setattr(module, "CopyStreams", Uploading)
    monkeypatch.setitem(module.MAX_ROWS, "meta", 8)
    return components(tiny_model)


def paint(parts: Components, *works: RegionWork) -> Counter[str]:
    """Goes through all that the device thread does; copies from the host by phase."""
    prepared_regions = [prepare_region(work, Future(), parts) for work in works]
    for part in (parts.unet, parts.vae, parts.text_encoder):
        part.half()
    there = replace(parts, device=DEVICE, dtype=torch.float16)
    watched = Watched()
    with torch.inference_mode():
        denoiser = Denoiser(there, EngineOptions(max_batch=8))
        with watched:
            _advance(denoiser, prepared_regions, watched)
    return watched.copies


def _advance(denoiser: Denoiser, prepared_regions: list[PreparedRegion], watched: Watched) -> None:
    watched.phase = "begin"
    active = regions = denoiser.start(prepared_regions)
    watched.phase = "steps"
    while active:
        rows = choose_rows(active, denoiser.max_rows)
        predictions = denoiser.predict(rows)
        complete = [
            row.region
            for row, prediction in zip(rows, predictions, strict=True)
            if row.region.add_prediction(row, prediction)
        ]
        for group in group_by_formula(complete):
            denoiser.step(group)
        assert {(one.latents.device, one.latents.dtype) for one in regions} == {
            (DEVICE, torch.float32)
        }
        active = [one for one in active if not one.is_done]
    watched.phase = "decode"
    _check_pictures(denoiser, regions)


def _check_pictures(denoiser: Denoiser, regions: list[DenoisingRegion]) -> None:
    for picture in denoiser.decode(regions):
        pixels, finite = tensor_to_image(picture), torch.isfinite(picture).all()
        assert (pixels.device, pixels.dtype, finite.device) == (DEVICE, torch.uint8, DEVICE)


@pytest.mark.parametrize("windows", [(Box(0, 0, 64, 64),), CANVAS], ids=["window", "canvas"])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_no_step_waits_for_the_device_or_mixes_it_with_the_host(
    parts: Components, scheduler: str, windows: tuple[Box, ...]
) -> None:
    given: dict[str, Any] = {"scheduler": scheduler, "windows": windows}
    copies = paint(parts, region(strength=1.0, **given), region(strength=0.6, **given))
    assert copies["begin"] > 0
    if scheduler in TABLED:
        assert copies["steps"] == 0


@pytest.mark.parametrize(
    "values", [{"cache_interval": 2}, {"guidance_end": 0.5}, {"guidance_scale": 1.0}], ids=str
)
def test_no_step_of_tabled_schedulers_copies_from_the_host(
    parts: Components, values: dict[str, Any]
) -> None:
    works = [region(scheduler=name, **values) for name in TABLED]
    assert paint(parts, *works)["steps"] == 0


def test_noise_that_a_step_draws_on_the_host_is_seen(parts: Components) -> None:
    assert paint(parts, region(scheduler="ddim", eta=0.3))["steps"] > 0
