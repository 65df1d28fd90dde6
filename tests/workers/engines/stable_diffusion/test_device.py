"""On a device other than the host: where tensors lie, and what is copied when.

torch's meta device stands for a GPU. Its tensors have no values, so reading one (which on a GPU
waits for all work enqueued) is an error. Every operation is checked for tensors of two devices.
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
    load_tiny,
    region_work,
)
from workers.engines.options import EngineOptions
from workers.engines.protocol import RegionWork
from workers.engines.stable_diffusion import denoiser as denoiser_module
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
WITH_TABLE = ("ddim", "euler", "dpmpp_2m", "unipc")


class DeviceMonitor(TorchDispatchMode):
    """Counts copies from the host by phase; other operations may not mix tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = Counter[str]()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES:
            self.copies[self.phase] += len({tensor.device for tensor in (*tensors, result)}) > 1
        else:  # a scalar on the host is passed with the kernel's launch
            assert len({tensor.device for tensor in tensors if tensor.ndim}) < 2, func
        return result


class MetaCopyStreams(CopyStreams):
    """Uploads to the meta device, without the streams and pinned memory that only CUDA has."""

    def upload(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [tensor.to(DEVICE) for tensor in tensors]


@pytest.fixture
def components(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Components:
    """Components on the host, where regions are prepared."""
    monkeypatch.setattr(denoiser_module, "CopyStreams", MetaCopyStreams)
    monkeypatch.setitem(denoiser_module.MAX_ROWS, "meta", 8)
    return load_tiny(tiny_model)


def run_on_meta(components: Components, *works: RegionWork) -> Counter[str]:
    """Do all that the device thread does, and return the copies from the host by phase."""
    prepared_regions = [prepare_region(work, Future(), components) for work in works]
    for module in (components.unet, components.vae, components.text_encoder):
        module.half()
    on_device = replace(components, device=DEVICE, dtype=torch.float16)
    monitor = DeviceMonitor()
    with torch.inference_mode():
        denoiser = Denoiser(on_device, EngineOptions(max_batch=8))
        with monitor:
            _denoise(denoiser, prepared_regions, monitor)
    return monitor.copies


def _denoise(
    denoiser: Denoiser, prepared_regions: list[PreparedRegion], monitor: DeviceMonitor
) -> None:
    monitor.phase = "start"
    active = regions = denoiser.start(prepared_regions)
    monitor.phase = "steps"
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
        assert {(region.latents.device, region.latents.dtype) for region in regions} == {
            (DEVICE, torch.float32)
        }
        active = [region for region in active if not region.is_done]
    monitor.phase = "decode"
    _check_images(denoiser, regions)


def _check_images(denoiser: Denoiser, regions: list[DenoisingRegion]) -> None:
    for image in denoiser.decode(regions):
        pixels, is_finite = tensor_to_image(image), torch.isfinite(image).all()
        assert (pixels.device, pixels.dtype, is_finite.device) == (DEVICE, torch.uint8, DEVICE)


@pytest.mark.parametrize("windows", [(Box(0, 0, 64, 64),), CANVAS], ids=["window", "canvas"])
@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_no_step_waits_for_the_device_or_mixes_tensors_of_host_and_device(
    components: Components, scheduler: str, windows: tuple[Box, ...]
) -> None:
    values: dict[str, Any] = {"scheduler": scheduler, "windows": windows}
    works = [region_work(strength=strength, **values) for strength in (1.0, 0.6)]
    copies = run_on_meta(components, *works)
    assert copies["start"] > 0
    if scheduler in WITH_TABLE:
        assert copies["steps"] == 0


@pytest.mark.parametrize(
    "values", [{"cache_interval": 2}, {"guidance_end": 0.5}, {"guidance_scale": 1.0}], ids=str
)
def test_no_step_of_schedulers_with_a_table_copies_from_the_host(
    components: Components, values: dict[str, Any]
) -> None:
    works = [region_work(scheduler=scheduler, **values) for scheduler in WITH_TABLE]
    assert run_on_meta(components, *works)["steps"] == 0


def test_noise_that_a_step_draws_on_the_host_is_detected(components: Components) -> None:
    assert run_on_meta(components, region_work(scheduler="ddim", eta=0.3))["steps"] > 0
