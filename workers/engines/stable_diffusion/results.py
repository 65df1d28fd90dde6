"""Results and errors of regions: a thread that waits for downloads and resolves the futures."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from shared.errors import (
    DeviceLost,
    EngineError,
    GateNotFinite,
    InpaintError,
    OutOfMemory,
    one_line,
)
from workers.engines.protocol import Pixels
from workers.engines.stable_diffusion.host_device_copy import CopyStreams, PendingDownload
from workers.engines.stable_diffusion.multidiffusion import count_windows
from workers.engines.stable_diffusion.oom import is_out_of_memory
from workers.engines.stable_diffusion.region_state import PreparedRegion, tensor_to_image


@dataclass(frozen=True, kw_only=True)
class FinishedRegion:
    """pixels: (H, W, 3) uint8. is_finite: one bool, False if a value is NaN or infinite."""

    prepared: PreparedRegion
    pixels: PendingDownload
    is_finite: PendingDownload


class FutureResolver:
    """Resolves regions' futures on its own thread, so that the device thread never waits."""

    def __init__(self) -> None:
        self._finished: SimpleQueue[FinishedRegion | None] = SimpleQueue()
        # daemon: a worker that exits without closing the engine must not hang on this thread.
        self._thread = threading.Thread(target=self._run, name="future resolver", daemon=True)
        self._thread.start()

    def resolve(self, prepared: PreparedRegion, image: Tensor, copy_streams: CopyStreams) -> None:
        """Start the download of (3, H, W) float32 in about -1 to 1; the thread does the rest."""
        # NaN in the latents reaches every pixel that the decoder computes from them.
        is_finite = torch.isfinite(image).all()
        self._finished.put(
            FinishedRegion(
                prepared=prepared,
                pixels=copy_streams.download(tensor_to_image(image)),
                is_finite=copy_streams.download(is_finite),
            )
        )

    def close(self) -> None:
        """Return once every future is resolved."""
        self._finished.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (finished := self._finished.get()) is not None:
            with fail_futures_on_error((finished.prepared,)):
                pixels, is_finite = finished.pixels.wait(), finished.is_finite.wait()
                check_finite(bool(is_finite))
                result = fill_uncovered(finished.prepared, pixels.numpy())
                finished.prepared.future.set_result(result)


def check_finite(is_finite: bool) -> None:
    """Raises GateNotFinite; half precision that overflows is the usual cause."""
    if not is_finite:
        raise GateNotFinite("the model returned NaN or infinite values; try another seed or dtype")


def fill_uncovered(prepared: PreparedRegion, pixels: Pixels) -> Pixels:
    """Return (H, W, 3): the pixels where windows lie, the region's own image elsewhere."""
    canvas, work = prepared.canvas, prepared.work
    # The canvas is 0 outside its windows, which would be grey pixels.
    covered = count_windows(canvas.pixel_size, canvas.pixel_windows)[0, 0].numpy() > 0
    return np.where(covered[..., None], pixels, work.image)


@contextmanager
def fail_futures_on_error(regions: Iterable[PreparedRegion]) -> Iterator[None]:
    """Set an exception on these regions' futures instead of propagating it.

    An exception that ended the thread would leave every other future unresolved for ever.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        for prepared in regions:
            if not prepared.future.done():
                prepared.future.set_exception(to_inpaint_error(error))


def to_inpaint_error(error: Exception) -> InpaintError:
    """Convert to OutOfMemory, DeviceLost or EngineError, which names the original exception."""
    if isinstance(error, InpaintError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("the device is out of memory; use a smaller window or max_batch")
    error_class = DeviceLost if isinstance(error, torch.AcceleratorError) else EngineError
    converted = error_class(f"{type(error).__name__}: {one_line(error, max_chars=300)}")
    converted.__cause__ = error
    return converted
