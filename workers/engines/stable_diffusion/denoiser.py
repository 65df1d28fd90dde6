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
from workers.engines.stable_diffusion.batching import LatentSize, bucket_sizes, pad_to_bucket
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.deepcache import ForwardKind
from workers.engines.stable_diffusion.host_device_copy import CopyStreams
from workers.engines.stable_diffusion.memory_modes import MemoryModes, Stage
from workers.engines.stable_diffusion.multidiffusion import blend_windows, crop
from workers.engines.stable_diffusion.oom import RowLimit, release_memory, run_in_chunks, try_run
from workers.engines.stable_diffusion.prompts import PromptEncoder
from workers.engines.stable_diffusion.region_state import (
    BatchRow,
    DenoisingRegion,
    PreparedRegion,
    start_denoising,
)
from workers.engines.stable_diffusion.schedule_table import COMMON_COLUMNS, apply_guidance
from workers.engines.stable_diffusion.unet_runner import GraphPool, UNetRunner

MAX_ROWS = {"cuda": 64, "cpu": 8}  # rows; more is no faster
DETERMINISTIC_BATCH = 8
VAE_BATCH = 8
VAE_LATENTS = 8 * 64 * 64  # in one VAE pass: more pixels than 32-bit indices reach above that
STAGE_NAMES = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder"}


