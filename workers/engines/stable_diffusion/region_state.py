"""State of one region: prepared on the caller's thread, then denoised on the device thread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.deepcache import (
    ForwardKind,
    check_cache_interval,
    kind_of_step,
)
from workers.engines.stable_diffusion.host_device_copy import CopyStreams, pin
from workers.engines.stable_diffusion.multidiffusion import (
    Canvas,
    average_windows,
    count_windows,
    crop,
    plan_canvas,
    sum_windows,
)
from workers.engines.stable_diffusion.schedulers import Sampler


# eq=False here and below: compared by identity, for == on tensors gives a tensor.
@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRegion:
    """A region before it uses the device; all tensors are float32 on the host, pinned for CUDA.

    vae_inputs: (3, h, w) in -1 to 1 for each window: the image with masked pixels set to 0, then,
    at a strength below 1, the image itself. mask: (1, 1, h, w) in latents, 1 = repaint.
    *_noise: (1, C, h, w); image_noise is None at strength 1.
    """

    work: RegionWork
    future: Future[Pixels]
    canvas: Canvas
    sampler: Sampler
    vae_inputs: tuple[Tensor, ...]
    mask: Tensor
    image_noise: Tensor | None
    initial_noise: Tensor
    masked_image_noise: Tensor

    @property
    def window_size(self) -> tuple[int, int]:
        """(height, width) in latents."""
        return self.canvas.window_size

    @property
    def is_guided(self) -> bool:
        return self.work.params.guidance_scale > 1

    @property
    def start_tensors(self) -> list[Tensor]:
        """The tensors to upload before the first step, besides ``vae_inputs``."""
        noises = [self.initial_noise, self.masked_image_noise, self.image_noise]
        drawn = [noise for noise in noises if noise is not None]
        return [self.sampler.table.values, self.mask, *drawn]

    @property
    def prompts(self) -> list[str]:
        """One prompt per row of a window; with guidance the negative prompt comes first."""
        params = self.work.params
        return [params.negative_prompt, params.prompt] if self.is_guided else [params.prompt]

    @property
    def rows_per_window(self) -> int:
        """Batch rows of one window in one forward pass: 2 with guidance, else 1."""
        return len(self.prompts)


def prepare_region(
    work: RegionWork, future: Future[Pixels], components: Components
) -> PreparedRegion:
    """Do everything that needs no device: pixels to tensors, the schedule, and the noise.

    Raises ParameterError, and ValueError if the windows break their contract.
    """
    check_cache_interval(components.unet, work.params.cache_interval)
    canvas = plan_canvas(work, components.vae_factor)
    generator = torch.Generator().manual_seed(work.seed)
    sampler = Sampler(components.scheduler_config, work.params, generator)
    mask = mask_to_tensor(work.mask)
    vae_inputs = _vae_inputs(work, mask, canvas, with_image=sampler.needs_image_latents)
    shape = (1, components.latent_channels, *canvas.size)
    # Pinning copies each tensor; here that costs time of the caller's thread, not the device's.
    pinned = partial(pin, device=components.device)
    return PreparedRegion(
        work=work,
        future=future,
        canvas=canvas,
        sampler=sampler,
        vae_inputs=tuple(pinned(image) for image in vae_inputs),
        # Max-pooling: nearest-neighbour sampling, as diffusers has it, loses thin strokes.
        mask=pinned(torch.nn.functional.max_pool2d(mask, canvas.vae_factor)),
        # The three draws are in diffusers' order, so that the same seed gives the same noise.
        image_noise=pinned(sampler.draw_noise(shape)) if sampler.needs_image_latents else None,
        initial_noise=pinned(sampler.draw_noise(shape)),
        masked_image_noise=pinned(sampler.draw_noise(shape)),
    )


def _vae_inputs(
    work: RegionWork, mask: Tensor, canvas: Canvas, *, with_image: bool
) -> Iterator[Tensor]:
    """Yield the masked image's windows, then, if asked for, the image's: see PreparedRegion."""
    image = image_to_tensor(work.image)
    masked_image = image * (mask < 0.5)
    for source in (masked_image, image) if with_image else (masked_image,):
        for window in canvas.pixel_windows:
            yield crop(source[0], window).contiguous()


def image_to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in -1 to 1."""
    # torch warns about read-only arrays; this copies them and no others.
    writable = np.require(pixels, requirements=["C", "W"])
    image = torch.from_numpy(writable).permute(2, 0, 1)[None]
    return 2.0 * (image.to(torch.float32) / 255.0) - 1.0


