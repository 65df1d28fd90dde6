"""A simulated GPU that only keeps time: calls return at once, and their results are ready later.

Like CUDA it runs behind the host. It is idle whenever the host enqueues a call after the previous
one has ended. The host's own work is real, down to the windows' pixels.
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

# TFLOP of SD2 for a window of 512 px: a UNet row, a row that reads the cache, VAE encode, decode.
UNET_ROW, CACHED_ROW, VAE_ENCODING, VAE_DECODING = 0.804, 0.063, 1.12, 2.52


@dataclass
class Clock:
    """free_at: when the device will have run all calls. idle, gaps: seconds without a call."""

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
        """Idle time / time from the first call's start to the last call's end, 0 to 1."""
        return 0.0 if self.first is None else self.idle / (self.free_at - self.first)


@dataclass(frozen=True, kw_only=True)
class FakeEvent:
    """Stands for a CUDA event."""

    at: float

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))


class SimulatedCopyStreams(CopyStreams):
    """Waits for the device wherever CopyStreams does."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(torch.device("cpu"))
        self._clock = clock
        self._last: FakeEvent | None = None

    def download(self, tensor: Tensor) -> PendingDownload:
        done_event: Any = FakeEvent(at=self._clock.free_at)
        return PendingDownload(tensor=tensor, done_event=done_event)

    def limit_run_ahead(self) -> None:
        enqueued = FakeEvent(at=self._clock.free_at)
        if self._last is not None:
            self._last.synchronize()
        self._last = enqueued


def simulate(engine: Any, *, tflops: float) -> Clock:
    """Replace the engine's model by one that computes nothing and takes the device's time."""
    clock, components = Clock(), engine._components

    def unet(kind: ForwardKind, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        clock.enqueue(len(sample) * (CACHED_ROW if kind == "cache_read" else UNET_ROW) / tflops)
        channels = feature_channels(components.unet) if kind == "cache_write" else 0
        return (torch.zeros(len(sample), components.latent_channels + channels, *sample.shape[2:]),)

    def encode(images: Tensor) -> Any:
        clock.enqueue(len(images) * VAE_ENCODING / tflops)
        sides = [side // components.vae_factor for side in images.shape[2:]]
        moments = torch.zeros(len(images), components.latent_channels, *sides)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=moments, std=moments))

    def decode(latents: Tensor, **_: Any) -> tuple[Tensor]:
        clock.enqueue(len(latents) * VAE_DECODING / tflops)
        sides = [side * components.vae_factor for side in latents.shape[2:]]
        return (torch.zeros(len(latents), 3, *sides),)

    for kind, runner in engine._denoiser._unet_runners.items():
        runner._model.forward = partial(unet, kind)
    components.vae.encode, components.vae.decode = encode, decode
    engine._denoiser.copy_streams = SimulatedCopyStreams(clock)
    return clock


def feature_channels(unet: Any) -> int:
    """Channels of the features that a row caches."""
    return int(unet.up_blocks[-1].resnets[-1].in_channels - unet.conv_in.out_channels)