class Denoiser:
    """Runs the model for the device thread; the items of a call share one window size.

    Latents and pictures are float32 between the calls, whatever the model's dtype, so that
    a scheduler's many small steps lose nothing.
    """

    def __init__(self, components: Components, options: EngineOptions) -> None:
        """Places the model. Raises EngineUnavailable where it does not fit the device."""
        self.copy_streams = CopyStreams(components.device)
        self._components = components
        self._modes = MemoryModes(components, options.memory)
        guess = DETERMINISTIC_BATCH if options.deterministic else MAX_ROWS[components.device.type]
        self._max_batch = options.max_batch or guess
        self._prompts = PromptEncoder(
            components, before_encode=lambda: self._modes.bring_to_device("text_encoder")
        )
        pool = GraphPool()
        self._unet_runners = {
            kind: UNetRunner(
                components,
                attention=options.attention,
                compile=options.compile,
                graphs=options.graphs,
                deterministic=options.deterministic,
                kind=kind,
                pool=pool,
            )
            for kind in get_args(ForwardKind)
        }
        self._is_deterministic = options.deterministic
        self._is_auto_batch = options.max_batch is None and not options.deterministic
        is_single = components.device.type == "cpu" or options.deterministic
        self._vae_batch = options.vae_batch or (1 if is_single else VAE_BATCH)
        self._limits: dict[tuple[Stage, LatentSize], RowLimit] = {}
        is_on_cuda = components.device.type == "cuda"
        if is_on_cuda and self._is_auto_batch:
            self._find_max_batch()
        if is_on_cuda or self._unet_runners["full"].needs_buckets:
            self._warm_up()

    @property
    def max_batch(self) -> int:
        """The most rows of any UNet forward."""
        return self._max_batch

    def max_rows(self, size: LatentSize) -> int:
        """The most rows of one UNet forward at this window size."""
        return self._limit("unet", size).rows

    def max_vae_images(self, size: LatentSize) -> int:
        """The most pictures of one VAE pass at this window size."""
        return self._limit("vae", size).rows

    def memory_report(self, size: LatentSize) -> str:
        """What it took to fit, for the record: ``batch 2, attention_slicing``."""
        limit = self._limit("unet", size)
        lowered = [f"batch {limit.rows}"] if limit.is_reduced else []
        return ", ".join([*lowered, *self._modes.active])

    def start(self, prepared_regions: list[PreparedRegion]) -> list[DenoisingRegion]:
        """The drafts' first latents. Raises OutOfMemory where one window does not fit."""
        size = prepared_regions[0].window_size
        moments = run_in_chunks(
            self._encode,
            [picture for prepared in prepared_regions for picture in prepared.vae_inputs],
            self._limit("vae", size),
            lambda tried: self._reduce_memory("vae", size, tried),
        )
        return [
            start_denoising(
                prepared,
                moments=torch.stack(list(islice(moments, len(prepared.vae_inputs)))),
                embeddings=[self._embed(text, size) for text in prepared.prompts],
                scaling_factor=self._components.scaling_factor,
                copy_streams=self.copy_streams,
            )
            for prepared in prepared_regions
        ]

    def predict(self, rows: list[BatchRow]) -> list[Tensor]:
        """One UNet forward: (C, h, w) float32 for each row, or none where memory ran out.

        The rows are of one kind; a state that the forward keeps goes to their sequences. After
        none the next call needs less. Raises OutOfMemory where nothing is left to try.
        """
        if self._modes.disable_fallback():
            self._drop_graphs()
        self.copy_streams.limit_run_ahead()
        predictions = try_run(self._predict, rows)
        if predictions is None:
            self._reduce_memory("unet", rows[0].region.prepared.window_size, len(rows))
            return []
        return list(predictions.unbind())

    def step(self, sequences: list[DenoisingRegion]) -> None:
        """Guidance and one scheduler step for all; of one group of ``group_by_formula``."""
        without, prediction = (
            torch.cat(each) for each in zip(*(one.predictions() for one in sequences), strict=True)
        )
        table = torch.stack([one.coefficients for one in sequences])
        noise = apply_guidance(table, without, prediction)
        latents = torch.cat([one.latents for one in sequences])
        sampler = sequences[0].prepared.sampler
        if (formula := sampler.table.formula) is None:
            sequences[0].complete_step(sampler.step(noise, sequences[0].step, latents))
            return
        earlier = zip(*(one.history for one in sequences), strict=True)
        history = tuple(torch.cat(each) for each in earlier)
        latents, history = formula.step(table[:, len(COMMON_COLUMNS) :], latents, noise, history)
        found = [torch.split(each, 1) for each in (latents, *history)]
        for one, *own in zip(sequences, *found, strict=True):
            one.complete_step(*own)

    def decode(self, sequences: list[DenoisingRegion]) -> list[Tensor]:
        """(3, H, W) float32 in about -1 to 1 for each. Raises OutOfMemory.

        Whole windows: the decoder's attention and its normalisation read every pixel, so a
        part of a window decoded alone would not be the same. A region of many windows needs
        the device's memory for its pixels and the windows of two passes.
        """
        prepared_regions = [one.prepared for one in sequences]
        latents = [
            crop(one.latents[0], box) for one in sequences for box in one.prepared.canvas.windows
        ]
        size = prepared_regions[0].window_size
        windows = run_in_chunks(
            self._decode,
            latents,
            self._limit("vae", size),
            lambda tried: self._reduce_memory("vae", size, tried),
        )
        canvases = [prepared.canvas for prepared in prepared_regions]
        return [
            blend_windows(islice(windows, len(one.windows)), one.pixel_size, one.pixel_windows)
            for one in canvases
        ]

    @property
    def _native_size(self) -> LatentSize:
        side = int(self._components.unet.config.sample_size)
        return side, side

    def _find_max_batch(self) -> None:
        """Tries batches of the model's own window, the largest first, until the VAE fits beside."""
        size = self._native_size
        tried = reversed(bucket_sizes(self._max_batch))
        fitting = (
            rows for rows in tried if self._forward_fits(rows, size) and self._decode_fits(size)
        )
        self._max_batch = next(fitting, 1)

    def _warm_up(self) -> None:
        """Compiles, captures graphs and chooses kernels before any job waits for them."""
        size = self._native_size
        for rows in reversed(self._bucket_sizes()):  # the largest first: by it the way is chosen
            self._forward_fits(rows, size)
        self._decode_fits(size)

    def _forward_fits(self, rows: int, size: LatentSize) -> bool:
        """Whether a forward of so many rows has room; its graph is kept."""
        device = self._components.device
        channels = 2 * self._components.latent_channels + 1
        inputs = torch.randn(rows, channels, *size, generator=torch.Generator().manual_seed(0))
        words = self._embed("", size).expand(rows, -1, -1).contiguous()
        self._modes.bring_to_device("unet")

        def run(inputs: Tensor) -> Tensor:
            timesteps = torch.full((rows,), 500.0, device=device)
            return self._run_unet("full", inputs, timesteps, words)

        found = try_run(run, inputs.to(device))
        if found is None:
            self._drop_graphs()
            release_memory()
        return found is not None

    def _decode_fits(self, size: LatentSize) -> bool:
        """Whether the VAE has room beside the last forward's graph; by what fits it is limited."""
        components, limit = self._components, self._limit("vae", size)
        latents = torch.zeros(components.latent_channels, *size, device=components.device)
        while try_run(self._decode, [latents] * limit.rows) is None:
            release_memory()
            if limit.rows == 1:
                del self._limits["vae", size]
                self._drop_graphs()
                return False
            limit.halve(limit.rows)
        return True

    def _bucket_sizes(self) -> tuple[int, ...]:
        """The batch sizes that are run; none, where any will do."""
        if self._is_deterministic:
            return (self._max_batch,)
        return bucket_sizes(self._max_batch) if self._unet_runners["full"].needs_buckets else ()

    def _limit(self, stage: Stage, size: LatentSize) -> RowLimit:
        if (stage, size) not in self._limits:
            most = (
                self._default_unet_rows(size) if stage == "unet" else self._default_vae_batch(size)
            )
            self._limits[stage, size] = RowLimit(most, stage=STAGE_NAMES[stage])
        return self._limits[stage, size]

    def _default_unet_rows(self, size: LatentSize) -> int:
        """Where it is not given: of larger windows as many as have the pixels of the own ones."""
        if not self._is_auto_batch:
            return self._max_batch
        fitting = self._max_batch * prod(self._native_size) // prod(size)
        return max((rows for rows in bucket_sizes(self._max_batch) if rows <= fitting), default=1)

    def _default_vae_batch(self, size: LatentSize) -> int:
        if self._components.device.type != "cuda":
            return self._vae_batch
        return max(1, min(self._vae_batch, VAE_LATENTS // prod(size)))

    def _reduce_memory(self, stage: Stage, size: LatentSize, tried: int) -> None:
        """Makes the next try need less. Raises OutOfMemory where nothing is left to do."""
        self._drop_graphs()
        release_memory()
        if self._is_deterministic:
            raise OutOfMemory(
                f"{tried} rows do not fit the device in {STAGE_NAMES[stage]}, and a deterministic "
                "engine cannot go on with fewer; use a smaller max_batch"
            )
        if tried > 1:
            self._limit(stage, size).halve(tried)
        elif not self._modes.enable_fallback(stage):
            raise OutOfMemory(
                f"one window does not fit the device in {STAGE_NAMES[stage]}; use a smaller one"
            )

    def _drop_graphs(self) -> None:
        for forward in self._unet_runners.values():
            forward.drop_graphs()

    def _embed(self, text: str, size: LatentSize) -> Tensor:
        while (found := try_run(self._prompts.encode, text)) is None:
            self._reduce_memory("text_encoder", size, 1)
        return found

    def _encode(self, pictures: Iterable[Tensor]) -> Tensor:
        """N staged (3, H, W) float32 to (N, 2C, h, w) float32: mean and deviation."""
        self._modes.bring_to_device("vae")
        batch = torch.stack(self.copy_streams.upload(pictures))
        batch = batch.to(self._components.dtype, memory_format=torch.channels_last)
        posterior = self._components.vae.encode(batch).latent_dist
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)

    def _predict(self, rows: list[BatchRow]) -> Tensor:
        """(N, C, h, w) float32 for N rows"""
        kind = rows[0].region.forward_kind
        found = self._run_rows(kind, pad_to_bucket(rows, self._bucket_sizes()))[: len(rows)]
        return self._store_features(rows, found) if kind == "cache_write" else found

    def _run_rows(self, kind: ForwardKind, rows: list[BatchRow]) -> Tensor:
        self._modes.bring_to_device("unet")
        table = torch.stack([row.region.coefficients[: len(COMMON_COLUMNS)] for row in rows])
        divisor = table[:, COMMON_COLUMNS.index("divisor"), None, None, None]
        latents = torch.stack([row.region.row_latents(row) for row in rows]) / divisor
        fixed = torch.stack([row.region.row_conditioning(row) for row in rows])
        inputs = torch.cat([latents, fixed], dim=1)
        if kind == "cache_read":
            states = torch.stack([row.region.row_features(row) for row in rows])
            inputs = torch.cat([inputs.to(states.dtype), states], dim=1)
        timesteps = table[:, COMMON_COLUMNS.index("timestep")].contiguous()
        words = torch.cat([row.region.row_embedding(row) for row in rows])
        return self._run_unet(kind, inputs, timesteps, words)

    def _run_unet(
        self, kind: ForwardKind, inputs: Tensor, timesteps: Tensor, words: Tensor
    ) -> Tensor:
        return self._unet_runners[kind](
            inputs,
            timesteps,
            words,
            is_offloading=self._modes.is_offloading,
            is_attention_sliced=self._modes.is_slicing,
        )

    def _store_features(self, rows: list[BatchRow], found: Tensor) -> Tensor:
        """(N, C, h, w) of (N, C + state, h, w); copies, so that nothing holds the whole batch."""
        channels = self._components.latent_channels
        for row, state in zip(rows, found[:, channels:], strict=True):
            row.region.store_features(row, state.to(self._components.unet_dtype, copy=True))
        return found[:, :channels].clone()

    def _decode(self, latents: list[Tensor]) -> Tensor:
        """N of (C, h, w) float32 to (N, 3, H, W) float32"""
        self._modes.bring_to_device("vae")
        scaled = torch.stack(latents) / self._components.scaling_factor
        scaled = scaled.to(self._components.dtype)
        pictures: Tensor = self._components.vae.decode(scaled, return_dict=False)[0]
        return pictures.float()
