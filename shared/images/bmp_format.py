"""BMP files: size and resolution are all that they say besides their pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from shared.images.header import Header
from shared.images.image import Metadata

_OLDEST_BYTES = 12  # of a header with 16-bit sizes
_V4_BYTES = 108
_BITFIELDS = 3
_MASKS = (0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)  # red, green, blue, alpha


def read(data: bytes) -> Header:
    dpi = None
    if int.from_bytes(data[14:18], "little") == _OLDEST_BYTES:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
        across, down = struct.unpack_from("<ii", data, 38)
        dpi = (across * 0.0254, down * 0.0254) if across > 0 and down > 0 else None
    return Header(format="BMP", size=(width, abs(height)), bare=data, dpi=dpi)


def write(image: Image.Image, metadata: Metadata) -> bytes:
    if image.mode == "RGBA":
        return _with_alpha(image, metadata)
    buffer = io.BytesIO()
    image.save(buffer, "BMP", dpi=metadata.dpi or (0, 0))
    return buffer.getvalue()


def _with_alpha(image: Image.Image, metadata: Metadata) -> bytes:
    """With a header of version 4, which names the alpha channel; Pillow's does not."""
    pixels = np.asarray(image)[::-1, :, [2, 1, 0, 3]].tobytes()
    across, down = (round(dots / 0.0254) for dots in metadata.dpi or (0, 0))
    start = 14 + _V4_BYTES
    file = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    size = struct.pack("<IiiHH", _V4_BYTES, image.width, image.height, 1, 32)
    encoding = struct.pack("<IIiiII", _BITFIELDS, len(pixels), across, down, 0, 0)
    colours = struct.pack("<4I4s48x", *_MASKS, b"BGRs")
    return file + size + encoding + colours + pixels
