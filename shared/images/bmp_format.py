"""BMP files: besides pixels they hold only a size and a resolution."""

from __future__ import annotations

import io
import struct

from PIL import BmpImagePlugin, Image

from shared.images.codec import Codec, Header
from shared.images.image import DecodedImage, Metadata

_OLDEST_BYTES = 12  # of a BITMAPCOREHEADER, which has 16-bit sizes
_V4_BYTES = 108
_BITFIELDS = 3
_MASKS = (0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)  # red, green, blue, alpha
_METRES_PER_INCH = 0.0254


def read_header(data: bytes) -> Header:
    dpi = None
    if int.from_bytes(data[14:18], "little") == _OLDEST_BYTES:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
        x, y = struct.unpack_from("<ii", data, 38)  # pixels per metre
        dpi = (x * _METRES_PER_INCH, y * _METRES_PER_INCH) if x > 0 and y > 0 else None
    # A negative height says that rows are stored from the top down.
    return Header(size=(width, abs(height)), bare=data, metadata=Metadata(dpi=dpi))


def encode(image: DecodedImage, _quality: int | None) -> bytes:
    if image.mode == "RGBA":
        return _encode_with_alpha(image)
    return encode_indexed(image.to_pillow(), image)


def encode_indexed(indexed: Image.Image, image: DecodedImage) -> bytes:
    buffer = io.BytesIO()
    indexed.save(buffer, "BMP", dpi=image.metadata.dpi or (0, 0))
    return buffer.getvalue()


def _encode_with_alpha(image: DecodedImage) -> bytes:
    """With a BITMAPV4HEADER, which declares the alpha channel; Pillow's header does not."""
    pixels = image.pixels[::-1, :, [2, 1, 0, 3]].tobytes()
    x, y = (round(dots / _METRES_PER_INCH) for dots in image.metadata.dpi or (0, 0))
    width, height = image.size
    start = 14 + _V4_BYTES
    file = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
    size = struct.pack("<IiiHH", _V4_BYTES, width, height, 1, 32)
    storage = struct.pack("<IIiiII", _BITFIELDS, len(pixels), x, y, 0, 0)
    colours = struct.pack("<4I4s48x", *_MASKS, b"BGRs")
    return file + size + storage + colours + pixels


CODEC = Codec(
    plugin=BmpImagePlugin.BmpImageFile,
    read_header=read_header,
    encode=encode,
    encode_indexed=encode_indexed,
)
