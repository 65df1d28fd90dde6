"""One region on its way: drawn up on the caller's thread, then advanced on the device thread."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.engines.canvas import Canvas, average, count_windows, crop, plan_canvas
from workers.engines.diffusers_loading import Components
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.schedulers import Sampler


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """A region before it has touched the device; all tensors float32 on the CPU.

    image: (1, 3, H, W) in -1 to 1. masked_image: the same with 0 under the mask. mask:
    (1, 1, h, w), 0 or 1, in latents. *_noise: (1, C, h, w).
    """

    work: RegionWork
    future: Future[Pixels]
    canvas: Canvas
    sampler: Sampler
    image: Tensor
    masked_image: Tensor
    mask: Tensor
    image_noise: Tensor | None
    start_noise: Tensor
    masked_noise: Tensor

    @property
    def window_size(self) -> tuple[int, int]:
        """(height, width) in latents."""
        return self.canvas.window_size

    @property
    def is_guided(self) -> bool:
        return self.work.params.guidance_scale > 1

    @property
    def pictures(self) -> list[Tensor]:
        """What the VAE must encode, (3, H, W) each: masked windows, then windows if needed."""
        wholes = (
            [self.masked_image] if self.image_noise is None else [self.masked_image, self.image]
        )
        return [crop(whole[0], box) for whole in wholes for box in self.canvas.pixel_windows]

    @property
    def prompts(self) -> list[str]:
        """One for each row of a window; with guidance the negative prompt comes first."""
        params = self.work.params
        return [params.negative_prompt, params.prompt] if self.is_guided else [params.prompt]

    @property
    def rows(self) -> int:
        """Rows that one window takes in a forward."""
        return len(self.prompts)


def draw_up(work: RegionWork, future: Future[Pixels], components: Components) -> Draft:
    """All that needs no device: pixels to tensors, and the noise in diffusers' order of draws.

    Raises ParameterError, and ValueError where windows break their contract.
    """
    canvas = plan_canvas(work, components.vae_factor)
    generator = torch.Generator().manual_seed(work.seed)
    sampler = Sampler(components.scheduler_config, work.params, generator)
    image, mask = to_image(work.image), to_mask(work.mask)
    shape = (1, components.latent_channels, *canvas.size)
    return Draft(
        work=work,
        future=future,
        canvas=canvas,
        sampler=sampler,
        image=image,
        masked_image=image * (mask < 0.5),
        mask=torch.nn.functional.max_pool2d(mask, canvas.factor),
        image_noise=sampler.draw(shape) if sampler.needs_image else None,
        start_noise=sampler.draw(shape),
        masked_noise=sampler.draw(shape),
    )


def to_image(pixels: Pixels) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in -1 to 1."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return 2.0 * (image.to(torch.float32) / 255.0) - 1.0


def to_pixels(picture: Tensor, draft: Draft) -> Pixels:
    """(3, H, W) float32 to (H, W, 3) uint8; where no window lies, the region's own pixels."""
    canvas = draft.canvas
    scaled = (picture * 0.5 + 0.5).clamp(0, 1) * 255
    pixels = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    covered = count_windows(canvas.pixel_size, canvas.pixel_windows)[0, 0].numpy() > 0
    return np.where(covered[..., None], pixels, draft.work.image)


def to_mask(mask: Pixels) -> Tensor:
    """(H, W) uint8 to (1, 1, H, W) float32, 1 from half intensity on, else 0."""
    return torch.from_numpy(mask >= 128)[None, None].to(torch.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row of a UNet forward: a window of a sequence, under one of its prompts."""

    sequence: Sequence
    window: int
    branch: int


class Sequence:
    """A region being denoised: its latents, and what its present step still lacks.

    latents: (1, C, h, w) float32. embeddings: one (1, tokens, embedding) for each branch,
    the negative prompt first. masked_latents: (C, h, w) float32 for each window.
    """

    def __init__(
        self,
        draft: Draft,
        *,
        latents: Tensor,
        embeddings: list[Tensor],
        masked_latents: list[Tensor],
    ) -> None:
        self.draft = draft
        self.latents = latents
        self.step = 0
        self._embeddings = embeddings
        device, canvas = latents.device, draft.canvas
        self._fixed = [  # (1 + C, h, w) for each window: mask and masked image
            torch.cat([crop(draft.mask[0].to(device), box), part])
            for box, part in zip(canvas.windows, masked_latents, strict=True)
        ]
        self._counts = count_windows(canvas.size, canvas.windows).clamp_(min=1).to(device)
        self._begin_step()

    @property
    def is_done(self) -> bool:
        return self.step == len(self.draft.sampler.timesteps)

    @property
    def timestep(self) -> Tensor:
        """0-dimensional, on the CPU."""
        return self.draft.sampler.timesteps[self.step]

    def row_input(self, row: Row) -> Tensor:
        """(2C + 1, h, w) float32: noisy latents, mask, masked image's latents."""
        box = self.draft.canvas.windows[row.window]
        return torch.cat([crop(self._scaled[0], box), self._fixed[row.window]])

    def row_embedding(self, row: Row) -> Tensor:
        """(1, tokens, embedding)"""
        return self._embeddings[row.branch]

    def absorb(self, row: Row, prediction: Tensor) -> None:
        """Takes one row's (C, h, w) float32; the last of a step advances the latents."""
        box = self.draft.canvas.windows[row.window]
        crop(self._sums[row.branch], box).add_(prediction)
        self.pending.remove(row)
        if not self.pending:
            self._end_step()

    def _begin_step(self) -> None:
        if self.is_done:
            return
        self._scaled = self.draft.sampler.scale(self.latents, self.timestep)
        self._sums = self.latents.new_zeros(len(self._embeddings), *self.latents.shape[1:])
        self.pending = [
            Row(sequence=self, window=window, branch=branch)
            for window in range(len(self._fixed))
            for branch in range(len(self._embeddings))
        ]

    def _end_step(self) -> None:
        """Classifier-free guidance (Ho and Salimans 2022), then the scheduler's step."""
        prediction = self._sums[-1:] / self._counts
        if self.draft.is_guided:
            without = self._sums[:1] / self._counts
            prediction = without + self.draft.work.params.guidance_scale * (prediction - without)
        self.latents = self.draft.sampler.step(prediction, self.timestep, self.latents)
        self.step += 1
        self._begin_step()


def begin(
    draft: Draft, *, moments: Tensor, embeddings: list[Tensor], scaling_factor: float
) -> Sequence:
    """The first latents, on the device.

    moments: (N, 2C, h, w) float32, mean and deviation of the VAE's posterior for each of
    the draft's ``pictures``.
    """
    canvas, device = draft.canvas, moments.device
    masked, image = moments[: len(canvas.windows)], moments[len(canvas.windows) :]
    image_latents = None
    if draft.image_noise is not None:
        parts = _sample(image, draft.image_noise.to(device), canvas)
        image_latents = scaling_factor * average(parts, canvas.size, canvas.windows)
    parts = _sample(masked, draft.masked_noise.to(device), canvas)
    return Sequence(
        draft,
        latents=draft.sampler.start(draft.start_noise.to(device), image_latents),
        embeddings=embeddings,
        masked_latents=[scaling_factor * part for part in parts],
    )


def _sample(moments: Tensor, noise: Tensor, canvas: Canvas) -> list[Tensor]:
    """(C, h, w) for each window; overlapping windows draw the same noise."""
    means, deviations = moments.chunk(2, dim=1)
    return [
        mean + deviation * crop(noise[0], box)
        for mean, deviation, box in zip(means, deviations, canvas.windows, strict=True)
    ]
