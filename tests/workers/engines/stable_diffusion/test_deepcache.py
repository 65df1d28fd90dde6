"""DeepCache, compared with diffusers' UNet whose last layer gets cached features through a hook."""

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
    load_tiny,
    open_engine,
    region_work,
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
def components(tiny_model: Path) -> Components:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def pair(tiny_model: Path) -> Iterator[Pair]:
    components = load_tiny(tiny_model)
    with open_engine(components) as engine:
        yield Pair(tiny_model, engine, components)


@contextmanager
def cached_features(unet: Any, interval: int, calls: int = 1) -> Iterator[None]:
    """Between full steps the last up layer gets the features of the latest full step.

    calls: UNet calls in one step, each with its own features.
    """
    count = itertools.count()
    features: dict[int, Tensor] = {}
    layer = unet.up_blocks[-1].resnets[-1]
    channels = layer.in_channels - unet.conv_in.out_channels

    def replace_features(_: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        step, call = divmod(next(count), calls)
        if step % interval == 0:
            features[call] = args[0][:, :channels].clone()
        return torch.cat([features[call], args[0][:, channels:]], dim=1), args[1]

    hook = layer.register_forward_pre_hook(replace_features)
    yield
    hook.remove()


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "unipc"])
def test_cached_steps_are_bit_identical_to_diffusers_with_cached_features(
    pair: Pair, scheduler: str, guidance_scale: float, strength: float, interval: int
) -> None:
    work = region_work(
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        strength=strength,
        cache_interval=interval,
        num_inference_steps=7,
    )
    with cached_features(pair.pipeline.unet, interval):
        pair.assert_bit_identical(work)


def test_cache_interval_1_equals_the_model_and_2_does_not(pair: Pair) -> None:
    pair.assert_bit_identical(region_work(cache_interval=1))
    whole = pair.engine.submit(region_work()).result(60)
    assert not np.array_equal(pair.engine.submit(region_work(cache_interval=2)).result(60), whole)


class ForwardCounts:
    """Rows of every UNet forward pass, and of the full ones. before: called in each pass."""

    def __init__(self, unet: Any) -> None:
        self.all: list[int] = []
        self.full: list[int] = []
        self.before: Any = lambda: None
        unet.conv_in.register_forward_pre_hook(lambda _, args: self._count(len(args[0])))
        unet.mid_block.register_forward_pre_hook(lambda _, args: self.full.append(len(args[0])))

    def _count(self, rows: int) -> None:
        self.all.append(rows)
        self.before()


def test_only_every_nth_step_runs_the_full_model(components: Components) -> None:
    counts = ForwardCounts(components.unet)
    work = region_work(strength=1.0, num_inference_steps=8, cache_interval=3, guidance_end=0.5)
    run(components, [work])
    assert counts.all == [2, 2, 2, 2, 1, 1, 1, 1]
    assert counts.full == [2, 2, 1]


def run(components: Components, works: list[RegionWork], **options: Any) -> list[Pixels]:
    with open_engine(components, **options) as engine:
        return [future.result(60) for future in [engine.submit(work) for work in works]]


