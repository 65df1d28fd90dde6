"""The device thread: shared forwards, fairness, interruption, errors, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import Cancelled, EngineError, GateError, OutOfMemory, ParameterError, Released
from shared.geometry.box import Box
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    UNetWatch,
    components,
    engine,
    region,
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
def parts(tiny_model: Path) -> Components:
    """Components of this test's own, so that its hooks go with it."""
    return components(tiny_model)


@pytest.fixture
def watch(parts: Components) -> Iterator[UNetWatch]:
    found = UNetWatch(parts.unet)
    yield found
    found.gate.set()


def solo(parts: Components, work: RegionWork) -> Pixels:
    with engine(parts) as alone:
        return alone.submit(work).result(60)


def together(
    parts: Components, watch: UNetWatch, works: list[RegionWork], **options: Any
) -> list[Pixels]:
    """All submitted while the first is held in its first forward; they join it after that."""
    watch.gate.clear()
    watch.entered.clear()
    with engine(parts, **options) as ours:
        futures = [ours.submit(works[0])]
        assert watch.entered.wait(30)
        futures += [ours.submit(work) for work in works[1:]]
        watch.gate.set()
        return [future.result(60) for future in futures]


def assert_close(ours: Pixels, theirs: Pixels) -> None:
    """The same up to the rounding of a float that differs in its last bits."""
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_different_regions_share_forwards_and_equal_their_solo_runs(
    parts: Components, watch: UNetWatch
) -> None:
    works = [region(picture=n, **values) for n, values in enumerate(MIXED)]
    alone = [solo(parts, work) for work in works]
    solo_rows, solo_forwards = sum(watch.rows), len(watch.rows)
    watch.rows.clear()
    for ours, theirs in zip(together(parts, watch, works), alone, strict=True):
        assert_close(ours, theirs)
    assert sum(watch.rows) == solo_rows
    assert max(watch.rows) == 7  # three with guidance and one without
    assert len(watch.rows) < solo_forwards / 2


def test_a_batched_vae_changes_no_result(parts: Components, watch: UNetWatch) -> None:
    works = [region(picture=n, strength=0.6, seed=n) for n in range(3)]
    encoded: list[int] = []
    parts.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    alone = [solo(parts, work) for work in works]
    assert set(encoded) == {1}
    for ours, theirs in zip(together(parts, watch, works, vae_batch=4), alone, strict=True):
        assert_close(ours, theirs)
    assert max(encoded) == 4


def test_the_seed_and_the_prompt_decide_the_picture(parts: Components) -> None:
    works = [region(), region(seed=2), region(prompt="blue sky"), region(negative_prompt="blurry")]
    results = [solo(parts, work) for work in works]
    assert len({result.tobytes() for result in results}) == len(works)
    assert np.array_equal(solo(parts, region()), results[0])


def test_guidance_may_end_early_and_saves_its_rows(parts: Components, watch: UNetWatch) -> None:
    full, half = region(strength=1.0), region(strength=1.0, guidance_end=0.5)
    expected = solo(parts, full)
    assert watch.rows == [2] * 5
    watch.rows.clear()
    found = solo(parts, half)
    assert watch.rows == [2, 2, 2, 1, 1]
    assert not np.array_equal(found, expected)
    watch.rows.clear()
    none = solo(parts, region(strength=1.0, guidance_end=0.0))
    assert np.array_equal(none, solo(parts, region(strength=1.0, guidance_scale=1.0)))
    assert set(watch.rows) == {1}


def test_a_canvas_may_end_its_guidance_early_too(parts: Components) -> None:
    windows = (Box(0, 0, 64, 64), Box(40, 0, 104, 64))
    work = region(windows=windows, guidance_end=0.4)
    results = []
    for most in (8, 3):
        with engine(parts, max_batch=most) as ours:
            results.append(ours.submit(work).result(60))
    assert_close(*results)


def test_two_rows_per_forward_are_enough_and_so_is_one(parts: Components, watch: UNetWatch) -> None:
    work = region()
    expected = solo(parts, work)
    for most in (1, 3):
        watch.rows.clear()
        assert_close(together(parts, watch, [work, work], max_batch=most)[1], expected)
        assert max(watch.rows) == min(most, 2)


def test_a_canvas_of_many_windows_does_not_hold_up_a_small_region(
    parts: Components, watch: UNetWatch
) -> None:
    windows = tuple(Box(left, 0, left + 64, 64) for left in range(0, 321, 32))
    order: list[str] = []
    decoded_after: list[int] = []
    parts.vae.decoder.register_forward_pre_hook(lambda *_: decoded_after.append(len(watch.rows)))
    watch.gate.clear()
    with engine(parts, max_batch=4) as ours:
        canvas = ours.submit(region(windows=windows))
        assert watch.entered.wait(30)
        small = ours.submit(region(num_inference_steps=4, strength=1.0))
        canvas.add_done_callback(lambda _: order.append("canvas"))
        small.add_done_callback(lambda _: order.append("small"))
        watch.gate.set()
        canvas.result(60)
    # One forward before it came, then it has rows in at least every second one.
    assert decoded_after[0] in range(5, 10)
    assert order == ["small", "canvas"]
    assert max(watch.rows) <= 4


