"""WebP files, read by their RIFF chunks (RFC 9649)."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import islice

from PIL import WebPImagePlugin

from shared.images import tiff_ifd
from shared.images.codec import Codec, Header, truncated
from shared.images.image import DecodedImage, Metadata, SourceEncoding

_EXIF = b"Exif\0\0"
_LOSSLESS_EFFORT = 90  # of 100
_MAX_CHUNKS = 10_000  # that are read; a file that is not animated has about five
_METHOD = 4  # of 0 (fast) to 6 (small)
_HAS_EXIF, _IS_ANIMATED = 0x08, 0x02  # flags of VP8X


def read_header(data: bytes) -> Header:
    """Raises ImageTruncated if the flags announce EXIF, which follows the pixels, in vain."""
    chunks = {name: data[start:end] for name, start, end in islice(_chunks(data), _MAX_CHUNKS)}
    flags = data[20] if data[12:16] == b"VP8X" else 0
    exif = chunks.get(b"EXIF", b"").removeprefix(_EXIF)
    if flags & _HAS_EXIF and not exif:
        raise truncated("WEBP")
    return Header(
        size=_size(data),
        orientation=tiff_ifd.read_orientation(exif),
        refusal="is animated; save one image per file" if flags & _IS_ANIMATED else "",
        bare=data,
        encoding=SourceEncoding(lossless=b"VP8L" in chunks),
        metadata=Metadata(
            exif=tiff_ifd.reset_orientation(exif),
            icc=chunks.get(b"ICCP", b""),
            xmp=chunks.get(b"XMP ", b""),
        ),
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


def encode(image: DecodedImage, quality: int | None) -> bytes:
    """Lossless unless a quality is given: libwebp cannot copy the blocks of a lossy file."""
    metadata = image.metadata
    buffer = io.BytesIO()
    image.to_pillow().save(
        buffer,
        "WEBP",
        lossless=quality is None,
        quality=quality or _LOSSLESS_EFFORT,
        method=_METHOD,
        exact=True,  # keep the colour of transparent pixels
        exif=metadata.exif,
        icc_profile=metadata.icc,
        xmp=metadata.xmp,
    )
    return buffer.getvalue()


CODEC = Codec(plugin=WebPImagePlugin.WebPImageFile, read_header=read_header, encode=encode)
