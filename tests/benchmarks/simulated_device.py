"""A GPU that only keeps time: calls return at once, and what they computed is there later.

As CUDA does, it runs behind the host: it is idle where the host enqueues its next call after the
last one's end. The host's own work is real, down to the windows' pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from workers.engines.stable_diffusion.deepcache import ForwardKind
from workers.engines.stable_diffusion.host_device_copy import CopyStreams, PendingDownload

# TFLOP of SD2's parts for a window of 512 px: a UNet row, one that reuses, an encoding, a decoding.
UNET_ROW, REUSING_ROW, VAE_ENCODING, VAE_DECODING = 0.804, 0.063, 1.12, 2.52


@dataclass
class Clock:
    """When the device is done with what was enqueued; seconds."""

    free_at: float = 0.0
    first: float | None = None
    idle: float = 0.0
    gaps: list[float] = field(default_factory=list)

    def enqueue(self, seconds: float) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first = self.free_at = now
        gap = max(0.0, now - self.free_at)
        self.idle += gap
        self.gaps.append(gap)
        self.free_at = max(now, self.free_at) + seconds

    @property
    def idle_share(self) -> float:
        """Of the time from the first call's start to the last one's end, 0 to 1."""
        return 0.0 if self.first is None else self.idle / (self.free_at - self.first)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Stands for a CUDA event."""

    at: float

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))


class SimulatedTransfer(CopyStreams):
    """Waits for the device where the real one would."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(torch.device("cpu"))
        self._clock = clock
        self._last: Mark | None = None

    def download(self, tensor: Tensor) -> PendingDownload:
        done_event: Any = Mark(at=self._clock.free_at)
        return PendingDownload(tensor=tensor, done_event=done_event)

    def limit_run_ahead(self) -> None:
        enqueued = Mark(at=self._clock.free_at)
        if self._last is not None:
            self._last.synchronize()
        self._last = enqueued


def simulate(engine: Any, *, tflops: float) -> Clock:
    """The diffusion engine's model from now on computes nothing, and takes a device's time."""
    clock, parts = Clock(), engine._components

    def unet(kind: ForwardKind, inputs: Tensor, *given: Any, **named: Any) -> tuple[Tensor]:
        clock.enqueue(len(inputs) * (REUSING_ROW if kind == "cache_read" else UNET_ROW) / tflops)
        channels = state_channels(parts.unet) if kind == "cache_write" else 0
        return (torch.zeros(len(inputs), parts.latent_channels + channels, *inputs.shape[2:]),)

    def encode(pictures: Tensor) -> Any:
        clock.enqueue(len(pictures) * VAE_ENCODING / tflops)
        sides = [side // parts.vae_factor for side in pictures.shape[2:]]
        moments = torch.zeros(len(pictures), parts.latent_channels, *sides)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=moments, std=moments))

    def decode(latents: Tensor, **named: Any) -> tuple[Tensor]:
        clock.enqueue(len(latents) * VAE_DECODING / tflops)
        sides = [side * parts.vae_factor for side in latents.shape[2:]]
        return (torch.zeros(len(latents), 3, *sides),)

    for kind, forward in engine._denoiser._unet_runners.items():
        forward._model.forward = partial(unet, kind)
    parts.vae.encode, parts.vae.decode = encode, decode
    engine._denoiser.copy_streams = SimulatedTransfer(clock)
    return clock


def state_channels(unet: Any) -> int:
    """Of what a row keeps for the steps that reuse it."""
    return int(unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels)
