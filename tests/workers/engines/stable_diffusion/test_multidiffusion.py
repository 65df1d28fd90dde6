"""Canvases: geometry, averaging, blending, and comparison with a plain MultiDiffusion loop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from shared.geometry.box import Box
from tests.workers.engines.stable_diffusion.samples import load_tiny, open_engine, region_work
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.engine import DiffusionEngine
from workers.engines.stable_diffusion.multidiffusion import (
    average_windows,
    blend_windows,
    count_windows,
    plan_canvas,
)
from workers.engines.stable_diffusion.region_state import prepare_region

THREE = (Box(0, 0, 64, 64), Box(40, 0, 104, 64), Box(80, 24, 144, 88))


@pytest.fixture(scope="module")
def components(tiny_model: Path) -> Components:
    return load_tiny(tiny_model)


@pytest.fixture(scope="module")
def engine(components: Components) -> Iterator[DiffusionEngine]:
    with open_engine(components) as engine:
        yield engine


def test_a_canvas_measures_windows_in_latents() -> None:
    canvas = plan_canvas(region_work(windows=THREE), 8)
    assert canvas.size == (11, 18)
    assert canvas.window_size == (8, 8)
    assert canvas.windows == (Box(0, 0, 8, 8), Box(5, 0, 13, 8), Box(10, 3, 18, 11))
    assert canvas.pixel_windows == THREE


@pytest.mark.parametrize(
    ("windows", "size", "message"),
    [
        ((), (64, 64), "no window"),
        ((Box(0, 0, 64, 64), Box(36, 0, 100, 64)), (104, 64), "multiple of 8"),
        ((Box(0, 0, 64, 64),), (68, 64), "multiple of 8"),
        ((Box(8, 0, 72, 64),), (64, 64), "not in 64x64"),
        ((Box(0, 0, 64, 64), Box(0, 0, 32, 64)), (64, 64), "differ in size"),
    ],
)
def test_windows_that_break_the_contract_are_refused_at_once(
    engine: DiffusionEngine, windows: tuple[Box, ...], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(region_work(windows=windows, size=size))


def test_an_average_divides_by_the_windows_over_each_place() -> None:
    windows = (Box(0, 0, 2, 1), Box(1, 0, 3, 1))
    components = [torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[6.0, 8.0]]])]
    assert count_windows((1, 4), windows).tolist() == [[[[1, 2, 1, 0]]]]
    assert average_windows(components, (1, 4), windows).tolist() == [[[[2, 5, 8, 0]]]]


def test_a_blend_is_linear_across_an_overlap() -> None:
    windows = (Box(0, 0, 8, 1), Box(4, 0, 12, 1))
    black, white = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    blended = blend_windows([black, white], (1, 12), windows)[0, 0].tolist()
    assert blended == pytest.approx([0, 0, 0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1, 1, 1])


def test_a_blend_leaves_a_single_window_unchanged() -> None:
    image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend_windows([image], (64, 64), (Box(0, 0, 64, 64),)), image)


def test_a_blend_of_an_image_cut_into_windows_is_that_image() -> None:
    image = torch.randn(3, 88, 144, generator=torch.Generator().manual_seed(0))
    crops = [image[:, top:bottom, left:right] for left, top, right, bottom in THREE]
    covered = count_windows((88, 144), THREE)[0, 0] > 0
    blended = blend_windows(crops, (88, 144), THREE)
    assert torch.allclose(blended[:, covered], image[:, covered], atol=1e-5)
    assert blended[:, ~covered].abs().max() == 0


def test_the_decoded_windows_of_a_large_region_are_never_all_in_memory(tiny_model: Path) -> None:
    components = load_tiny(tiny_model)
    windows = tuple(Box(left, 0, left + 64, 64) for left in range(0, 9 * 40, 40))
    decoded: list[StorageWeakRef] = []
    alive: list[int] = []

    def record(_module: Any, _args: Any, output: Tensor) -> None:
        alive.append(sum(not storage.expired() for storage in decoded))
        decoded.append(StorageWeakRef(output.untyped_storage()))

    components.vae.decoder.register_forward_hook(record)
    with open_engine(components, vae_batch=2) as engine:
        assert engine.submit(region_work(windows=windows)).result(60).shape == (64, 384, 3)
    assert len(decoded) == 5
    assert max(alive) <= 1


def test_strokes_thinner_than_a_latent_stay_in_the_mask(components: Components) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[21, :] = 255
    masks: list[Tensor] = []
    hook = components.unet.register_forward_pre_hook(
        lambda _, args: masks.append(args[0][:, 4].clone())
    )
    with open_engine(components) as engine:
        engine.submit(region_work(mask=mask, num_inference_steps=1, strength=1.0)).result(60)
    hook.remove()
    assert masks[0][0].sum(dim=1).tolist() == [0, 0, 8, 0, 0, 0, 0, 0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    pixels=st.lists(st.tuples(st.integers(0, 87), st.integers(0, 143)), min_size=1, max_size=9),
    grey=st.sampled_from([128, 255]),
)
def test_a_latent_is_masked_if_and_only_if_one_of_its_pixels_is(
    components: Components, pixels: list[tuple[int, int]], grey: int
) -> None:
    mask = np.zeros((88, 144), dtype=np.uint8)
    for row, column in pixels:
        mask[row, column] = grey
    prepared = prepare_region(region_work(windows=THREE, mask=mask), Future(), components)
    assert {tuple(place) for place in prepared.mask[0, 0].nonzero().tolist()} == {
        (row // 8, column // 8) for row, column in pixels
    }
    for image, box in zip(prepared.vae_inputs, THREE, strict=False):
        hidden = (image == 0).all(dim=0).numpy()
        assert hidden[mask[box.top : box.bottom, box.left : box.right] > 0].all()


def test_pixels_outside_all_windows_are_unchanged(engine: DiffusionEngine) -> None:
    work = region_work(windows=THREE)
    result = engine.submit(work).result(60)
    covered = count_windows((88, 144), THREE)[0, 0].numpy() > 0
    assert np.array_equal(result[~covered], work.image[~covered])
    assert (result[covered] != work.image[covered]).mean() > 0.9


def test_a_duplicate_window_changes_no_result(engine: DiffusionEngine) -> None:
    once = engine.submit(region_work(strength=0.6)).result(60)
    twice = engine.submit(region_work(windows=(THREE[0], THREE[0]), strength=0.6)).result(60)
    assert np.abs(once.astype(int) - twice).max() <= 1


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("max_batch", [8, 3])
def test_a_canvas_equals_a_plain_multidiffusion_loop(
    components: Components, tiny_model: Path, strength: float, max_batch: int
) -> None:
    work = region_work(windows=THREE, strength=strength, num_inference_steps=5)
    with open_engine(components, max_batch=max_batch) as engine:
        result = engine.submit(work).result(60)
    expected = multidiffusion(pipeline(tiny_model), work)
    covered = count_windows((88, 144), THREE)[0, 0].numpy() > 0
    assert np.abs(result.astype(int) - expected)[covered].max() <= 1


def pipeline(folder: Path) -> Any:
    library: Any = diffusers
    return library.StableDiffusionInpaintPipeline.from_pretrained(folder)


def multidiffusion(pipe: Any, work: RegionWork) -> Pixels:
    """The paper's loop with diffusers' components: DDIM, one window at a time."""
    library: Any = diffusers
    generator = torch.Generator().manual_seed(work.seed)
    image = pipe.image_processor.preprocess(work.image[None] / np.float32(255))
    mask = torch.from_numpy(work.mask)[None, None] / 255
    latent_mask = mask[..., ::8, ::8]
    prompts = pipe.encode_prompt(work.params.prompt, "cpu", 1, True)
    scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(work.params.num_inference_steps)
    steps_to_run = int(work.params.num_inference_steps * work.params.strength)
    timesteps = scheduler.timesteps[work.params.num_inference_steps - steps_to_run :]
    shape = (1, 4, *latent_mask.shape[-2:])

    def inside(canvas: Tensor, box: Box, factor: int) -> Tensor:
        left, top, right, bottom = (edge // factor for edge in box)
        return canvas[..., top:bottom, left:right]

    def encoded(image: Tensor, noise: Tensor, box: Box) -> Tensor:
        posterior = pipe.vae.encode(inside(image, box, 1)).latent_dist
        latents: Tensor = posterior.mean + posterior.std * inside(noise, box, 8)
        return 0.18215 * latents

    with torch.no_grad():
        image_noise = torch.randn(shape, generator=generator) if steps_to_run < 5 else None
        latents = torch.randn(shape, generator=generator)
        masked_image_noise = torch.randn(shape, generator=generator)
        count = torch.zeros(shape)
        for box in work.windows:
            inside(count, box, 8).add_(1)
        count.clamp_(min=1)
        if image_noise is not None:
            start = torch.zeros(shape)
            for box in work.windows:
                inside(start, box, 8).add_(encoded(image, image_noise, box))
            latents = scheduler.add_noise(start / count, latents, timesteps[:1])
        for timestep in timesteps:
            total = torch.zeros(shape)
            for box in work.windows:
                masked_image = encoded(image * (1 - mask), masked_image_noise, box)
                sample = torch.cat(
                    [inside(latents, box, 8), inside(latent_mask, box, 8), masked_image], dim=1
                )
                conditional = pipe.unet(sample, timestep, prompts[0]).sample
                unconditional = pipe.unet(sample, timestep, prompts[1]).sample
                scale = work.params.guidance_scale
                inside(total, box, 8).add_(unconditional + scale * (conditional - unconditional))
            latents = scheduler.step(total / count, timestep, latents).prev_sample
        return decode_and_blend(pipe, latents, work)


def decode_and_blend(pipe: Any, latents: Tensor, work: RegionWork) -> Pixels:
    """Decode window by window and blend with tent-shaped weights."""
    height, width = work.mask.shape
    total, weight = np.zeros((height, width, 3)), np.full((height, width, 1), 1e-9)
    for left, top, right, bottom in work.windows:
        part = latents[..., top // 8 : bottom // 8, left // 8 : right // 8]
        image = pipe.vae.decode(part / 0.18215).sample[0].permute(1, 2, 0).numpy()
        ys, xs = np.mgrid[0 : bottom - top, 0 : right - left] + 0.5
        tent = np.minimum(ys, bottom - top - ys) * np.minimum(xs, right - left - xs)
        total[top:bottom, left:right] += image * tent[..., None]
        weight[top:bottom, left:right] += tent[..., None]
    return np.asarray(np.round(np.clip(total / weight / 2 + 0.5, 0, 1) * 255), dtype=np.uint8)
