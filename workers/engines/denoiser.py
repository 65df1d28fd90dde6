"""The model's three uses, each on a batch: encode and begin, predict a step's noise, decode."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.batching import Size
from workers.engines.canvas import blend, crop
from workers.engines.diffusers_loading import Components
from workers.engines.memory import RowLimit, attempt, run_in_chunks
from workers.engines.prompts import PromptEncoder
from workers.engines.sequence import Draft, Row, Sequence, begin


class Denoiser:
    """Runs the model for the device thread; the items of a call share one window size.

    Latents and pictures are float32 between the calls, whatever the model's dtype, so that
    a scheduler's many small steps lose nothing.
    """

    def __init__(self, components: Components, *, max_rows: int, vae_rows: int) -> None:
        self._components = components
        self._prompts = PromptEncoder(components)
        self._max_rows = max_rows
        self._vae_rows = vae_rows
        self._limits: dict[tuple[str, Size], RowLimit] = {}

    def max_rows(self, size: Size) -> int:
        """The most rows of one UNet forward at this window size."""
        return self._limit("the UNet", size, self._max_rows).rows

    def begin(self, drafts: list[Draft]) -> list[Sequence]:
        """The drafts' first latents. Raises OutOfMemory where one window does not fit."""
        pictures = [picture for draft in drafts for picture in draft.pictures]
        limit = self._limit("the VAE's encoder", drafts[0].window_size, self._vae_rows)
        moments = run_in_chunks(self._encode, torch.stack(pictures), limit)
        shares = torch.split(moments, [len(draft.pictures) for draft in drafts])
        return [
            begin(
                draft,
                moments=share,
                embeddings=[self._prompts.encode(text) for text in draft.prompts],
                scaling_factor=self._components.scaling_factor,
            )
            for draft, share in zip(drafts, shares, strict=True)
        ]

    def predict(self, rows: list[Row]) -> list[Tensor]:
        """One UNet forward: (C, h, w) float32 for each row, or none where memory ran out.

        The next call is then picked smaller. Raises OutOfMemory where one row does not fit.
        """
        predictions = attempt(self._predict, rows)
        if predictions is not None:
            return list(predictions.unbind())
        size = rows[0].sequence.draft.window_size
        self._limit("the UNet", size, self._max_rows).halve(len(rows))
        return []

    def decode(self, sequences: list[Sequence]) -> list[Tensor]:
        """(3, H, W) float32 in about -1 to 1 for each. Raises OutOfMemory."""
        drafts = [one.draft for one in sequences]
        latents = [
            crop(one.latents[0], box) for one in sequences for box in one.draft.canvas.windows
        ]
        limit = self._limit("the VAE's decoder", drafts[0].window_size, self._vae_rows)
        windows = run_in_chunks(self._decode, torch.stack(latents), limit)
        shares = torch.split(windows, [len(draft.canvas.windows) for draft in drafts])
        return [
            blend(share.unbind(), draft.canvas.pixel_size, draft.canvas.pixel_windows)
            for draft, share in zip(drafts, shares, strict=True)
        ]

    def _limit(self, stage: str, size: Size, rows: int) -> RowLimit:
        return self._limits.setdefault((stage, size), RowLimit(rows, stage=stage))

    def _encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) float32 on the CPU to (N, 2C, h, w) float32: mean and deviation."""
        pictures = pictures.to(
            self._components.device, self._components.dtype, memory_format=torch.channels_last
        )
        posterior = self._components.vae.encode(pictures).latent_dist
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)

    def _predict(self, rows: list[Row]) -> Tensor:
        """(N, C, h, w) float32"""
        dtype, device = self._components.dtype, self._components.device
        inputs = torch.stack([row.sequence.row_input(row) for row in rows])
        timesteps = torch.stack([row.sequence.timestep.float() for row in rows])
        prediction: Tensor = self._components.unet(
            inputs.to(dtype),
            timesteps.to(device),
            encoder_hidden_states=torch.cat([row.sequence.row_embedding(row) for row in rows]),
            return_dict=False,
        )[0]
        return prediction.float()

    def _decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float32 to (N, 3, H, W) float32"""
        scaled = (latents / self._components.scaling_factor).to(self._components.dtype)
        pictures: Tensor = self._components.vae.decode(scaled, return_dict=False)[0]
        return pictures.float()
