"""WebP files, read by their chunks (RFC 9649)."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image

from shared.images import tiff_ifd as tags
from shared.images.header import Header, truncated
from shared.images.image import DecodedImage

_EXIF = b"Exif\0\0"
_EFFORT = 90  # of 100, for files without loss


def read(data: bytes) -> Header:
    """Raises ImageError where EXIF, which stands after the pixels, is announced but not there."""
    first = data[12:16]
    found = {name: data[start:end] for name, start, end in _chunks(data)}
    exif = found.get(b"EXIF", b"").removeprefix(_EXIF)
    if first == b"VP8X" and data[20] & 0x08 and not exif:
        raise truncated("WEBP")
    return Header(
        format="WEBP",
        size=_size(data),
        orientation=tags.orientation(exif),
        frames=2 if first == b"VP8X" and data[20] & 0x02 else 1,
        lossless=b"VP8L" in found,
        bare=data,
        exif=tags.reset_orientation(exif),
        icc=found.get(b"ICCP", b""),
        xmp=found.get(b"XMP ", b""),
    )


def _size(data: bytes) -> tuple[int, int]:
    """RFC 9649, sections 2.5 to 2.7."""
    first = data[12:16]
    if first == b"VP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if first == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the body of each chunk that begins within the data."""
    start = 12
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        yield data[start : start + 4], start + 8, start + 8 + size
        start += 8 + size + size % 2


def write(image: Image.Image, picture: DecodedImage, quality: int | None) -> bytes:
    """Without loss unless a quality asks for it: libwebp cannot copy blocks of a lossy file."""
    metadata = picture.metadata
    buffer = io.BytesIO()
    image.save(
        buffer,
        "WEBP",
        lossless=quality is None,
        quality=quality or _EFFORT,
        method=4,
        exact=True,
        exif=metadata.exif,
        icc_profile=metadata.icc,
        xmp=metadata.xmp,
    )
    return buffer.getvalue()
