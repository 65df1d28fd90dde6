"""Copies between host and device that neither waits for; on the CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PendingDownload:
    """A tensor on its way to the host."""

    tensor: Tensor
    done_event: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The tensor on the host; waits without the interpreter's lock."""
        if self.done_event is not None:
            self.done_event.synchronize()
        return self.tensor


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Where the device can fetch it by itself: in pinned memory. For any thread."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CopyStreams:
    """One device's copies, each direction on a stream of its own. For one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._enqueued: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._up, self._down = new_stream(device), new_stream(device)

    def upload(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The staged tensors on the device; what is enqueued later waits for them there."""
        if self._device.type != "cuda":
            return list(tensors)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            found = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self._up)
        for tensor in found:
            tensor.record_stream(computing)
        return found

    def download(self, tensor: Tensor) -> PendingDownload:
        """Starts once what was enqueued before is done."""
        if self._device.type != "cuda":
            return PendingDownload(tensor=tensor, done_event=None)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            found.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._down)
            return PendingDownload(tensor=found, done_event=_record_event(self._down))

    def limit_run_ahead(self) -> None:
        """Before each forward: waits until only the last one is still running.

        The device always has the next one ready, and the host is never so far ahead that
        stopping or joining would take several steps.
        """
        if self._device.type != "cuda":
            return
        enqueued = _record_event(torch.cuda.current_stream(self._device))
        if self._enqueued is not None:
            self._enqueued.synchronize()
        self._enqueued = enqueued


def _record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Done once all that the stream holds now is; waiting for it leaves the core to others."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