def test_windows_of_different_sizes_take_turns(parts: Components, watch: UNetWatch) -> None:
    wide = Box(0, 0, 128, 64)
    works = [region(), region(windows=(wide,), width=128), region(seed=3)]
    alone = [solo(parts, work) for work in works]
    for ours, theirs in zip(together(parts, watch, works), alone, strict=True):
        assert_close(ours, theirs)


def test_an_interrupted_region_stops_at_its_next_step_and_alone(
    parts: Components, watch: UNetWatch
) -> None:
    neighbour = region(num_inference_steps=6, strength=1.0)
    expected = solo(parts, neighbour)
    watch.rows.clear()
    stop = Interruption()
    watch.before = lambda _: stop.set(Cancelled("asked for")) if len(watch.rows) == 3 else None
    watch.gate.clear()
    watch.entered.clear()
    with engine(parts) as ours:
        doomed = ours.submit(region(num_inference_steps=200, stop=stop))
        assert watch.entered.wait(30)
        future = ours.submit(neighbour)
        watch.gate.set()
        with pytest.raises(Cancelled, match="asked for"):
            doomed.result(60)
        assert_close(future.result(60), expected)
    assert watch.rows == [2, 4, 4, 2, 2, 2, 2]


def test_an_interruption_before_the_start_costs_no_forward(
    parts: Components, watch: UNetWatch
) -> None:
    stop = Interruption()
    stop.set(Cancelled("asked for"))
    with engine(parts) as ours, pytest.raises(Cancelled):
        ours.submit(region(stop=stop)).result(60)
    assert watch.rows == []


def raise_above(rows: int, error: Callable[[], Exception]) -> Callable[[int], None]:
    def check(found: int) -> None:
        if found > rows:
            raise error()

    return check


