"""Deep features kept between steps: diffusers' own UNet with its last layer's input exchanged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import ParameterError
from shared.geometry.box import Box
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    components,
    engine,
    region,
)
from tests.workers.engines.stable_diffusion.test_multidiffusion import multidiffusion, pipeline
from tests.workers.engines.stable_diffusion.test_parity import Pair
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.deepcache import CacheReadUNet, CacheWriteUNet
from workers.engines.stable_diffusion.unet_runner import UNetRunner

pytestmark = IGNORE_DIFFUSERS_WARNING

WINDOWS = (Box(0, 0, 64, 64), Box(40, 0, 104, 64))


@pytest.fixture
def parts(tiny_model: Path) -> Components:
    return components(tiny_model)


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    parts = components(tiny_model)
    with engine(parts) as ours:
        yield Pair(tiny_model, ours, parts)


@contextmanager
def exchanged(unet: Any, interval: int, calls: int = 1) -> Iterator[None]:
    """Between whole steps the last up layer gets the state of the whole step before.

    calls: of the UNet in one step, each with a state of its own.
    """
    count = itertools.count()
    kept: dict[int, Tensor] = {}
    layer = unet.up_blocks[-1].resnets[-1]
    channels = layer.in_channels - unet.conv_in.out_channels

    def exchange(_: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        step, call = divmod(next(count), calls)
        if step % interval == 0:
            kept[call] = given[0][:, :channels].clone()
        return torch.cat([kept[call], given[0][:, channels:]], dim=1), given[1]

    hook = layer.register_forward_pre_hook(exchange)
    yield
    hook.remove()


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "unipc"])
def test_reuse_equals_diffusers_with_the_state_exchanged(
    pair: Pair, scheduler: str, guidance_scale: float, strength: float, interval: int
) -> None:
    work = region(
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        strength=strength,
        cache_interval=interval,
        num_inference_steps=7,
    )
    with exchanged(pair.pipeline.unet, interval):
        pair.assert_same(work)


def test_an_interval_of_one_is_the_model_itself_and_two_is_not(pair: Pair) -> None:
    pair.assert_same(region(cache_interval=1))
    whole = pair.ours.submit(region()).result(60)
    assert not np.array_equal(pair.ours.submit(region(cache_interval=2)).result(60), whole)


class Counts:
    """Rows of each forward: of any, and of those that run the whole UNet."""

    def __init__(self, unet: Any) -> None:
        self.all: list[int] = []
        self.whole: list[int] = []
        self.before: Any = lambda: None
        unet.conv_in.register_forward_pre_hook(lambda _, args: self._count(len(args[0])))
        unet.mid_block.register_forward_pre_hook(lambda _, args: self.whole.append(len(args[0])))

    def _count(self, rows: int) -> None:
        self.all.append(rows)
        self.before()


def test_only_every_nth_step_runs_the_whole_model(parts: Components) -> None:
    counts = Counts(parts.unet)
    work = region(strength=1.0, num_inference_steps=8, cache_interval=3, guidance_end=0.5)
    run(parts, [work])
    assert counts.all == [2, 2, 2, 2, 1, 1, 1, 1]
    assert counts.whole == [2, 2, 1]


def run(parts: Components, works: list[RegionWork], **options: Any) -> list[Pixels]:
    with engine(parts, **options) as ours:
        return [future.result(60) for future in [ours.submit(work) for work in works]]


def test_regions_that_joined_apart_have_their_whole_steps_together(parts: Components) -> None:
    """The second joins in the first one's second step, a reused one."""
    counts = Counts(parts.unet)
    late = []
    work = region(strength=1.0, num_inference_steps=8, cache_interval=4)
    with engine(parts) as ours:
        counts.before = lambda: late or late.append(ours.submit(work))
        ours.submit(work).result(60)
        late[0].result(60)
    assert counts.whole == [2, 4, 2]
    assert counts.all == [2, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize(("windows", "steps", "most"), [(1, 4, 1 + 4 * 11), (11, 12, 30)])
def test_a_region_without_reuse_has_its_turns_beside_one_with_it(
    parts: Components, windows: int, steps: int, most: int
) -> None:
    """A window's nine shallow forwards and a whole one come between two steps; a canvas waits."""
    counts = Counts(parts.unet)
    boxes = tuple(Box(left, 0, left + 64, 64) for left in range(0, 32 * windows, 32))
    small: list[Any] = []
    spent: list[int] = []

    def submit_small() -> None:
        if not small:
            small.append(ours.submit(region(num_inference_steps=steps, strength=1.0)))

    # Its decoding is the first one; its future is done by another thread, at any time later.
    parts.vae.decoder.register_forward_pre_hook(lambda *_: spent.append(len(counts.all)))

    with engine(parts, max_batch=4) as ours:
        counts.before = submit_small
        ours.submit(region(windows=boxes, num_inference_steps=60, cache_interval=10)).result(60)
        small[0].result(60)
    assert spent[0] <= most


MIXED: tuple[dict[str, Any], ...] = (
    {"cache_interval": 3, "scheduler": "unipc", "seed": 5},
    {"seed": 6, "guidance_scale": 1.0},
    {"cache_interval": 2, "windows": WINDOWS, "guidance_end": 0.5, "strength": 1.0},
    {"seed": 7, "scheduler": "dpmpp_2m"},
    {"cache_interval": 3, "guidance_scale": 1.0, "num_inference_steps": 9},
)


@pytest.mark.parametrize("deterministic", [False, True])
def test_company_with_and_without_reuse_changes_no_picture(
    tiny_model: Path, *, deterministic: bool
) -> None:
    options = {"max_batch": 8, "deterministic": deterministic}
    works = [region(picture=n, **values) for n, values in enumerate(MIXED)]
    alone = [run(components(tiny_model), [work], **options)[0] for work in works]
    parts = components(tiny_model)
    counts = Counts(parts.unet)
    for ours, theirs in zip(run(parts, works, **options), alone, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= (0 if deterministic else 1)
    if deterministic:
        assert set(counts.all) == {8}


@pytest.mark.parametrize("max_batch", [8, 1])
def test_a_canvas_has_a_state_for_each_window_and_branch(
    parts: Components, tiny_model: Path, max_batch: int
) -> None:
    work = region(windows=WINDOWS, strength=1.0, cache_interval=2)
    pipe = pipeline(tiny_model)
    with exchanged(pipe.unet, 2, calls=4):
        expected = multidiffusion(pipe, work)
    found = run(parts, [work], max_batch=max_batch)[0]
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["attention_slicing", "model_offload", "sequential_offload"])
def test_modes_that_need_less_memory_change_nothing(tiny_model: Path, mode: Any) -> None:
    work = region(cache_interval=3)
    expected, found = (
        run(components(tiny_model), [work], memory=memory)[0] for memory in ((), (mode,))
    )
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_memory_that_runs_out_in_any_forward_only_slows_it_down(parts: Components) -> None:
    works = [region(seed=n, cache_interval=2) for n in range(3)]
    expected = run(parts, works)
    counts = Counts(parts.unet)
    for failing in (1, 2):
        counts.all.clear()
        counts.before = lambda failing=failing: raise_at(len(counts.all) == failing)
        for ours, theirs in zip(run(parts, works), expected, strict=True):
            assert np.abs(ours.astype(int) - theirs).max() <= 1


def raise_at(is_full: bool) -> None:
    if is_full:
        raise torch.OutOfMemoryError("CUDA out of memory")


def batch(rows: int, channels: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return (
        torch.randn(rows, channels, 8, 8),
        torch.linspace(1, 999, rows),
        torch.randn(rows, 77, 32),
    )


def test_compiled_forwards_agree_with_plain_ones(
    parts: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile(model, backend="eager"))
    for kind, channels in (("cache_write", 9), ("cache_read", 9 + 16)):
        chosen: Any = {"attention": "auto", "graphs": False, "kind": kind}
        compiled = UNetRunner(parts, compile="default", **chosen)
        plain = UNetRunner(parts, compile="off", **chosen)
        with torch.inference_mode():
            for rows in (2, 4):
                given = batch(rows, channels)
                torch.testing.assert_close(compiled(*given), plain(*given), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("side", [8, 11])
def test_both_halves_are_the_unet_to_the_last_bit(parts: Components, side: int) -> None:
    """Of sides that halve exactly and of others."""
    inputs, times, words = torch.randn(3, 9, side, side), torch.tensor([3.0, 400, 999]), batch(3)[2]
    named: Any = {"encoder_hidden_states": words, "return_dict": False}
    with torch.inference_mode():
        expected = parts.unet(inputs, times, **named)[0]
        found, state = CacheWriteUNet(parts.unet)(inputs, times, **named)[0].tensor_split(
            [4], dim=1
        )
        again = CacheReadUNet(parts.unet)(torch.cat([inputs, state], dim=1), times, **named)[0]
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "ends with AttnUpBlock2D"),
        ({"class_embed_type": "timestep"}, "has class_embed_type"),
    ],
)
def test_a_model_of_another_layout_is_refused_with_the_remedy(
    parts: Components, values: dict[str, Any], reason: str
) -> None:
    parts.unet.register_to_config(**values)
    with engine(parts) as ours:
        with pytest.raises(ParameterError, match=f"{reason}; use 1") as caught:
            ours.submit(region(cache_interval=3)).result(60)
        assert caught.value.code == "bad_parameter"
        assert ours.submit(region()).result(60).shape == (64, 64, 3)
