"""Recognising a picture file by its first bytes, and reading its header; nothing is decoded.

Pillow is later given a file without its metadata, so that no damaged or oversized tag can
warn, fail or cost anything; the raw bytes go back on encoding.
"""

from __future__ import annotations

import re
import struct

from shared.errors import ImageError
from shared.images import bmp_format, jpeg_format, png_format, tiff_format, webp_format
from shared.images import tiff_ifd as tags
from shared.images.header import FORMATS, Header, truncated

ALLOWED = "use JPEG, PNG, WebP, TIFF or BMP"


def read_header(data: bytes) -> Header:
    """Reads as much of the file as there is; raises ImageError where the size is not in it."""
    name = recognise(data)
    try:
        header = _READERS[name](data)
    except (struct.error, IndexError, tags.DirectoryError) as error:
        raise truncated(name) from error
    if min(header.size) < 1:
        raise ImageError(f"the {name} header says {header.size[0]}x{header.size[1]} pixels")
    return header


def recognise(data: bytes) -> str:
    """One of FORMATS; raises ImageError naming what was found instead."""
    if not data:
        raise ImageError("the file is empty (0 bytes); upload it again")
    for name, pattern in _SIGNATURES:
        if pattern.match(data):
            if name in FORMATS:
                return name
            raise ImageError(f"the file is {name}; {ALLOWED}")
    raise ImageError(f"the file is no picture this program knows (starts {data[:8]!r}); {ALLOWED}")


_SIGNATURES: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("JPEG-LS", rb"\xff\xd8\xff\xf7"),
        ("JPEG", rb"\xff\xd8\xff"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBP"),
        ("TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("GIF", rb"GIF8"),
        ("a Photoshop document (PSD)", rb"8BPS"),
        ("AVIF", rb"....ftypavi"),
        ("HEIC", rb"....ftyp(hei|hev|mif|msf)"),
        ("a video (MP4)", rb"....ftyp"),
        ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
        ("PDF", rb"%PDF"),
        ("PostScript", rb"%!PS"),
        ("a Windows icon", rb"\0\0[\x01\x02]\0"),
        ("a ZIP archive", rb"PK\x03\x04"),
        ("gzip data", rb"\x1f\x8b"),
        ("a Git LFS pointer, not the picture itself", rb"version https://git-lfs"),
        (
            "an HTML page",
            rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?(?i:<(!doctype html|html|head|body))",
        ),
        ("an SVG drawing", rb"(\xef\xbb\xbf)?\s*(?i:<(svg|.{0,1000}<svg))"),
        ("XML", rb"(\xef\xbb\xbf)?\s*<[?!a-zA-Z]"),
        ("JSON", rb"\s*[{\[]\s*[\"{\[\]}]"),
        ("BMP", rb"BM"),
    )
)


_READERS = {
    "JPEG": jpeg_format.read,
    "PNG": png_format.read,
    "WEBP": webp_format.read,
    "TIFF": tiff_format.read,
    "BMP": bmp_format.read,
}
