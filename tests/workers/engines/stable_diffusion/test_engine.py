"""The engine's device thread: shared forward passes, fairness, interruption, errors, closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import (
    Cancelled,
    DeviceLost,
    EngineError,
    GateNotFinite,
    OutOfMemory,
    ParameterError,
    Released,
)
from shared.geometry.box import Box
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    UNetWatch,
    load_tiny,
    open_engine,
    region_work,
)
from workers.engines.protocol import Interruption, Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.prompts import PromptEncoder
from workers.engines.stable_diffusion.schedulers import Sampler

pytestmark = IGNORE_DIFFUSERS_WARNING

MIXED: tuple[dict[str, Any], ...] = (
    {"prompt": "a red cat", "scheduler": "ddim", "num_inference_steps": 6, "strength": 0.6},
    {"prompt": "blue sky", "scheduler": "euler_a", "num_inference_steps": 4, "strength": 1.0},
    {"prompt": "wooden table", "scheduler": "unipc", "guidance_scale": 1.0, "seed": 9},
    {"prompt": "a cat", "negative_prompt": "blurry", "scheduler": "lcm", "guidance_scale": 3.0},
)


@pytest.fixture
def components(tiny_model: Path) -> Components:
    """Loaded for each test, so that hooks do not outlive it."""
    return load_tiny(tiny_model)


@pytest.fixture
def watch(components: Components) -> Iterator[UNetWatch]:
    watch = UNetWatch(components.unet)
    yield watch
    watch.gate.set()


def run_alone(components: Components, work: RegionWork) -> Pixels:
    with open_engine(components) as engine:
        return engine.submit(work).result(60)


def run_together(
    components: Components, watch: UNetWatch, works: list[RegionWork], **options: Any
) -> list[Pixels]:
    """Submit the rest while the first is blocked in its first forward pass; they join it then."""
    watch.gate.clear()
    watch.entered.clear()
    with open_engine(components, **options) as engine:
        futures = [engine.submit(works[0])]
        assert watch.entered.wait(30)
        futures += [engine.submit(work) for work in works[1:]]
        watch.gate.set()
        return [future.result(60) for future in futures]


def assert_close(result: Pixels, expected: Pixels) -> None:
    """Equal up to 1 of 255: batches of other sizes round floats differently."""
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_different_regions_share_forward_passes_and_equal_their_solo_runs(
    components: Components, watch: UNetWatch
) -> None:
    works = [region_work(image_seed=seed, **values) for seed, values in enumerate(MIXED)]
    alone = [run_alone(components, work) for work in works]
    solo_rows, solo_forwards = sum(watch.rows), len(watch.rows)
    watch.rows.clear()
    for result, expected in zip(run_together(components, watch, works), alone, strict=True):
        assert_close(result, expected)
    assert sum(watch.rows) == solo_rows
    assert max(watch.rows) == 7  # three regions with guidance and one without
    assert len(watch.rows) < solo_forwards / 2


def test_a_batched_vae_changes_no_result(components: Components, watch: UNetWatch) -> None:
    works = [region_work(image_seed=seed, strength=0.6, seed=seed) for seed in range(3)]
    batches: list[int] = []
    components.vae.encoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    alone = [run_alone(components, work) for work in works]
    assert set(batches) == {1}
    for result, expected in zip(
        run_together(components, watch, works, vae_batch=4), alone, strict=True
    ):
        assert_close(result, expected)
    assert max(batches) == 4


def test_seed_and_prompts_determine_the_image(components: Components) -> None:
    works = [
        region_work(),
        region_work(seed=2),
        region_work(prompt="blue sky"),
        region_work(negative_prompt="blurry"),
    ]
    results = [run_alone(components, work) for work in works]
    assert len({result.tobytes() for result in results}) == len(works)
    assert np.array_equal(run_alone(components, region_work()), results[0])


def test_steps_after_the_end_of_guidance_run_one_row(
    components: Components, watch: UNetWatch
) -> None:
    full, half = region_work(strength=1.0), region_work(strength=1.0, guidance_end=0.5)
    expected = run_alone(components, full)
    assert watch.rows == [2] * 5
    watch.rows.clear()
    result = run_alone(components, half)
    assert watch.rows == [2, 2, 2, 1, 1]
    assert not np.array_equal(result, expected)
    watch.rows.clear()
    unguided = run_alone(components, region_work(strength=1.0, guidance_end=0.0))
    assert np.array_equal(
        unguided, run_alone(components, region_work(strength=1.0, guidance_scale=1.0))
    )
    assert set(watch.rows) == {1}


def test_guidance_of_a_canvas_can_end_early(components: Components) -> None:
    windows = (Box(0, 0, 64, 64), Box(40, 0, 104, 64))
    work = region_work(windows=windows, guidance_end=0.4)
    results = []
    for max_batch in (8, 3):
        with open_engine(components, max_batch=max_batch) as engine:
            results.append(engine.submit(work).result(60))
    assert_close(*results)


def test_batches_of_one_and_three_rows_give_the_same_result(
    components: Components, watch: UNetWatch
) -> None:
    work = region_work()
    expected = run_alone(components, work)
    for max_batch in (1, 3):
        watch.rows.clear()
        assert_close(
            run_together(components, watch, [work, work], max_batch=max_batch)[1], expected
        )
        assert max(watch.rows) == min(max_batch, 2)


def test_a_canvas_of_many_windows_does_not_delay_a_small_region(
    components: Components, watch: UNetWatch
) -> None:
    windows = tuple(Box(left, 0, left + 64, 64) for left in range(0, 321, 32))
    order: list[str] = []
    forwards_before_decode: list[int] = []
    components.vae.decoder.register_forward_pre_hook(
        lambda *_: forwards_before_decode.append(len(watch.rows))
    )
    watch.gate.clear()
    with open_engine(components, max_batch=4) as engine:
        canvas = engine.submit(region_work(windows=windows))
        assert watch.entered.wait(30)
        small = engine.submit(region_work(num_inference_steps=4, strength=1.0))
        canvas.add_done_callback(lambda _: order.append("canvas"))
        small.add_done_callback(lambda _: order.append("small"))
        watch.gate.set()
        canvas.result(60)
    # One pass before it joins; from then on it has rows in at least every second one.
    assert forwards_before_decode[0] in range(5, 10)
    assert order == ["small", "canvas"]
    assert max(watch.rows) <= 4


def test_windows_of_different_sizes_equal_their_solo_runs(
    components: Components, watch: UNetWatch
) -> None:
    wide = Box(0, 0, 128, 64)
    works = [region_work(), region_work(windows=(wide,), width=128), region_work(seed=3)]
    alone = [run_alone(components, work) for work in works]
    for result, expected in zip(run_together(components, watch, works), alone, strict=True):
        assert_close(result, expected)


def test_an_interrupted_region_stops_at_its_next_step_without_its_neighbours(
    components: Components, watch: UNetWatch
) -> None:
    neighbour = region_work(num_inference_steps=6, strength=1.0)
    expected = run_alone(components, neighbour)
    watch.rows.clear()
    interruption = Interruption()
    watch.before = lambda _: (
        interruption.set(Cancelled("by the user")) if len(watch.rows) == 3 else None
    )
    watch.gate.clear()
    watch.entered.clear()
    with open_engine(components) as engine:
        cancelled = engine.submit(region_work(num_inference_steps=200, interruption=interruption))
        assert watch.entered.wait(30)
        future = engine.submit(neighbour)
        watch.gate.set()
        with pytest.raises(Cancelled, match="by the user"):
            cancelled.result(60)
        assert_close(future.result(60), expected)
    assert watch.rows == [2, 4, 4, 2, 2, 2, 2]


def test_a_region_interrupted_before_its_start_runs_no_forward_pass(
    components: Components, watch: UNetWatch
) -> None:
    interruption = Interruption()
    interruption.set(Cancelled("by the user"))
    with open_engine(components) as engine, pytest.raises(Cancelled):
        engine.submit(region_work(interruption=interruption)).result(60)
    assert watch.rows == []


def raise_above(rows: int, error: Callable[[], Exception]) -> Callable[[int], None]:
    def check(batch_rows: int) -> None:
        if batch_rows > rows:
            raise error()

    return check


def test_running_out_of_memory_halves_the_batch(
    components: Components, watch: UNetWatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = [region_work(seed=seed) for seed in range(3)]
    alone = [run_alone(components, work) for work in works]
    watch.before = raise_above(2, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    for result, expected in zip(run_together(components, watch, works), alone, strict=True):
        assert_close(result, expected)
    assert "out of memory with 6 rows in the UNet; continuing with 3" in caplog.text
    assert "with 3 rows in the UNet; continuing with 1" in caplog.text


def test_a_vae_that_runs_out_of_memory_halves_its_batch(
    components: Components, watch: UNetWatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = [region_work(seed=seed) for seed in range(3)]
    alone = [run_alone(components, work) for work in works]
    check = raise_above(1, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    components.vae.decoder.register_forward_pre_hook(lambda _, args: check(len(args[0])))
    results = run_together(components, watch, works, vae_batch=4)
    for result, expected in zip(results, alone, strict=True):
        assert_close(result, expected)
    assert "in the VAE; continuing with 1" in caplog.text


def test_a_window_too_large_for_the_device_fails_without_the_engine(
    components: Components, watch: UNetWatch
) -> None:
    with open_engine(components) as engine:
        watch.before = raise_above(0, lambda: torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            engine.submit(region_work()).result(60)
        watch.before = None
        assert engine.submit(region_work()).result(60).shape == (64, 64, 3)


def test_any_other_error_fails_the_futures_concerned_and_not_the_thread(
    components: Components, watch: UNetWatch
) -> None:
    with open_engine(components) as engine:
        watch.before = raise_above(0, lambda: ZeroDivisionError("of no\nuse"))
        with pytest.raises(EngineError, match="ZeroDivisionError: of no use") as caught:
            engine.submit(region_work()).result(60)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        watch.before = None
        assert engine.submit(region_work()).result(60).shape == (64, 64, 3)


def test_a_scheduler_that_fails_does_not_fail_its_neighbours(
    components: Components, watch: UNetWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_alone(components, region_work(scheduler="euler_a"))

    def step(self: Sampler, *args: Any) -> Tensor:
        if self.generator.initial_seed() == 13:
            raise IndexError("no such sigma")
        return original_step(self, *args)

    original_step = Sampler.step
    monkeypatch.setattr(Sampler, "step", step)
    watch.gate.clear()
    with open_engine(components) as engine:
        healthy = engine.submit(region_work(scheduler="euler_a"))
        faulty = engine.submit(region_work(scheduler="euler_a", seed=13))
        watch.gate.set()
        with pytest.raises(EngineError, match="IndexError: no such sigma"):
            faulty.result(60)
        assert_close(healthy.result(60), expected)


def multiply_rows(factor: float) -> Callable[..., tuple[Tensor]]:
    """A UNet hook that multiplies the output rows whose mask covers the first latent."""

    def hook(module: Any, args: Any, output: tuple[Tensor]) -> tuple[Tensor]:
        changed = output[0].clone()
        changed[[index for index, row in enumerate(args[0]) if row[4, 0, 0] == 1]] *= factor
        return (changed,)

    return hook


def test_a_region_with_nan_values_fails_without_its_neighbours(
    components: Components, watch: UNetWatch
) -> None:
    marked = np.zeros((64, 64), dtype=np.uint8)
    marked[:8, :8] = 255
    works = [region_work(), region_work(mask=marked, scheduler="dpmpp_2m"), region_work(seed=3)]
    alone = [run_alone(components, works[0]), None, run_alone(components, works[2])]
    components.unet.register_forward_hook(multiply_rows(float("nan")))
    watch.gate.clear()
    watch.entered.clear()
    with open_engine(components) as engine:
        futures = [engine.submit(work) for work in works]
        watch.gate.set()
        with pytest.raises(GateNotFinite, match="NaN or infinite") as caught:
            futures[1].result(60)
        assert caught.value.code == "gate_not_finite"
        for index in (0, 2):
            assert_close(futures[index].result(60), alone[index])


def test_infinite_pixels_are_refused(components: Components) -> None:
    components.vae.decoder.register_forward_hook(lambda _, args, output: output * float("inf"))
    with open_engine(components) as engine, pytest.raises(GateNotFinite) as caught:
        engine.submit(region_work()).result(60)
    assert caught.value.code == "gate_not_finite"


def test_a_lost_device_raises_device_lost(components: Components, watch: UNetWatch) -> None:
    watch.before = raise_above(0, lambda: torch.AcceleratorError("an illegal memory access"))
    with open_engine(components) as engine, pytest.raises(DeviceLost) as caught:
        engine.submit(region_work()).result(60)
    assert caught.value.code == "device_lost"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_inference_steps": 1, "strength": 0.8}, "leaves no step"),
        ({"num_inference_steps": 51, "scheduler": "lcm"}, "use up to 50"),
    ],
)
def test_parameters_that_the_scheduler_does_not_support_are_refused(
    components: Components, values: dict[str, Any], message: str
) -> None:
    with open_engine(components) as engine, pytest.raises(ParameterError, match=message):
        engine.submit(region_work(**values)).result(60)


def test_closing_releases_active_waiting_and_later_regions(
    components: Components, watch: UNetWatch
) -> None:
    watch.gate.clear()
    with open_engine(components, max_batch=2) as engine:
        active = engine.submit(region_work(num_inference_steps=200))
        assert watch.entered.wait(30)
        waiting = engine.submit(region_work())
        closer = threading.Thread(target=engine.close)
        closer.start()
        while not engine._closing.is_set():
            pass
        watch.gate.set()
        closer.join(30)
        for future in (active, waiting, engine.submit(region_work())):
            with pytest.raises(Released):
                future.result(0)
        assert len(watch.rows) == 1
        assert not engine._thread.is_alive()
        engine.close()


def test_a_prompt_is_encoded_once(components: Components) -> None:
    encoded: list[int] = []
    components.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(1), with_kwargs=True
    )
    with open_engine(components) as engine:
        for seed in range(3):
            engine.submit(region_work(seed=seed, num_inference_steps=2)).result(60)
    assert len(encoded) == 2  # the prompt and the empty negative one


def test_the_least_recently_used_prompt_is_evicted(components: Components) -> None:
    encoded: list[int] = []
    components.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(1), with_kwargs=True
    )
    prompts = PromptEncoder(components, cache_size=2)
    for text in ("a red cat", "blue sky", "a red cat", "wooden table"):
        prompts.encode(text)
    assert len(encoded) == 3
    prompts.encode("a red cat")
    assert len(encoded) == 3
    prompts.encode("blue sky")
    assert len(encoded) == 4


def test_sliced_attention_gives_the_same_result(tiny_model: Path) -> None:
    from workers.engines import load_engine

    results = []
    for attention in ("auto", "sliced"):
        engine = load_engine(f"diffusers:{tiny_model}", device="cpu", attention=attention)
        results.append(engine.submit(region_work()).result(60))
        engine.close()
    assert_close(*results)
