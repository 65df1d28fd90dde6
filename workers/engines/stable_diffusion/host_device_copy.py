"""Asynchronous copies between host and device; on the CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PendingDownload:
    """A tensor being copied to the host. done_event: None if there is nothing to wait for."""

    tensor: Tensor
    done_event: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Return the tensor on the host once it is complete; waits without holding the GIL."""
        if self.done_event is not None:
            self.done_event.synchronize()
        return self.tensor


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to pinned memory if the device is CUDA, so that an upload is asynchronous.

    Safe in any thread.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CopyStreams:
    """Copies to and from one device, each direction on a CUDA stream. For one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_enqueued: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._uploads, self._downloads = new_stream(device), new_stream(device)

    def upload(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Copy pinned tensors to the device; kernels launched later wait for them there."""
        if self._device.type != "cuda":
            return list(tensors)
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._uploads):
            uploaded = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        compute.wait_stream(self._uploads)
        for tensor in uploaded:
            # The allocator would otherwise reuse the memory while the compute stream reads it.
            tensor.record_stream(compute)
        return uploaded

    def download(self, tensor: Tensor) -> PendingDownload:
        """Start a copy to pinned memory once the kernels launched before are done."""
        if self._device.type != "cuda":
            return PendingDownload(tensor=tensor, done_event=None)
        self._downloads.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._downloads):
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            target.copy_(tensor, non_blocking=True)
            # As for uploads: keep the source's memory until this stream has read it.
            tensor.record_stream(self._downloads)
            return PendingDownload(tensor=target, done_event=_record_event(self._downloads))

    def limit_run_ahead(self) -> None:
        """Before each forward pass: wait until only the previous one is still running.

        The device always has its next pass enqueued, and the host is at most one pass ahead,
        so that an interruption or a new region does not wait for several steps.
        """
        if self._device.type != "cuda":
            return
        enqueued = _record_event(torch.cuda.current_stream(self._device))
        if self._last_enqueued is not None:
            self._last_enqueued.synchronize()
        self._last_enqueued = enqueued


def _record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event that is done once all work now in the stream is done."""
    # blocking: wait in the kernel instead of spinning, which would take a core from job threads.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
