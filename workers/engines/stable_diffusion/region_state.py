"""One region on its way: drawn up on the caller's thread, then advanced on the device thread."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRegion:
    """A region before it has touched the device; all tensors float32 on the host.

    pictures: what the VAE must encode, (3, h, w) in -1 to 1: each window with 0 under the
    mask, then each as it is if it is needed. mask: (1, 1, h, w), 0 or 1, in latents.
    *_noise: (1, C, h, w).
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
        """What the device needs to begin: table, mask, and the noises."""
        noises = [self.initial_noise, self.masked_image_noise, self.image_noise]
        known = [noise for noise in noises if noise is not None]
        return [self.sampler.table.values, self.mask, *known]

    @property
    def prompts(self) -> list[str]:
        """One for each row of a window; with guidance the negative prompt comes first."""
        params = self.work.params
        return [params.negative_prompt, params.prompt] if self.is_guided else [params.prompt]

    @property
    def rows(self) -> int:
        """Rows that one window takes in a forward."""
        return len(self.prompts)


def prepare_region(
    work: RegionWork, future: Future[Pixels], components: Components
) -> PreparedRegion:
    """All that needs no device: pixels to tensors, and the noise in diffusers' order of draws.

    Raises ParameterError, and ValueError where windows break their contract.
    """
    check_cache_interval(components.unet, work.params.cache_interval)
    canvas = plan_canvas(work, components.vae_factor)
    generator = torch.Generator().manual_seed(work.seed)
    sampler = Sampler(components.scheduler_config, work.params, generator)
    image, mask = image_to_tensor(work.image), mask_to_tensor(work.mask)
    wholes = [image * (mask < 0.5), *([image] if sampler.needs_image_latents else [])]
    shape = (1, components.latent_channels, *canvas.size)
    ready = partial(pin, device=components.device)
    return PreparedRegion(
        work=work,
        future=future,
        canvas=canvas,
        sampler=sampler,
        vae_inputs=tuple(
            ready(crop(whole[0], box).contiguous())
            for whole in wholes
            for box in canvas.pixel_windows
        ),
        mask=ready(torch.nn.functional.max_pool2d(mask, canvas.factor)),
        image_noise=ready(sampler.draw_noise(shape)) if sampler.needs_image_latents else None,
        initial_noise=ready(sampler.draw_noise(shape)),
        masked_image_noise=ready(sampler.draw_noise(shape)),
    )


