"""Classical inpainting with OpenCV: no model, no prompt; for thin marks on plain ground."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import cv2
import numpy as np

from shared.errors import EngineError, InpaintError, MaskError, OutOfMemory, Released
from shared.params import OpenCVMethod
from workers.engines.options import EngineOptions
from workers.engines.protocol import Pixels, RegionWork

METHODS: Mapping[OpenCVMethod, int] = {
    "telea": cv2.INPAINT_TELEA,
    "navier-stokes": cv2.INPAINT_NS,
}
NO_MEMORY = -4  # cv::Error::StsNoMem, which the Python bindings do not name


def load(name: str, options: EngineOptions) -> OpenCVEngine:  # noqa: ARG001 - has no options
    return OpenCVEngine()


class OpenCVEngine:
    """Telea's fast marching method (2004) or Navier-Stokes (Bertalmio et al. 2001).

    Runs in the caller's thread: ``submit`` returns a finished future. A region is filled in one
    piece; its windows are ignored.
    """

    def __init__(self) -> None:
        # The job threads already use all cores, and cv2.inpaint is single-threaded.
        cv2.setNumThreads(1)
        self._closed = False

    @property
    def name(self) -> str:
        return "opencv"

    @property
    def revision(self) -> str:
        """``opencv 5.0.0``."""
        return f"opencv {cv2.__version__}"

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def max_batch(self) -> int:
        return 1

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Fill the region; the future raises MaskError, EngineError or the stop reason."""
        future: Future[Pixels] = Future()
        future.set_running_or_notify_cancel()
        try:
            if self._closed:
                raise Released("the engine is closed")
            work.interruption.check()
            future.set_result(fill(work))
        except InpaintError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Later submissions raise Released."""
        self._closed = True


def fill(work: RegionWork) -> Pixels:
    """Fill the masked pixels: (H, W, 3) uint8 RGB; unmasked pixels are unchanged.

    Raises MaskError if all pixels are masked, EngineError, OutOfMemory.
    """
    image, mask = np.ascontiguousarray(work.image), np.ascontiguousarray(work.mask)
    if mask.all():
        # cv2.inpaint would return the image unchanged, with the mark.
        raise MaskError("the mask covers the whole region; OpenCV needs pixels around it")
    method = METHODS[work.params.opencv_method]
    try:
        filled = cv2.inpaint(image, mask, float(work.params.opencv_radius), method)
    except cv2.error as error:
        error_class = OutOfMemory if error.code == NO_MEMORY else EngineError
        raise error_class(f"opencv: {error.err} ({error.func})") from error
    return np.asarray(filled, dtype=np.uint8)