def test_memory_that_runs_out_halves_the_batch(
    parts: Components, watch: UNetWatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = [region(seed=n) for n in range(3)]
    alone = [solo(parts, work) for work in works]
    watch.before = raise_above(2, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    for ours, theirs in zip(together(parts, watch, works), alone, strict=True):
        assert_close(ours, theirs)
    assert "out of memory with 6 rows in the UNet; going on with 3" in caplog.text
    assert "with 3 rows in the UNet; going on with 1" in caplog.text


def test_a_vae_that_runs_out_of_memory_goes_on_with_fewer(
    parts: Components, watch: UNetWatch, caplog: pytest.LogCaptureFixture
) -> None:
    works = [region(seed=n) for n in range(3)]
    alone = [solo(parts, work) for work in works]
    no_memory = raise_above(1, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    parts.vae.decoder.register_forward_pre_hook(lambda _, args: no_memory(len(args[0])))
    results = together(parts, watch, works, vae_batch=4)
    for ours, theirs in zip(results, alone, strict=True):
        assert_close(ours, theirs)
    assert "in the VAE; going on with 1" in caplog.text


def test_a_window_too_large_for_the_device_fails_alone(parts: Components, watch: UNetWatch) -> None:
    with engine(parts) as ours:
        watch.before = raise_above(0, lambda: torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            ours.submit(region()).result(60)
        watch.before = None
        assert ours.submit(region()).result(60).shape == (64, 64, 3)


def test_any_other_error_reaches_the_futures_concerned_and_the_thread_lives(
    parts: Components, watch: UNetWatch
) -> None:
    with engine(parts) as ours:
        watch.before = raise_above(0, lambda: ZeroDivisionError("of no\nuse"))
        with pytest.raises(EngineError, match="ZeroDivisionError: of no use") as caught:
            ours.submit(region()).result(60)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        watch.before = None
        assert ours.submit(region()).result(60).shape == (64, 64, 3)


def test_a_scheduler_that_fails_takes_no_neighbour_with_it(
    parts: Components, watch: UNetWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = solo(parts, region(scheduler="euler_a"))

    def step(self: Sampler, *given: Any) -> Tensor:
        if self.generator.initial_seed() == 13:
            raise IndexError("no such sigma")
        return real(self, *given)

    real = Sampler.step
    monkeypatch.setattr(Sampler, "step", step)
    watch.gate.clear()
    with engine(parts) as ours:
        sound = ours.submit(region(scheduler="euler_a"))
        faulty = ours.submit(region(scheduler="euler_a", seed=13))
        watch.gate.set()
        with pytest.raises(EngineError, match="IndexError: no such sigma"):
            faulty.result(60)
        assert_close(sound.result(60), expected)


def spoil(value: float) -> Callable[..., tuple[Tensor]]:
    """A hook on the UNet that spoils the rows whose mask holds the first place."""

    def hook(module: Any, args: Any, found: tuple[Tensor]) -> tuple[Tensor]:
        spoilt = found[0].clone()
        spoilt[[n for n, row in enumerate(args[0]) if row[4, 0, 0] == 1]] *= value
        return (spoilt,)

    return hook


def test_a_region_of_no_numbers_fails_and_its_neighbours_do_not(
    parts: Components, watch: UNetWatch
) -> None:
    marked = np.zeros((64, 64), dtype=np.uint8)
    marked[:8, :8] = 255
    works = [region(), region(mask=marked, scheduler="dpmpp_2m"), region(seed=3)]
    alone = [solo(parts, works[0]), None, solo(parts, works[2])]
    parts.unet.register_forward_hook(spoil(float("nan")))
    watch.gate.clear()
    watch.entered.clear()
    with engine(parts) as ours:
        futures = [ours.submit(work) for work in works]
        watch.gate.set()
        with pytest.raises(GateError, match="no numbers") as caught:
            futures[1].result(60)
        assert caught.value.code == "gate_not_finite"
        for n in (0, 2):
            assert_close(futures[n].result(60), alone[n])


def test_pixels_that_overflow_are_refused(parts: Components) -> None:
    parts.vae.decoder.register_forward_hook(lambda _, args, found: found * float("inf"))
    with engine(parts) as ours, pytest.raises(GateError) as caught:
        ours.submit(region()).result(60)
    assert caught.value.code == "gate_not_finite"


def test_a_lost_device_has_a_code_of_its_own(parts: Components, watch: UNetWatch) -> None:
    watch.before = raise_above(0, lambda: torch.AcceleratorError("an illegal memory access"))
    with engine(parts) as ours, pytest.raises(EngineError) as caught:
        ours.submit(region()).result(60)
    assert caught.value.code == "device_lost"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_inference_steps": 1, "strength": 0.8}, "leaves no step"),
        ({"num_inference_steps": 51, "scheduler": "lcm"}, "use up to 50"),
    ],
)
def test_parameters_the_scheduler_cannot_take_are_the_users(
    parts: Components, values: dict[str, Any], message: str
) -> None:
    with engine(parts) as ours, pytest.raises(ParameterError, match=message):
        ours.submit(region(**values)).result(60)


def test_closing_releases_what_is_under_way_waiting_and_late(
    parts: Components, watch: UNetWatch
) -> None:
    watch.gate.clear()
    with engine(parts, max_batch=2) as ours:
        active = ours.submit(region(num_inference_steps=200))
        assert watch.entered.wait(30)
        waiting = ours.submit(region())
        closer = threading.Thread(target=ours.close)
        closer.start()
        while not ours._closing.is_set():
            pass
        watch.gate.set()
        closer.join(30)
        for future in (active, waiting, ours.submit(region())):
            with pytest.raises(Released):
                future.result(0)
        assert len(watch.rows) == 1
        assert not ours._thread.is_alive()
        ours.close()


def test_prompts_are_encoded_once_while_they_are_kept(parts: Components) -> None:
    encoded: list[int] = []
    parts.text_encoder.register_forward_pre_hook(
        lambda _, args, named: encoded.append(1), with_kwargs=True
    )
    with engine(parts) as ours:
        for seed in range(3):
            ours.submit(region(seed=seed, num_inference_steps=2)).result(60)
    assert len(encoded) == 2  # the prompt and the empty negative one


def test_the_prompt_unused_for_longest_is_forgotten(parts: Components) -> None:
    encoded: list[int] = []
    parts.text_encoder.register_forward_pre_hook(
        lambda _, args, named: encoded.append(1), with_kwargs=True
    )
    prompts = PromptEncoder(parts, cache_size=2)
    for text in ("a red cat", "blue sky", "a red cat", "wooden table"):
        prompts.encode(text)
    assert len(encoded) == 3
    prompts.encode("a red cat")
    assert len(encoded) == 3
    prompts.encode("blue sky")
    assert len(encoded) == 4


def test_sliced_attention_gives_the_same_picture(tiny_model: Path) -> None:
    from workers.engines import load_engine

    results = []
    for attention in ("auto", "sliced"):
        ours = load_engine(f"diffusers:{tiny_model}", device="cpu", attention=attention)
        results.append(ours.submit(region()).result(60))
        ours.close()
    assert_close(*results)