def test_regions_that_joined_at_different_steps_share_their_full_steps(
    components: Components,
) -> None:
    """The second region joins in the first one's second step, a cached one."""
    counts = ForwardCounts(components.unet)
    late: list[Any] = []
    work = region_work(strength=1.0, num_inference_steps=8, cache_interval=4)
    with open_engine(components) as engine:
        counts.before = lambda: late or late.append(engine.submit(work))
        engine.submit(work).result(60)
        late[0].result(60)
    assert counts.full == [2, 4, 2]
    assert counts.all == [2, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


@pytest.mark.parametrize(("windows", "steps", "max_forwards"), [(1, 4, 1 + 4 * 11), (11, 12, 30)])
def test_a_region_without_deepcache_is_not_starved_by_one_with_it(
    components: Components, windows: int, steps: int, max_forwards: int
) -> None:
    """Nine cached passes and a full one of a window come between two steps; a canvas waits."""
    counts = ForwardCounts(components.unet)
    boxes = tuple(Box(left, 0, left + 64, 64) for left in range(0, 32 * windows, 32))
    small: list[Any] = []
    forwards_before_decode: list[int] = []

    def submit_small() -> None:
        if not small:
            small.append(engine.submit(region_work(num_inference_steps=steps, strength=1.0)))

    # The small region is decoded first. Its future is resolved later, on another thread.
    components.vae.decoder.register_forward_pre_hook(
        lambda *_: forwards_before_decode.append(len(counts.all))
    )

    with open_engine(components, max_batch=4) as engine:
        counts.before = submit_small
        engine.submit(region_work(windows=boxes, num_inference_steps=60, cache_interval=10)).result(
            60
        )
        small[0].result(60)
    assert forwards_before_decode[0] <= max_forwards


MIXED: tuple[dict[str, Any], ...] = (
    {"cache_interval": 3, "scheduler": "unipc", "seed": 5},
    {"seed": 6, "guidance_scale": 1.0},
    {"cache_interval": 2, "windows": WINDOWS, "guidance_end": 0.5, "strength": 1.0},
    {"seed": 7, "scheduler": "dpmpp_2m"},
    {"cache_interval": 3, "guidance_scale": 1.0, "num_inference_steps": 9},
)


@pytest.mark.parametrize("deterministic", [False, True])
def test_neighbours_with_and_without_deepcache_change_no_result(
    tiny_model: Path, *, deterministic: bool
) -> None:
    options = {"max_batch": 8, "deterministic": deterministic}
    works = [region_work(image_seed=seed, **values) for seed, values in enumerate(MIXED)]
    alone = [run(load_tiny(tiny_model), [work], **options)[0] for work in works]
    components = load_tiny(tiny_model)
    counts = ForwardCounts(components.unet)
    for result, expected in zip(run(components, works, **options), alone, strict=True):
        assert np.abs(result.astype(int) - expected).max() <= (0 if deterministic else 1)
    if deterministic:
        assert set(counts.all) == {8}


@pytest.mark.parametrize("max_batch", [8, 1])
def test_a_canvas_caches_features_for_each_window_and_branch(
    components: Components, tiny_model: Path, max_batch: int
) -> None:
    work = region_work(windows=WINDOWS, strength=1.0, cache_interval=2)
    pipe = pipeline(tiny_model)
    with cached_features(pipe.unet, 2, calls=4):
        expected = multidiffusion(pipe, work)
    result = run(components, [work], max_batch=max_batch)[0]
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["attention_slicing", "model_offload", "sequential_offload"])
def test_memory_modes_change_no_result(tiny_model: Path, mode: Any) -> None:
    work = region_work(cache_interval=3)
    expected, result = (
        run(load_tiny(tiny_model), [work], memory=memory)[0] for memory in ((), (mode,))
    )
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_running_out_of_memory_in_any_forward_pass_changes_no_result(
    components: Components,
) -> None:
    works = [region_work(seed=seed, cache_interval=2) for seed in range(3)]
    expected = run(components, works)
    counts = ForwardCounts(components.unet)
    for failing in (1, 2):
        counts.all.clear()
        counts.before = lambda failing=failing: raise_if(len(counts.all) == failing)
        for result, reference in zip(run(components, works), expected, strict=True):
            assert np.abs(result.astype(int) - reference).max() <= 1


def raise_if(is_out_of_memory: bool) -> None:
    if is_out_of_memory:
        raise torch.OutOfMemoryError("CUDA out of memory")


def batch(rows: int, channels: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return (
        torch.randn(rows, channels, 8, 8),
        torch.linspace(1, 999, rows),
        torch.randn(rows, 77, 32),
    )


def test_compiled_forward_passes_agree_with_eager_ones(
    components: Components, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile(model, backend="eager"))
    for kind, channels in (("cache_write", 9), ("cache_read", 9 + 16)):
        options: Any = {"attention": "auto", "graphs": False, "kind": kind}
        compiled = UNetRunner(components, compile="default", **options)
        eager = UNetRunner(components, compile="off", **options)
        with torch.inference_mode():
            for rows in (2, 4):
                inputs = batch(rows, channels)
                torch.testing.assert_close(compiled(*inputs), eager(*inputs), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("side", [8, 11])
def test_writing_and_reading_the_cache_are_bit_identical_to_the_unet(
    components: Components, side: int
) -> None:
    """With sides that halve exactly and sides that do not."""
    inputs, timesteps, embeddings = (
        torch.randn(3, 9, side, side),
        torch.tensor([3.0, 400, 999]),
        batch(3)[2],
    )
    kwargs: Any = {"encoder_hidden_states": embeddings, "return_dict": False}
    with torch.inference_mode():
        expected = components.unet(inputs, timesteps, **kwargs)[0]
        written, features = CacheWriteUNet(components.unet)(inputs, timesteps, **kwargs)[
            0
        ].tensor_split([4], dim=1)
        read = CacheReadUNet(components.unet)(
            torch.cat([inputs, features], dim=1), timesteps, **kwargs
        )[0]
    assert torch.equal(written, expected)
    assert torch.equal(read, expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "ends with AttnUpBlock2D"),
        ({"class_embed_type": "timestep"}, "has class_embed_type"),
    ],
)
def test_a_unet_of_another_architecture_is_refused_with_the_remedy(
    components: Components, values: dict[str, Any], reason: str
) -> None:
    components.unet.register_to_config(**values)
    with open_engine(components) as engine:
        with pytest.raises(ParameterError, match=f"{reason}; use 1") as caught:
            engine.submit(region_work(cache_interval=3)).result(60)
        assert caught.value.code == "bad_parameter"
        assert engine.submit(region_work()).result(60).shape == (64, 64, 3)
