"""When memory runs out: fewer rows, then the modes that need less, and back again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from shared.errors import EngineError, EngineUnavailable, OutOfMemory
from tests.workers.engines.stable_diffusion.samples import UNetWatch, components, engine, region
from workers.engines.options import EngineOptions, MemoryMode
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.denoiser import Denoiser
from workers.engines.stable_diffusion.memory_modes import MemoryModes
from workers.engines.stable_diffusion.oom import Backoff, RowLimit, is_out_of_memory

HARMLESS = ("attention_slicing", "vae_slicing", "model_offload", "sequential_offload")


@pytest.fixture
def parts(tiny_model: Path) -> Components:
    return components(tiny_model)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def run(parts: Components, work: RegionWork, **options: Any) -> Pixels:
    with engine(parts, **options) as ours:
        return ours.submit(work).result(60)


@pytest.mark.parametrize("mode", get_args(MemoryMode))
def test_every_mode_can_be_chosen_and_is_reported(tiny_model: Path, mode: str) -> None:
    expected = run(components(tiny_model), region(strength=0.6))
    work = region(strength=0.6)
    found = run(components(tiny_model), work, memory=(mode,))
    assert work.report.memory == mode
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= (1 if mode in HARMLESS else 255)
    assert difference.mean() < 32


def test_where_everything_fits_nothing_is_reported(parts: Components) -> None:
    work = region()
    run(parts, work)
    assert work.report.memory == ""


def test_a_unet_that_does_not_fit_climbs_the_ladder_and_reports_its_rung(
    parts: Components, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(parts, region())
    watch = UNetWatch(parts.unet)
    watch.before = lambda rows: raise_while(len(watch.rows) <= 3)
    work = region()
    found = run(parts, work)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert "out of memory with 2 rows in the UNet; going on with 1" in caplog.text


def raise_while(is_full: bool) -> None:
    if is_full:
        raise out_of_memory()


@pytest.mark.parametrize(
    ("failures", "rungs"),
    [
        (1, "vae_slicing"),
        (2, "vae_slicing, vae_tiling"),
        (4, "vae_slicing, vae_tiling, model_offload, sequential_offload"),
    ],
)
def test_a_vae_that_does_not_fit_climbs_its_own_ladder(
    parts: Components, failures: int, rungs: str
) -> None:
    seen: list[int] = []
    parts.vae.decoder.register_forward_pre_hook(
        lambda _, args: (seen.append(1), raise_while(len(seen) <= failures))[0]
    )
    work = region()
    assert run(parts, work).shape == (64, 64, 3)
    assert work.report.memory == rungs


def test_a_prompt_that_does_not_fit_is_encoded_with_the_rest_away(parts: Components) -> None:
    seen: list[int] = []
    parts.text_encoder.register_forward_pre_hook(
        lambda _, args, named: (seen.append(1), raise_while(len(seen) == 1))[1], with_kwargs=True
    )
    work = region()
    run(parts, work)
    assert work.report.memory == "model_offload"


def test_whole_models_take_turns_on_the_device(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    for name in ("unet", "vae", "text_encoder"):
        monkeypatch.setattr(
            getattr(parts, name), "to", lambda place, name=name: moves.append(f"{name} {place}")
        )
    device: Any = "device"
    modes = MemoryModes(Components(**{**vars(parts), "device": device}), ("model_offload",))
    assert moves == ["unet cpu", "vae cpu", "text_encoder cpu"]
    moves.clear()
    modes.bring_to_device("vae")
    assert moves == ["unet cpu", "text_encoder cpu", "vae device"]


def test_nothing_left_to_try_fails_the_region_and_not_the_engine(parts: Components) -> None:
    watch = UNetWatch(parts.unet)
    with engine(parts) as ours:
        watch.before = lambda rows: raise_while(True)
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            ours.submit(region()).result(60)
        watch.before = None
        work = region()
        assert ours.submit(work).result(60).shape == (64, 64, 3)
    assert work.report.memory.endswith("attention_slicing, model_offload, sequential_offload")


def test_a_deterministic_engine_fails_rather_than_change_its_batch(parts: Components) -> None:
    watch = UNetWatch(parts.unet)
    watch.before = lambda rows: raise_while(rows > 2)
    with (
        engine(parts, deterministic=True, max_batch=4) as ours,
        pytest.raises(OutOfMemory, match="use a smaller max_batch"),
    ):
        ours.submit(region()).result(60)


def test_a_mode_taken_is_left_again_and_one_chosen_is_not(parts: Components) -> None:
    clock = Clock()
    modes = MemoryModes(parts, ("vae_slicing",), backoff=Backoff(clock))
    processors = dict(parts.unet.attn_processors)
    assert modes.enable_fallback("unet")
    assert modes.enable_fallback("unet")
    assert modes.active == ("vae_slicing", "attention_slicing", "model_offload")
    modes.disable_fallback()
    assert len(modes.active) == 3
    for left in (("vae_slicing", "attention_slicing"), ("vae_slicing",), ("vae_slicing",)):
        clock.now += 1000
        modes.disable_fallback()
        assert modes.active == left
    assert parts.unet.attn_processors == processors


def test_a_mode_that_cannot_be_left_stays(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    modes = MemoryModes(parts, (), backoff=Backoff(clock))
    assert modes.enable_fallback("text_encoder")

    def place(device: torch.device) -> None:
        if device == "cuda":
            raise out_of_memory()

    monkeypatch.setattr(modes, "_move_all", place)
    monkeypatch.setattr(modes, "_components", Components(**{**vars(parts), "device": "cuda"}))
    clock.now += 1000
    modes.disable_fallback()
    assert modes.active == ("model_offload",)


def test_a_batch_that_was_halved_grows_again_and_more_slowly_each_time() -> None:
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


@pytest.mark.parametrize(("room", "found"), [(99, 8), (5, 4), (1, 1), (0, 1)])
def test_the_largest_batch_that_fits_is_found(parts: Components, room: int, found: int) -> None:
    watch = UNetWatch(parts.unet)
    watch.before = lambda rows: raise_while(rows > room)
    denoiser = Denoiser(parts, EngineOptions(max_batch=None))
    with torch.inference_mode():
        denoiser._find_max_batch()
    assert denoiser.max_batch == found


@pytest.mark.parametrize(
    ("room", "found", "pictures"), [(99, 8, 8), (7, 4, 2), (6, 4, 2), (5, 4, 1)]
)
def test_the_largest_batch_leaves_room_for_the_vae(
    parts: Components, room: int, found: int, pictures: int
) -> None:
    """As where a graph keeps the memory of its rows while the VAE decodes."""
    watch, decoded = UNetWatch(parts.unet), list[int]()

    def decode(_: Any, given: tuple[Any, ...]) -> None:
        raise_while(watch.rows[-1] + len(given[0]) > room)
        decoded.append(len(given[0]))

    parts.vae.decoder.register_forward_pre_hook(decode)
    denoiser = Denoiser(parts, EngineOptions(max_batch=None, vae_batch=8))
    with torch.inference_mode():
        denoiser._find_max_batch()
    assert denoiser.max_batch == found
    assert decoded == [pictures]
    assert denoiser.max_vae_images((8, 8)) == pictures


@pytest.mark.parametrize(
    ("size", "rows"), [((8, 8), 8), ((8, 16), 4), ((16, 16), 2), ((64, 64), 1)]
)
def test_larger_windows_get_fewer_rows_unless_their_number_is_given(
    parts: Components, size: tuple[int, int], rows: int
) -> None:
    assert parts.unet.config.sample_size == 8
    assert Denoiser(parts, EngineOptions(max_batch=None)).max_rows(size) == rows
    assert Denoiser(parts, EngineOptions(max_batch=8)).max_rows(size) == 8


def test_every_batch_size_is_run_before_any_job_waits(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda unet, mode: unet)
    watch = UNetWatch(parts.unet)
    with engine(parts, compile="default", max_batch=12) as ours:
        assert watch.rows == [12, 8, 4, 2, 1]
        watch.rows.clear()
        ours.submit(region(num_inference_steps=2)).result(60)
        assert set(watch.rows) == {2}


def test_a_compiled_unet_goes_on_as_it_is_where_its_attention_is_sliced(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for any number of rows cannot be made of a loop over them."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode: compile(unet, backend="eager"))
    expected = run(parts, region())
    with engine(parts, compile="default", max_batch=2) as ours:
        tried = iter(range(3))
        watch = UNetWatch(parts.unet)
        watch.before = lambda rows: raise_while(next(tried, None) is not None)
        work = region()
        found = ours.submit(work).result(60)
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert np.abs(found.astype(int) - expected).max() <= 1
    torch._dynamo.reset()


def test_an_error_that_hides_the_lack_of_memory_is_seen_through() -> None:
    def fail(error: Exception) -> Exception:
        try:
            try:
                raise error
            finally:
                raise RuntimeError("the capture failed")
        except RuntimeError as found:
            return found

    assert is_out_of_memory(fail(out_of_memory()))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(fail(ValueError()))


def test_a_model_that_does_not_compile_is_one_line_before_any_job(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise ValueError("no C compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda unet, mode: refuse)
    message = (
        "ValueError: no C compiler found; try attention auto, compile off and quantization off"
    )
    with pytest.raises(EngineUnavailable, match=message), engine(parts, compile="default"):
        pass


def test_a_device_lost_at_the_start_is_not_given_up(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(self: MemoryModes, device: torch.device) -> None:
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(MemoryModes, "_move_all", place)
    with pytest.raises(EngineError) as caught, engine(parts):
        pass
    assert caught.value.code == "device_lost"


@pytest.mark.parametrize("error", [out_of_memory, lambda: OutOfMemory("the text encoder")])
def test_a_model_that_does_not_fit_at_all_is_an_answer(
    parts: Components, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    def place(self: MemoryModes, device: torch.device) -> None:
        raise error()

    monkeypatch.setattr(MemoryModes, "_move_all", place)
    with pytest.raises(EngineUnavailable, match="or memory model_offload"), engine(parts):
        pass