def image_to_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in -1 to 1."""
    ours = np.require(pixels, requirements=["C", "W"])  # torch warns of what is read-only
    image = torch.from_numpy(ours).permute(2, 0, 1)[None]
    return 2.0 * (image.to(torch.float32) / 255.0) - 1.0


def tensor_to_image(picture: Tensor) -> Tensor:
    """(3, H, W) float32 in -1 to 1 to (H, W, 3) uint8, on the same device."""
    scaled = (picture * 0.5).add_(0.5).clamp_(0, 1).mul_(255).round_()
    return scaled.to(torch.uint8).permute(1, 2, 0).contiguous()


def mask_to_tensor(mask: Pixels) -> Tensor:
    """(H, W) uint8 to (1, 1, H, W) float32, 1 from half intensity on, else 0."""
    return torch.from_numpy(mask >= 128)[None, None].to(torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRow:
    """One row of a UNet forward: a window of a sequence, under one of its prompts."""

    region: DenoisingRegion
    window: int
    branch: int


class DenoisingRegion:
    """A region being denoised: its latents, and what its present step still lacks.

    latents: (1, C, h, w) float32. history: the same shape each, see ``step_table.Formula``.
    table: (steps, columns) on the device. embeddings: one (1, tokens, embedding) for each
    branch, the negative prompt first. fixed: (1 + C, h, w) for each window, mask and masked
    image.
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
        self.prepared = prepared
        formula = prepared.sampler.table.formula
        self.latents = latents
        self.history = (latents,) * (formula.history if formula else 0)
        self.step = 0
        self._table = table.unbind()
        self._embeddings = embeddings
        self._conditioning = conditioning
        self._cached_features: dict[tuple[int, int], Tensor] = {}
        self._window_counts = None
        if len(conditioning) > 1:
            counts = count_windows(prepared.canvas.size, prepared.canvas.windows).clamp_(min=1)
            self._window_counts = counts.to(latents.device)
        self._start_step()

    @property
    def rows(self) -> int:
        """Rows that one window takes in a forward of this step."""
        return len(self._embeddings) - self._first_branch

    @property
    def forward_kind(self) -> ForwardKind:
        """What this step's forwards are; only rows of one kind share a forward."""
        return kind_of_step(self.step, self.prepared.work.params.cache_interval)

    @property
    def is_starting_cached_step(self) -> bool:
        """Whether the step is yet to begin and costs next to nothing."""
        rows = len(self._conditioning) * self.rows
        return self.forward_kind == "cache_read" and len(self.pending_rows) == rows

    @property
    def is_done(self) -> bool:
        return self.step == len(self._table)

    @property
    def coefficients(self) -> Tensor:
        """(columns,) on the device: this step's row of the table."""
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
        """(state, h, w) in the model's dtype, as the last step of kind keeping left it."""
        return self._cached_features[row.window, row.branch]

    def store_features(self, row: BatchRow, state: Tensor) -> None:
        """For the steps that reuse it: (state, h, w)."""
        self._cached_features[row.window, row.branch] = state

    def add_prediction(self, row: BatchRow, prediction: Tensor) -> bool:
        """Takes one row's (C, h, w) float32; True where it was the last of its step."""
        self._predictions[row.branch][row.window] = prediction
        self.pending_rows.remove(row)
        return not self.pending_rows

    def predictions(self) -> tuple[Tensor, Tensor]:
        """The step's noise, (1, C, h, w) each: without the prompt and with it.

        The same twice where there is no guidance.
        """
        return self._merge_windows(self._first_branch), self._merge_windows(-1)

    def complete_step(self, latents: Tensor, *history: Tensor) -> None:
        """To the next step, with its latents and what it needs to know of the steps before."""
        self.latents = latents
        self.history = history
        self.step += 1
        self._start_step()

    def _start_step(self) -> None:
        guided = math.ceil(self.prepared.work.params.guidance_end * len(self._table))
        self._first_branch = 0 if self.step < guided else len(self._embeddings) - 1
        self._predictions: list[dict[int, Tensor]] = [{} for _ in self._embeddings]
        branches = range(self._first_branch, len(self._embeddings))
        if self.is_done or self.forward_kind == "cache_write":
            self._cached_features.clear()
        self.pending_rows = [
            BatchRow(region=self, window=window, branch=branch)
            for window in range(len(self._conditioning))
            for branch in branches
            if not self.is_done
        ]

    def _merge_windows(self, branch: int) -> Tensor:
        parts, canvas = self._predictions[branch], self.prepared.canvas
        if self._window_counts is None:
            return parts[0][None]
        return (
            sum_windows([parts[n] for n in sorted(parts)], canvas.size, canvas.windows)
            / self._window_counts
        )


def start_denoising(
    prepared: PreparedRegion,
    *,
    moments: Tensor,
    embeddings: list[Tensor],
    scaling_factor: float,
    copy_streams: CopyStreams,
) -> DenoisingRegion:
    """The first latents, on the device.

    moments: (N, 2C, h, w) float32, mean and deviation of the VAE's posterior for each of
    the draft's ``vae_inputs``.
    """
    canvas = prepared.canvas
    masked, image = moments[: len(canvas.windows)], moments[len(canvas.windows) :]
    table, mask, initial_noise, masked_image_noise, *image_noise = copy_streams.upload(
        prepared.start_tensors
    )
    image_latents = None
    if image_noise:
        parts = _sample_posterior(image, image_noise[0], canvas)
        image_latents = scaling_factor * average_windows(parts, canvas.size, canvas.windows)
    parts = _sample_posterior(masked, masked_image_noise, canvas)
    return DenoisingRegion(
        prepared,
        latents=prepared.sampler.initial_latents(initial_noise, image_latents),
        table=table,
        embeddings=embeddings,
        conditioning=[
            torch.cat([crop(mask[0], box), scaling_factor * part])
            for box, part in zip(canvas.windows, parts, strict=True)
        ],
    )


def _sample_posterior(moments: Tensor, noise: Tensor, canvas: Canvas) -> list[Tensor]:
    """(C, h, w) for each window; overlapping windows draw the same noise."""
    means, deviations = moments.chunk(2, dim=1)
    return [
        mean + deviation * crop(noise[0], box)
        for mean, deviation, box in zip(means, deviations, canvas.windows, strict=True)
    ]
