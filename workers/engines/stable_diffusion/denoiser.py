"""The model's uses, each on a batch: encode and begin, predict a step's noise, step, decode."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from math import prod
from typing import get_args

import torch
from torch import Tensor

from shared.errors import OutOfMemory
from workers.engines.options import EngineOptions
from workers.engines.stable_diffusion.batching import Size, buckets, pad
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.deepcache import Kind
from workers.engines.stable_diffusion.host_device_copy import Transfer
from workers.engines.stable_diffusion.memory_modes import MemoryModes, Stage
from workers.engines.stable_diffusion.multidiffusion import blend, crop
from workers.engines.stable_diffusion.oom import RowLimit, attempt, release_memory, run_in_chunks
from workers.engines.stable_diffusion.prompts import PromptEncoder
from workers.engines.stable_diffusion.region_state import (
    BatchRow,
    DenoisingRegion,
    PreparedRegion,
    begin,
)
from workers.engines.stable_diffusion.schedule_table import HEAD, guide
from workers.engines.stable_diffusion.unet_runner import Pool, UNetRunner

LARGEST = {"cuda": 64, "cpu": 8}  # rows; more is no faster
DETERMINISTIC_BATCH = 8
VAE_BATCH = 8
VAE_LATENTS = 8 * 64 * 64  # in one VAE pass: more pixels than 32-bit indices reach above that
NAMES = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder"}


class Denoiser:
    """Runs the model for the device thread; the items of a call share one window size.

    Latents and pictures are float32 between the calls, whatever the model's dtype, so that
    a scheduler's many small steps lose nothing.
    """

    def __init__(self, components: Components, options: EngineOptions) -> None:
        """Places the model. Raises EngineUnavailable where it does not fit the device."""
        self.transfer = Transfer(components.device)
        self._components = components
        self._modes = MemoryModes(components, options.memory)
        guess = DETERMINISTIC_BATCH if options.deterministic else LARGEST[components.device.type]
        self._largest = options.max_batch or guess
        self._prompts = PromptEncoder(components, before=lambda: self._modes.use("text_encoder"))
        pool = Pool()
        self._forwards = {
            kind: UNetRunner(
                components,
                attention=options.attention,
                compile=options.compile,
                graphs=options.graphs,
                deterministic=options.deterministic,
                kind=kind,
                pool=pool,
            )
            for kind in get_args(Kind)
        }
        self._is_deterministic = options.deterministic
        self._is_found = options.max_batch is None and not options.deterministic
        is_single = components.device.type == "cpu" or options.deterministic
        self._vae_batch = options.vae_batch or (1 if is_single else VAE_BATCH)
        self._limits: dict[tuple[Stage, Size], RowLimit] = {}
        is_on_cuda = components.device.type == "cuda"
        if is_on_cuda and self._is_found:
            self._find_largest()
        if is_on_cuda or self._forwards["whole"].wants_buckets:
            self._warm_up()

    @property
    def max_batch(self) -> int:
        """The most rows of any UNet forward."""
        return self._largest

    def max_rows(self, size: Size) -> int:
        """The most rows of one UNet forward at this window size."""
        return self._limit("unet", size).rows

    def vae_rows(self, size: Size) -> int:
        """The most pictures of one VAE pass at this window size."""
        return self._limit("vae", size).rows

    def memory(self, size: Size) -> str:
        """What it took to fit, for the record: ``batch 2, attention_slicing``."""
        limit = self._limit("unet", size)
        lowered = [f"batch {limit.rows}"] if limit.is_lowered else []
        return ", ".join([*lowered, *self._modes.active])

    def begin(self, drafts: list[PreparedRegion]) -> list[DenoisingRegion]:
        """The drafts' first latents. Raises OutOfMemory where one window does not fit."""
        size = drafts[0].window_size
        moments = run_in_chunks(
            self._encode,
            [picture for draft in drafts for picture in draft.pictures],
            self._limit("vae", size),
            lambda tried: self._give_way("vae", size, tried),
        )
        return [
            begin(
                draft,
                moments=torch.stack(list(islice(moments, len(draft.pictures)))),
                embeddings=[self._embed(text, size) for text in draft.prompts],
                scaling_factor=self._components.scaling_factor,
                transfer=self.transfer,
            )
            for draft in drafts
        ]

    def predict(self, rows: list[BatchRow]) -> list[Tensor]:
        """One UNet forward: (C, h, w) float32 for each row, or none where memory ran out.

        The rows are of one kind; a state that the forward keeps goes to their sequences. After
        none the next call needs less. Raises OutOfMemory where nothing is left to try.
        """
        if self._modes.relax():
            self._forget()
        self.transfer.pace()
        predictions = attempt(self._predict, rows)
        if predictions is None:
            self._give_way("unet", rows[0].sequence.draft.window_size, len(rows))
            return []
        return list(predictions.unbind())

    def step(self, sequences: list[DenoisingRegion]) -> None:
        """Guidance and one scheduler step for all; they are of one group of ``group_steps``."""
        without, prediction = (
            torch.cat(each) for each in zip(*(one.predictions() for one in sequences), strict=True)
        )
        table = torch.stack([one.coefficients for one in sequences])
        noise = guide(table, without, prediction)
        latents = torch.cat([one.latents for one in sequences])
        sampler = sequences[0].draft.sampler
        if (formula := sampler.table.formula) is None:
            sequences[0].move_on(sampler.step(noise, sequences[0].step, latents))
            return
        earlier = zip(*(one.history for one in sequences), strict=True)
        history = tuple(torch.cat(each) for each in earlier)
        latents, history = formula.advance(table[:, len(HEAD) :], latents, noise, history)
        found = [torch.split(each, 1) for each in (latents, *history)]
        for one, *own in zip(sequences, *found, strict=True):
            one.move_on(*own)

    def decode(self, sequences: list[DenoisingRegion]) -> list[Tensor]:
        """(3, H, W) float32 in about -1 to 1 for each. Raises OutOfMemory.

        Whole windows: the decoder's attention and its normalisation read every pixel, so a
        part of a window decoded alone would not be the same. A region of many windows needs
        the device's memory for its pixels and the windows of two passes.
        """
        drafts = [one.draft for one in sequences]
        latents = [
            crop(one.latents[0], box) for one in sequences for box in one.draft.canvas.windows
        ]
        size = drafts[0].window_size
        windows = run_in_chunks(
            self._decode,
            latents,
            self._limit("vae", size),
            lambda tried: self._give_way("vae", size, tried),
        )
        canvases = [draft.canvas for draft in drafts]
        return [
            blend(islice(windows, len(one.windows)), one.pixel_size, one.pixel_windows)
            for one in canvases
        ]

    @property
    def _own_size(self) -> Size:
        side = int(self._components.unet.config.sample_size)
        return side, side

    def _find_largest(self) -> None:
        """Tries batches of the model's own window, the largest first, until the VAE fits beside."""
        size = self._own_size
        tried = reversed(buckets(self._largest))
        fitting = (rows for rows in tried if self._fits(rows, size) and self._can_decode(size))
        self._largest = next(fitting, 1)

    def _warm_up(self) -> None:
        """Compiles, captures graphs and chooses kernels before any job waits for them."""
        size = self._own_size
        for rows in reversed(self._sizes()):  # the largest first: by it the way is chosen
            self._fits(rows, size)
        self._can_decode(size)

    def _fits(self, rows: int, size: Size) -> bool:
        """Whether a forward of so many rows has room; its graph is kept."""
        device = self._components.device
        channels = 2 * self._components.latent_channels + 1
        inputs = torch.randn(rows, channels, *size, generator=torch.Generator().manual_seed(0))
        words = self._embed("", size).expand(rows, -1, -1).contiguous()
        self._modes.use("unet")

        def run(inputs: Tensor) -> Tensor:
            timesteps = torch.full((rows,), 500.0, device=device)
            return self._predicted("whole", inputs, timesteps, words)

        found = attempt(run, inputs.to(device))
        if found is None:
            self._forget()
            release_memory()
        return found is not None

    def _can_decode(self, size: Size) -> bool:
        """Whether the VAE has room beside the last forward's graph; by what fits it is limited."""
        components, limit = self._components, self._limit("vae", size)
        latents = torch.zeros(components.latent_channels, *size, device=components.device)
        while attempt(self._decode, [latents] * limit.rows) is None:
            release_memory()
            if limit.rows == 1:
                del self._limits["vae", size]
                self._forget()
                return False
            limit.halve(limit.rows)
        return True

    def _sizes(self) -> tuple[int, ...]:
        """The batch sizes that are run; none, where any will do."""
        if self._is_deterministic:
            return (self._largest,)
        return buckets(self._largest) if self._forwards["whole"].wants_buckets else ()

    def _limit(self, stage: Stage, size: Size) -> RowLimit:
        if (stage, size) not in self._limits:
            most = self._most_rows(size) if stage == "unet" else self._most_pictures(size)
            self._limits[stage, size] = RowLimit(most, stage=NAMES[stage])
        return self._limits[stage, size]

    def _most_rows(self, size: Size) -> int:
        """Where it is not given: of larger windows as many as have the pixels of the own ones."""
        if not self._is_found:
            return self._largest
        fitting = self._largest * prod(self._own_size) // prod(size)
        return max((rows for rows in buckets(self._largest) if rows <= fitting), default=1)

    def _most_pictures(self, size: Size) -> int:
        if self._components.device.type != "cuda":
            return self._vae_batch
        return max(1, min(self._vae_batch, VAE_LATENTS // prod(size)))

    def _give_way(self, stage: Stage, size: Size, tried: int) -> None:
        """Makes the next try need less. Raises OutOfMemory where nothing is left to do."""
        self._forget()
        release_memory()
        if self._is_deterministic:
            raise OutOfMemory(
                f"{tried} rows do not fit the device in {NAMES[stage]}, and a deterministic "
                "engine cannot go on with fewer; use a smaller max_batch"
            )
        if tried > 1:
            self._limit(stage, size).halve(tried)
        elif not self._modes.relieve(stage):
            raise OutOfMemory(
                f"one window does not fit the device in {NAMES[stage]}; use a smaller one"
            )

    def _forget(self) -> None:
        for forward in self._forwards.values():
            forward.forget()

    def _embed(self, text: str, size: Size) -> Tensor:
        while (found := attempt(self._prompts.encode, text)) is None:
            self._give_way("text_encoder", size, 1)
        return found

    def _encode(self, pictures: Iterable[Tensor]) -> Tensor:
        """N staged (3, H, W) float32 to (N, 2C, h, w) float32: mean and deviation."""
        self._modes.use("vae")
        batch = torch.stack(self.transfer.upload(pictures))
        batch = batch.to(self._components.dtype, memory_format=torch.channels_last)
        posterior = self._components.vae.encode(batch).latent_dist
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)

    def _predict(self, rows: list[BatchRow]) -> Tensor:
        """(N, C, h, w) float32 for N rows"""
        kind = rows[0].sequence.kind
        found = self._run(kind, pad(rows, self._sizes()))[: len(rows)]
        return self._keep(rows, found) if kind == "keeping" else found

    def _run(self, kind: Kind, rows: list[BatchRow]) -> Tensor:
        self._modes.use("unet")
        table = torch.stack([row.sequence.coefficients[: len(HEAD)] for row in rows])
        divisor = table[:, HEAD.index("divisor"), None, None, None]
        latents = torch.stack([row.sequence.row_latents(row) for row in rows]) / divisor
        fixed = torch.stack([row.sequence.row_fixed(row) for row in rows])
        inputs = torch.cat([latents, fixed], dim=1)
        if kind == "reusing":
            states = torch.stack([row.sequence.row_state(row) for row in rows])
            inputs = torch.cat([inputs.to(states.dtype), states], dim=1)
        timesteps = table[:, HEAD.index("timestep")].contiguous()
        words = torch.cat([row.sequence.row_embedding(row) for row in rows])
        return self._predicted(kind, inputs, timesteps, words)

    def _predicted(self, kind: Kind, inputs: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return self._forwards[kind](
            inputs,
            timesteps,
            words,
            is_moving=self._modes.is_offloading,
            is_sliced=self._modes.is_slicing,
        )

    def _keep(self, rows: list[BatchRow], found: Tensor) -> Tensor:
        """(N, C, h, w) of (N, C + state, h, w); copies, so that nothing holds the whole batch."""
        channels = self._components.latent_channels
        for row, state in zip(rows, found[:, channels:], strict=True):
            row.sequence.keep(row, state.to(self._components.unet_dtype, copy=True))
        return found[:, :channels].clone()

    def _decode(self, latents: list[Tensor]) -> Tensor:
        """N of (C, h, w) float32 to (N, 3, H, W) float32"""
        self._modes.use("vae")
        scaled = torch.stack(latents) / self._components.scaling_factor
        scaled = scaled.to(self._components.dtype)
        pictures: Tensor = self._components.vae.decode(scaled, return_dict=False)[0]
        return pictures.float()
