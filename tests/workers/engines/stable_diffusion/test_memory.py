"""Out of memory: smaller batches, then memory modes as fallbacks, and back again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from shared.errors import DeviceLost, EngineUnavailable, OutOfMemory
from tests.workers.engines.stable_diffusion.samples import (
    UNetWatch,
    load_tiny,
    open_engine,
    region_work,
)
from workers.engines.options import EngineOptions, MemoryMode
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.denoiser import Denoiser
from workers.engines.stable_diffusion.memory_modes import MemoryModes
from workers.engines.stable_diffusion.oom import Backoff, RowLimit, is_out_of_memory

UNCHANGED_RESULT = ("attention_slicing", "vae_slicing", "model_offload", "sequential_offload")


@pytest.fixture
def components(tiny_model: Path) -> Components:
    return load_tiny(tiny_model)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def run(components: Components, work: RegionWork, **options: Any) -> Pixels:
    with open_engine(components, **options) as engine:
        return engine.submit(work).result(60)


@pytest.mark.parametrize("mode", get_args(MemoryMode))
def test_every_mode_can_be_chosen_and_is_in_the_report(tiny_model: Path, mode: str) -> None:
    expected = run(load_tiny(tiny_model), region_work(strength=0.6))
    work = region_work(strength=0.6)
    result = run(load_tiny(tiny_model), work, memory=(mode,))
    assert work.report.memory == mode
    difference = np.abs(result.astype(int) - expected)
    assert difference.max() <= (1 if mode in UNCHANGED_RESULT else 255)
    assert difference.mean() < 32


def test_the_report_is_empty_if_everything_fits(components: Components) -> None:
    work = region_work()
    run(components, work)
    assert work.report.memory == ""


def test_a_unet_that_does_not_fit_falls_back_to_memory_modes_and_reports_them(
    components: Components, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(components, region_work())
    watch = UNetWatch(components.unet)
    watch.before = lambda rows: raise_if(len(watch.rows) <= 3)
    work = region_work()
    result = run(components, work)
    assert np.abs(result.astype(int) - expected).max() <= 1
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert "out of memory with 2 rows in the UNet; continuing with 1" in caplog.text


def raise_if(does_not_fit: bool) -> None:
    if does_not_fit:
        raise out_of_memory()


@pytest.mark.parametrize(
    ("failures", "modes"),
    [
        (1, "vae_slicing"),
        (2, "vae_slicing, vae_tiling"),
        (4, "vae_slicing, vae_tiling, model_offload, sequential_offload"),
    ],
)
def test_a_vae_that_does_not_fit_falls_back_to_its_own_modes(
    components: Components, failures: int, modes: str
) -> None:
    calls: list[int] = []
    components.vae.decoder.register_forward_pre_hook(
        lambda _, args: (calls.append(1), raise_if(len(calls) <= failures))[0]
    )
    work = region_work()
    assert run(components, work).shape == (64, 64, 3)
    assert work.report.memory == modes


def test_a_prompt_that_does_not_fit_is_encoded_with_the_other_models_offloaded(
    components: Components,
) -> None:
    calls: list[int] = []
    components.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: (calls.append(1), raise_if(len(calls) == 1))[1], with_kwargs=True
    )
    work = region_work()
    run(components, work)
    assert work.report.memory == "model_offload"


def test_model_offload_keeps_one_model_on_the_device(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    for name in ("unet", "vae", "text_encoder"):
        monkeypatch.setattr(
            getattr(components, name),
            "to",
            lambda place, name=name: moves.append(f"{name} {place}"),
        )
    device: Any = "device"
    modes = MemoryModes(Components(**{**vars(components), "device": device}), ("model_offload",))
    assert moves == ["unet cpu", "vae cpu", "text_encoder cpu"]
    moves.clear()
    modes.bring_to_device("vae")
    assert moves == ["unet cpu", "text_encoder cpu", "vae device"]


def test_a_region_fails_without_the_engine_if_no_fallback_is_left(components: Components) -> None:
    watch = UNetWatch(components.unet)
    with open_engine(components) as engine:
        watch.before = lambda rows: raise_if(True)
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            engine.submit(region_work()).result(60)
        watch.before = None
        work = region_work()
        assert engine.submit(work).result(60).shape == (64, 64, 3)
    assert work.report.memory.endswith("attention_slicing, model_offload, sequential_offload")


def test_a_deterministic_engine_fails_instead_of_changing_its_batch(components: Components) -> None:
    watch = UNetWatch(components.unet)
    watch.before = lambda rows: raise_if(rows > 2)
    with (
        open_engine(components, deterministic=True, max_batch=4) as engine,
        pytest.raises(OutOfMemory, match="use a smaller max_batch"),
    ):
        engine.submit(region_work()).result(60)


def test_a_fallback_is_turned_off_again_and_a_chosen_mode_is_not(components: Components) -> None:
    clock = Clock()
    modes = MemoryModes(components, ("vae_slicing",), backoff=Backoff(clock))
    processors = dict(components.unet.attn_processors)
    assert modes.enable_fallback("unet")
    assert modes.enable_fallback("unet")
    assert modes.active == ("vae_slicing", "attention_slicing", "model_offload")
    modes.disable_fallback()
    assert len(modes.active) == 3
    for active in (("vae_slicing", "attention_slicing"), ("vae_slicing",), ("vae_slicing",)):
        clock.now += 1000
        modes.disable_fallback()
        assert modes.active == active
    assert components.unet.attn_processors == processors


def test_a_fallback_without_which_memory_runs_out_stays_on(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    modes = MemoryModes(components, (), backoff=Backoff(clock))
    assert modes.enable_fallback("text_encoder")

    def fail(device: torch.device) -> None:
        if device == "cuda":
            raise out_of_memory()

    monkeypatch.setattr(modes, "_move_all", fail)
    monkeypatch.setattr(modes, "_components", Components(**{**vars(components), "device": "cuda"}))
    clock.now += 1000
    modes.disable_fallback()
    assert modes.active == ("model_offload",)


def test_a_halved_batch_grows_again_after_a_longer_back_off_each_time() -> None:
    clock = Clock()
    limit = RowLimit(8, stage="the UNet", clock=clock)
    limit.halve(8)
    limit.halve(4)
    assert limit.rows == 2
    assert limit.is_reduced
    seconds = []
    for rows in (4, 8):
        start = clock.now
        while limit.rows < rows and clock.now < start + 1000:
            clock.now += 1
        seconds.append(clock.now - start)
    assert seconds == [120, 120]
    assert not limit.is_reduced
    limit.halve(8)
    clock.now += 239
    assert limit.rows == 4
    clock.now += 1
    assert limit.rows == 8


@pytest.mark.parametrize(("free_rows", "max_batch"), [(99, 8), (5, 4), (1, 1), (0, 1)])
def test_the_largest_batch_that_fits_is_chosen(
    components: Components, free_rows: int, max_batch: int
) -> None:
    watch = UNetWatch(components.unet)
    watch.before = lambda rows: raise_if(rows > free_rows)
    denoiser = Denoiser(components, EngineOptions(max_batch=None))
    with torch.inference_mode():
        denoiser._find_max_batch()
    assert denoiser.max_batch == max_batch


@pytest.mark.parametrize(
    ("free_rows", "max_batch", "images"), [(99, 8, 8), (7, 4, 2), (6, 4, 2), (5, 4, 1)]
)
def test_the_largest_batch_leaves_room_for_the_vae(
    components: Components, free_rows: int, max_batch: int, images: int
) -> None:
    """A graph keeps the memory of its rows while the VAE decodes."""
    watch, decoded = UNetWatch(components.unet), list[int]()

    def decode(_: Any, args: tuple[Any, ...]) -> None:
        raise_if(watch.rows[-1] + len(args[0]) > free_rows)
        decoded.append(len(args[0]))

    components.vae.decoder.register_forward_pre_hook(decode)
    denoiser = Denoiser(components, EngineOptions(max_batch=None, vae_batch=8))
    with torch.inference_mode():
        denoiser._find_max_batch()
    assert denoiser.max_batch == max_batch
    assert decoded == [images]
    assert denoiser.max_vae_images((8, 8)) == images


@pytest.mark.parametrize(
    ("size", "rows"), [((8, 8), 8), ((8, 16), 4), ((16, 16), 2), ((64, 64), 1)]
)
def test_larger_windows_get_fewer_rows_unless_max_batch_is_set(
    components: Components, size: tuple[int, int], rows: int
) -> None:
    assert components.unet.config.sample_size == 8
    assert Denoiser(components, EngineOptions(max_batch=None)).max_rows(size) == rows
    assert Denoiser(components, EngineOptions(max_batch=8)).max_rows(size) == 8


def test_every_bucket_is_warmed_up_at_the_start(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda unet, mode: unet)
    watch = UNetWatch(components.unet)
    with open_engine(components, compile="default", max_batch=12) as engine:
        assert watch.rows == [12, 8, 4, 2, 1]
        watch.rows.clear()
        engine.submit(region_work(num_inference_steps=2)).result(60)
        assert set(watch.rows) == {2}


def test_a_compiled_unet_runs_eagerly_while_its_attention_is_sliced(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile cannot trace a loop over the rows for a dynamic batch size."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode: compile(unet, backend="eager"))
    expected = run(components, region_work())
    with open_engine(components, compile="default", max_batch=2) as engine:
        failures = iter(range(3))
        watch = UNetWatch(components.unet)
        watch.before = lambda rows: raise_if(next(failures, None) is not None)
        work = region_work()
        result = engine.submit(work).result(60)
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert np.abs(result.astype(int) - expected).max() <= 1
    torch._dynamo.reset()


def test_an_out_of_memory_error_behind_another_error_is_detected() -> None:
    def fail(error: Exception) -> Exception:
        try:
            try:
                raise error
            finally:
                raise RuntimeError("the capture failed")
        except RuntimeError as last:
            return last

    assert is_out_of_memory(fail(out_of_memory()))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(fail(ValueError()))


def test_a_model_that_does_not_compile_is_refused_at_the_start_in_one_line(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no C compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda unet, mode: refuse)
    message = (
        "ValueError: no C compiler found; try attention auto, compile off and quantization off"
    )
    with (
        pytest.raises(EngineUnavailable, match=message),
        open_engine(components, compile="default"),
    ):
        pass


def test_a_device_lost_at_the_start_raises_device_lost(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: MemoryModes, device: torch.device) -> None:
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(MemoryModes, "_move_all", fail)
    with pytest.raises(DeviceLost) as caught, open_engine(components):
        pass
    assert caught.value.code == "device_lost"


@pytest.mark.parametrize("error", [out_of_memory, lambda: OutOfMemory("the text encoder")])
def test_a_model_that_does_not_fit_at_all_is_refused_at_the_start(
    components: Components, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    def fail(self: MemoryModes, device: torch.device) -> None:
        raise error()

    monkeypatch.setattr(MemoryModes, "_move_all", fail)
    with pytest.raises(EngineUnavailable, match="or memory model_offload"), open_engine(components):
        pass
