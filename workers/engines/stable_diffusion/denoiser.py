"""The model's operations on batches: VAE encode, UNet forward pass, scheduler step, VAE decode."""

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

MAX_ROWS = {"cuda": 64, "cpu": 8}  # more rows are no faster
DETERMINISTIC_BATCH = 8
VAE_BATCH = 8
# Latents of one VAE batch. Above it the decoder's tensors outgrow 32-bit indices.
MAX_VAE_LATENTS = 8 * 64 * 64
STAGE_NAMES = {"unet": "the UNet", "vae": "the VAE", "text_encoder": "the text encoder"}


class Denoiser:
    """Runs the model for the device thread; the items of one call share a window size.

    Latents and images between the calls are float32 whatever the model's dtype, so that the
    rounding of many small scheduler steps does not add up.
    """

    def __init__(self, components: Components, options: EngineOptions) -> None:
        """Place the model on its device and warm it up. Raises OutOfMemory if it does not fit."""
        self.copy_streams = CopyStreams(components.device)
        self._components = components
        self._modes = MemoryModes(components, options.memory)
        self._is_deterministic = options.deterministic
        self._is_auto_batch = options.max_batch is None and not options.deterministic
        default = DETERMINISTIC_BATCH if options.deterministic else MAX_ROWS[components.device.type]
        self._max_batch = options.max_batch or default
        self._prompts = PromptEncoder(
            components, before_encode=lambda: self._modes.bring_to_device("text_encoder")
        )
        self._unet_runners = _build_unet_runners(components, options)
        is_on_cuda = components.device.type == "cuda"
        # On the CPU a batch of images is no faster, and its rounding depends on the batch's size.
        is_single = options.deterministic or not is_on_cuda
        self._vae_batch = options.vae_batch or (1 if is_single else VAE_BATCH)
        self._limits: dict[tuple[Stage, LatentSize], RowLimit] = {}
        if is_on_cuda and self._is_auto_batch:
            self._find_max_batch()
        if is_on_cuda or self._unet_runners["full"].needs_buckets:
            self._warm_up()

    @property
    def max_batch(self) -> int:
        """The most rows of one UNet forward pass at any window size."""
        return self._max_batch

    def max_rows(self, size: LatentSize) -> int:
        """The most rows of one UNet forward pass at this window size, now."""
        return self._limit("unet", size).rows

    def max_vae_images(self, size: LatentSize) -> int:
        """The most images of one VAE batch at this window size, now."""
        return self._limit("vae", size).rows

    def memory_report(self, size: LatentSize) -> str:
        """The reduced batch and the memory modes, for the record: ``batch 2, vae_slicing``."""
        limit = self._limit("unet", size)
        reduced = [f"batch {limit.rows}"] if limit.is_reduced else []
        return ", ".join([*reduced, *self._modes.active])

    def start(self, prepared_regions: list[PreparedRegion]) -> list[DenoisingRegion]:
        """Encode the images and prompts and compute the first latents.

        Raises OutOfMemory if one window does not fit.
        """
        size = prepared_regions[0].window_size
        moments = run_in_chunks(
            self._encode,
            [image for prepared in prepared_regions for image in prepared.vae_inputs],
            self._limit("vae", size),
            lambda tried: self._reduce_memory("vae", size, tried),
        )
        return [
            start_denoising(
                prepared,
                moments=torch.stack(list(islice(moments, len(prepared.vae_inputs)))),
                embeddings=[self._embed(prompt, size) for prompt in prepared.prompts],
                scaling_factor=self._components.scaling_factor,
                copy_streams=self.copy_streams,
            )
            for prepared in prepared_regions
        ]

    def predict(self, rows: list[BatchRow]) -> list[Tensor]:
        """Run one UNet forward pass: noise (C, h, w) float32 for each row, all of one kind.

        A cache_write pass stores the features of its rows' regions. Returns an empty list if
        memory ran out; the next call then needs less. Raises OutOfMemory if nothing more can be
        reduced.
        """
        if self._modes.disable_fallback():
            # The graphs were captured with other attention processors or addresses of weights.
            self._drop_graphs()
        self.copy_streams.limit_run_ahead()
        predictions = try_run(self._predict, rows)
        if predictions is None:
            self._reduce_memory("unet", rows[0].region.prepared.window_size, len(rows))
            return []
        return list(predictions.unbind())

    def step(self, regions: list[DenoisingRegion]) -> None:
        """Apply guidance and one scheduler step to regions of one group of ``group_by_formula``."""
        predictions = [region.merged_predictions() for region in regions]
        unconditional, conditional = (torch.cat(batch) for batch in zip(*predictions, strict=True))
        table_rows = torch.stack([region.coefficients for region in regions])
        noise = apply_guidance(table_rows, unconditional, conditional)
        latents = torch.cat([region.latents for region in regions])
        sampler = regions[0].prepared.sampler
        if (formula := sampler.table.formula) is None:
            regions[0].complete_step(sampler.step(noise, regions[0].step, latents))
            return
        histories = zip(*(region.history for region in regions), strict=True)
        history = tuple(torch.cat(batch) for batch in histories)
        coefficients = table_rows[:, len(COMMON_COLUMNS) :]
        latents, history = formula.step(coefficients, latents, noise, history)
        by_region = [torch.split(batch, 1) for batch in (latents, *history)]
        for region, *tensors in zip(regions, *by_region, strict=True):
            region.complete_step(*tensors)

    def decode(self, regions: list[DenoisingRegion]) -> list[Tensor]:
        """Decode each region to (3, H, W) float32 in about -1 to 1. Raises OutOfMemory.

        Windows are decoded whole: the decoder's attention and group normalisation read every
        pixel, so that half a window would decode differently. A region of many windows needs
        memory for its pixels and for the windows of two VAE batches.
        """
        size = regions[0].prepared.window_size
        windows = run_in_chunks(
            self._decode,
            [
                crop(region.latents[0], window)
                for region in regions
                for window in region.prepared.canvas.windows
            ],
            self._limit("vae", size),
            lambda tried: self._reduce_memory("vae", size, tried),
        )
        canvases = [region.prepared.canvas for region in regions]
        return [
            blend_windows(
                islice(windows, len(canvas.windows)), canvas.pixel_size, canvas.pixel_windows
            )
            for canvas in canvases
        ]

    @property
    def _native_size(self) -> LatentSize:
        """The window size that the UNet was trained on."""
        side = int(self._components.unet.config.sample_size)
        return side, side

    def _find_max_batch(self) -> None:
        """Try the bucket sizes, the largest first, until UNet and VAE fit at the same time."""
        size = self._native_size
        fitting = (
            rows
            for rows in reversed(bucket_sizes(self._max_batch))
            if self._forward_fits(rows, size) and self._decode_fits(size)
        )
        self._max_batch = next(fitting, 1)

    def _warm_up(self) -> None:
        """Autotune, compile and capture graphs for every bucket before any job waits for it."""
        size = self._native_size
        # The largest first: the first forward pass of a window size is the one that is autotuned.
        for rows in reversed(self._bucket_sizes()):
            self._forward_fits(rows, size)
        self._decode_fits(size)

    def _forward_fits(self, rows: int, size: LatentSize) -> bool:
        """Whether a forward pass of ``rows`` rows fits; its graph is kept."""
        device = self._components.device
        channels = 2 * self._components.latent_channels + 1
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(rows, channels, *size, generator=generator)
        embeddings = self._embed("", size).expand(rows, -1, -1).contiguous()
        self._modes.bring_to_device("unet")

        def run(sample: Tensor) -> Tensor:
            # Any timestep: the time of a pass does not depend on it.
            timesteps = torch.full((rows,), 500.0, device=device)
            return self._run_unet("full", sample, timesteps, embeddings)

        fits = try_run(run, sample.to(device)) is not None
        if not fits:
            self._drop_graphs()
            release_memory()
        return fits

    def _decode_fits(self, size: LatentSize) -> bool:
        """Whether the VAE fits beside the last forward pass's graph; halves its batch if needed."""
        components, limit = self._components, self._limit("vae", size)
        latents = torch.zeros(components.latent_channels, *size, device=components.device)
        # limit.halve, not _reduce_memory: no fallback while a smaller UNet batch may do.
        while try_run(self._decode, [latents] * limit.rows) is None:
            release_memory()
            if limit.rows == 1:
                # The next try has a smaller UNet batch, so the VAE's starts from the default.
                del self._limits["vae", size]
                self._drop_graphs()
                return False
            limit.halve(limit.rows)
        return True

    def _bucket_sizes(self) -> tuple[int, ...]:
        """The batch sizes to pad to; empty if a batch of any size may run."""
        if self._is_deterministic:
            return (self._max_batch,)
        return bucket_sizes(self._max_batch) if self._unet_runners["full"].needs_buckets else ()

    def _limit(self, stage: Stage, size: LatentSize) -> RowLimit:
        if (stage, size) not in self._limits:
            default = self._default_unet_rows if stage == "unet" else self._default_vae_batch
            self._limits[stage, size] = RowLimit(default(size), stage=STAGE_NAMES[stage])
        return self._limits[stage, size]

    def _default_unet_rows(self, size: LatentSize) -> int:
        """A measured batch is scaled down for larger windows, so that its pixels stay the same."""
        if not self._is_auto_batch:
            return self._max_batch
        fitting = self._max_batch * prod(self._native_size) // prod(size)
        return max((rows for rows in bucket_sizes(self._max_batch) if rows <= fitting), default=1)

    def _default_vae_batch(self, size: LatentSize) -> int:
        if self._components.device.type != "cuda":
            return self._vae_batch
        return max(1, min(self._vae_batch, MAX_VAE_LATENTS // prod(size)))

    def _reduce_memory(self, stage: Stage, size: LatentSize, tried: int) -> None:
        """After running out of memory: halve the batch, or turn on a memory mode at one row.

        Raises OutOfMemory if nothing more can be reduced.
        """
        # Graphs hold memory for their whole batch; offloading also moves the weights they refer to.
        self._drop_graphs()
        release_memory()
        if self._is_deterministic:
            raise OutOfMemory(
                f"{tried} rows do not fit the device in {STAGE_NAMES[stage]}, and a deterministic "
                "engine cannot continue with fewer; use a smaller max_batch"
            )
        if tried > 1:
            self._limit(stage, size).halve(tried)
        elif not self._modes.enable_fallback(stage):
            raise OutOfMemory(
                f"one window does not fit the device in {STAGE_NAMES[stage]}; use a smaller one"
            )

    def _drop_graphs(self) -> None:
        for runner in self._unet_runners.values():
            runner.drop_graphs()

    def _embed(self, prompt: str, size: LatentSize) -> Tensor:
        while (embedding := try_run(self._prompts.encode, prompt)) is None:
            self._reduce_memory("text_encoder", size, 1)
        return embedding

    def _encode(self, images: Iterable[Tensor]) -> Tensor:
        """N pinned (3, H, W) float32 to (N, 2C, h, w) float32: mean and standard deviation."""
        self._modes.bring_to_device("vae")
        batch = torch.stack(self.copy_streams.upload(images))
        batch = batch.to(self._components.dtype, memory_format=torch.channels_last)
        posterior = self._components.vae.encode(batch).latent_dist
        # diffusers samples in the model's dtype; here the noise stays float32 on every device.
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)

    def _predict(self, rows: list[BatchRow]) -> Tensor:
        """(N, C, h, w) float32 for N rows"""
        kind = rows[0].region.forward_kind
        padded = pad_to_bucket(rows, self._bucket_sizes())
        output = self._run_rows(kind, padded)[: len(rows)]
        return self._store_features(rows, output) if kind == "cache_write" else output

    def _run_rows(self, kind: ForwardKind, rows: list[BatchRow]) -> Tensor:
        """Assemble the UNet's inputs from the rows and run it."""
        self._modes.bring_to_device("unet")
        columns = len(COMMON_COLUMNS)
        table_rows = torch.stack([row.region.coefficients[:columns] for row in rows])
        divisor = table_rows[:, COMMON_COLUMNS.index("input_divisor"), None, None, None]
        latents = torch.stack([row.region.row_latents(row) for row in rows]) / divisor
        conditioning = torch.stack([row.region.row_conditioning(row) for row in rows])
        sample = torch.cat([latents, conditioning], dim=1)
        if kind == "cache_read":
            features = torch.stack([row.region.row_features(row) for row in rows])
            sample = torch.cat([sample.to(features.dtype), features], dim=1)
        timesteps = table_rows[:, COMMON_COLUMNS.index("timestep")].contiguous()
        embeddings = torch.cat([row.region.row_embedding(row) for row in rows])
        return self._run_unet(kind, sample, timesteps, embeddings)

    def _run_unet(
        self, kind: ForwardKind, sample: Tensor, timesteps: Tensor, embeddings: Tensor
    ) -> Tensor:
        return self._unet_runners[kind](
            sample,
            timesteps,
            embeddings,
            is_offloading=self._modes.is_offloading,
            is_attention_sliced=self._modes.is_slicing,
        )

    def _store_features(self, rows: list[BatchRow], output: Tensor) -> Tensor:
        """Split (N, C + features, h, w): store the features, return the noise (N, C, h, w)."""
        channels = self._components.latent_channels
        # Copies: a view would keep the whole batch's output in memory.
        for row, features in zip(rows, output[:, channels:], strict=True):
            copied = features.to(self._components.unet_dtype, copy=True)
            row.region.store_features(row, copied)
        return output[:, :channels].clone()

    def _decode(self, latents: list[Tensor]) -> Tensor:
        """N of (C, h, w) float32 to (N, 3, H, W) float32"""
        self._modes.bring_to_device("vae")
        scaled = torch.stack(latents) / self._components.scaling_factor
        scaled = scaled.to(self._components.dtype)
        images: Tensor = self._components.vae.decode(scaled, return_dict=False)[0]
        return images.float()


def _build_unet_runners(
    components: Components, options: EngineOptions
) -> dict[ForwardKind, UNetRunner]:
    pool = GraphPool()
    return {
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