def tensor_to_image(image: Tensor) -> Tensor:
    """(3, H, W) float32 in -1 to 1 to (H, W, 3) uint8, on the same device."""
    scaled = (image * 0.5).add_(0.5).clamp_(0, 1).mul_(255).round_()
    return scaled.to(torch.uint8).permute(1, 2, 0).contiguous()


def mask_to_tensor(mask: Pixels) -> Tensor:
    """(H, W) uint8 to (1, 1, H, W) float32: 1 for values of 128 and more, else 0."""
    return torch.from_numpy(mask >= 128)[None, None].to(torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRow:
    """One row of a UNet batch: one window of a region, under one of its prompts.

    window: index into the canvas's windows. branch: index into the region's prompts.
    """

    region: DenoisingRegion
    window: int
    branch: int


class DenoisingRegion:
    """A region between its first and its last step; all tensors are on the device.

    latents: (1, C, h, w) float32. history: tensors of that shape, see ``StepFormula``.
    step: 0-based. pending_rows: rows that the current step still has to predict.
    """

    def __init__(
        self,
        prepared: PreparedRegion,
        *,
        latents: Tensor,
        table: Tensor,
        embeddings: list[Tensor],
        conditioning: list[Tensor],
    ) -> None:
        """table: (steps, columns). embeddings: (1, tokens, embedding) for each of the prompts.

        conditioning: (1 + C, h, w) for each window: the mask and the masked image's latents.
        """
        self.prepared = prepared
        formula = prepared.sampler.table.formula
        self.latents = latents
        self.history = (latents,) * (formula.history_length if formula else 0)
        self.step = 0
        self._table = table.unbind()
        self._embeddings = embeddings
        self._conditioning = conditioning
        self._cached_features: dict[tuple[int, int], Tensor] = {}
        self._window_counts = None
        # Once per region: an upload per step would make the host wait for the device.
        if len(conditioning) > 1:
            counts = count_windows(prepared.canvas.size, prepared.canvas.windows).clamp_(min=1)
            self._window_counts = counts.to(latents.device)
        self._start_step()

    @property
    def rows_per_window(self) -> int:
        """Batch rows of one window in this step: 1 once guidance has ended."""
        return len(self._embeddings) - self._first_branch

    @property
    def forward_kind(self) -> ForwardKind:
        """The kind of this step's forward passes; only rows of one kind share one."""
        return kind_of_step(self.step, self.prepared.work.params.cache_interval)

    @property
    def is_starting_cached_step(self) -> bool:
        """Whether the step reads the cache, so costs little, and no row of it has run yet."""
        rows = len(self._conditioning) * self.rows_per_window
        return self.forward_kind == "cache_read" and len(self.pending_rows) == rows

    @property
    def is_done(self) -> bool:
        return self.step == len(self._table)

    @property
    def coefficients(self) -> Tensor:
        """(columns,) on the device: this step's row of the schedule table."""
        return self._table[self.step]

    def row_latents(self, row: BatchRow) -> Tensor:
        """(C, h, w) float32"""
        return crop(self.latents[0], self.prepared.canvas.windows[row.window])

    def row_conditioning(self, row: BatchRow) -> Tensor:
        """(1 + C, h, w) float32"""
        return self._conditioning[row.window]

    def row_embedding(self, row: BatchRow) -> Tensor:
        """(1, tokens, embedding)"""
        return self._embeddings[row.branch]

    def row_features(self, row: BatchRow) -> Tensor:
        """(features, h, w) in the UNet's dtype, from the latest cache_write step."""
        return self._cached_features[row.window, row.branch]

    def store_features(self, row: BatchRow, features: Tensor) -> None:
        """Cache a row's (features, h, w) for the following cache_read steps."""
        self._cached_features[row.window, row.branch] = features

    def add_prediction(self, row: BatchRow, prediction: Tensor) -> bool:
        """Store a row's (C, h, w) float32 noise; True if the step now has all of its rows."""
        self._predictions[row.branch][row.window] = prediction
        self.pending_rows.remove(row)
        return not self.pending_rows

    def merged_predictions(self) -> tuple[Tensor, Tensor]:
        """The step's noise over the whole canvas, (1, C, h, w): unconditional and conditional.

        Without guidance both are the conditional one.
        """
        return self._merge_windows(self._first_branch), self._merge_windows(-1)

    def complete_step(self, latents: Tensor, *history: Tensor) -> None:
        """Set the next step's latents and history, and start it."""
        self.latents = latents
        self.history = history
        self.step += 1
        self._start_step()

    def _start_step(self) -> None:
        guided_steps = math.ceil(self.prepared.work.params.guidance_end * len(self._table))
        # Once guidance has ended only the last branch, the prompt, is left.
        self._first_branch = 0 if self.step < guided_steps else len(self._embeddings) - 1
        self._predictions: list[dict[int, Tensor]] = [{} for _ in self._embeddings]
        branches = range(self._first_branch, len(self._embeddings))
        # The next pass writes new features: free the old ones before it needs memory.
        if self.is_done or self.forward_kind == "cache_write":
            self._cached_features.clear()
        self.pending_rows = [
            BatchRow(region=self, window=window, branch=branch)
            for window in range(len(self._conditioning))
            for branch in branches
            if not self.is_done
        ]

    def _merge_windows(self, branch: int) -> Tensor:
        predictions, canvas = self._predictions[branch], self.prepared.canvas
        if self._window_counts is None:
            return predictions[0][None]
        # In the order of windows, not of arrival: float addition depends on the order.
        ordered = [predictions[window] for window in sorted(predictions)]
        return sum_windows(ordered, canvas.size, canvas.windows) / self._window_counts


def start_denoising(
    prepared: PreparedRegion,
    *,
    moments: Tensor,
    embeddings: list[Tensor],
    scaling_factor: float,
    copy_streams: CopyStreams,
) -> DenoisingRegion:
    """Compute the first latents and the conditioning on the device.

    moments: (N, 2C, h, w) float32, mean and standard deviation of the VAE's posterior for each of
    ``vae_inputs``.
    """
    canvas = prepared.canvas
    masked_moments, image_moments = moments.tensor_split([len(canvas.windows)])
    table, mask, initial_noise, masked_image_noise, *image_noise = copy_streams.upload(
        prepared.start_tensors
    )
    image_latents = None
    if image_noise:
        samples = _sample_posterior(image_moments, image_noise[0], canvas)
        image_latents = scaling_factor * average_windows(samples, canvas.size, canvas.windows)
    masked_samples = _sample_posterior(masked_moments, masked_image_noise, canvas)
    conditioning = [
        torch.cat([crop(mask[0], window), scaling_factor * sample])
        for window, sample in zip(canvas.windows, masked_samples, strict=True)
    ]
    return DenoisingRegion(
        prepared,
        latents=prepared.sampler.initial_latents(initial_noise, image_latents),
        table=table,
        embeddings=embeddings,
        conditioning=conditioning,
    )


def _sample_posterior(moments: Tensor, noise: Tensor, canvas: Canvas) -> list[Tensor]:
    """mean + deviation * noise, (C, h, w) for each window; overlaps share the same noise."""
    means, deviations = moments.chunk(2, dim=1)
    return [
        mean + deviation * crop(noise[0], window)
        for mean, deviation, window in zip(means, deviations, canvas.windows, strict=True)
    ]
