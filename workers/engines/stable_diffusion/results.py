"""Finished pictures on their way to whoever waits for them, off the device thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from shared.errors import DeviceLost, EngineError, GateError, InpaintError, OutOfMemory
from workers.engines.protocol import Pixels
from workers.engines.stable_diffusion.host_device_copy import CopyStreams, PendingDownload
from workers.engines.stable_diffusion.multidiffusion import count_windows
from workers.engines.stable_diffusion.oom import is_out_of_memory
from workers.engines.stable_diffusion.region_state import PreparedRegion, tensor_to_image


@dataclass(frozen=True, kw_only=True)
class FinishedRegion:
    """pixels: (H, W, 3) uint8. finite: one bool, False where the model made no numbers."""

    prepared: PreparedRegion
    pixels: PendingDownload
    finite: PendingDownload


class FutureResolver:
    """Takes finished regions from the device thread and answers their futures."""

    def __init__(self) -> None:
        self._parcels: SimpleQueue[FinishedRegion | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def send(self, prepared: PreparedRegion, picture: Tensor, copy_streams: CopyStreams) -> None:
        """picture: (3, H, W) float32 in about -1 to 1, on the device."""
        finite = torch.isfinite(picture).all()  # latents that are no numbers end here, too
        self._parcels.put(
            FinishedRegion(
                prepared=prepared,
                pixels=copy_streams.download(tensor_to_image(picture)),
                finite=copy_streams.download(finite),
            )
        )

    def close(self) -> None:
        """Returns once everything sent is delivered."""
        self._parcels.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (parcel := self._parcels.get()) is not None:
            with fail_futures_on_error((parcel.prepared,)):
                pixels, finite = parcel.pixels.wait(), parcel.finite.wait()
                picture = fill_uncovered(parcel.prepared, pixels.numpy(), is_finite=bool(finite))
                parcel.prepared.future.set_result(picture)


def fill_uncovered(prepared: PreparedRegion, pixels: Pixels, *, is_finite: bool) -> Pixels:
    """The pixels where windows lie, the region's own elsewhere; both (H, W, 3).

    Raises GateError for a picture of no numbers, as half precision that overflows leaves it.
    """
    canvas, work = prepared.canvas, prepared.work
    covered = count_windows(canvas.pixel_size, canvas.pixel_windows)[0, 0].numpy() > 0
    if not is_finite:
        raise GateError(
            "the model computed values that are no numbers; try another seed or dtype",
            code="gate_not_finite",
        )
    return np.where(covered[..., None], pixels, work.image)


@contextmanager
def fail_futures_on_error(prepared_regions: Iterable[PreparedRegion]) -> Iterator[None]:
    """Whatever is raised inside goes to these regions' futures, and no further.

    An exception that left its thread would leave every future waiting for ever.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        for prepared in prepared_regions:
            if not prepared.future.done():
                prepared.future.set_exception(to_inpaint_error(error))


def to_inpaint_error(error: Exception) -> InpaintError:
    """OutOfMemory, or EngineError naming the exception; DeviceLost needs a new process."""
    if isinstance(error, InpaintError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("the device's memory ran out; use a smaller window or max_batch")
    text = " ".join(str(error).split())[:300]
    kind = DeviceLost if isinstance(error, torch.AcceleratorError) else EngineError
    product_error = kind(f"{type(error).__name__}: {text}")
    product_error.__cause__ = error
    return product_error
