"""The image formats there are: one ImageFormat each, all that is known without loading a codec.

A new format is a module in shared/images/ that defines ``CODEC``, and one entry in ``FORMATS``.
This module imports neither numpy nor Pillow, so that the commands start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, kw_only=True)
class ImageFormat:
    """What the product needs to know of a format before it opens a file.

    name: Pillow's; the parameter ``format`` takes it in lower case.
    suffixes: lower case, with the dot; a result without a suffix of its own gets the first.
    signature: regular expression that a file's first bytes match.
    codec: the module in shared/images/ that defines ``CODEC``.
    modes: what it stores without loss, as ``DecodedImage.mode`` names it.
    metadata: what it carries besides pixels: exif, icc, xmp, dpi.
    has_quality: whether the parameter ``quality`` has an effect.
    """

    name: str
    suffixes: tuple[str, ...]
    content_type: str
    signature: bytes
    codec: str
    modes: tuple[str, ...]
    metadata: tuple[str, ...]
    has_quality: bool = False


_EIGHT_BITS = ("L", "LA", "RGB", "RGBA")
_SIXTEEN_BITS = ("I;16", "LA;16", "RGB;16", "RGBA;16")

FORMATS: Mapping[str, ImageFormat] = {
    format.name: format
    for format in (
        ImageFormat(
            name="JPEG",
            suffixes=(".jpg", ".jpeg", ".jpe", ".jfif"),
            content_type="image/jpeg",
            signature=rb"\xff\xd8\xff(?!\xf7)",  # FFF7 starts JPEG-LS
            codec="jpeg_format",
            modes=("L", "RGB", "CMYK"),
            metadata=("exif", "icc", "xmp", "dpi"),
            has_quality=True,
        ),
        ImageFormat(
            name="PNG",
            suffixes=(".png",),
            content_type="image/png",
            signature=rb"\x89PNG\r\n\x1a\n",
            codec="png_format",
            modes=("1", *_EIGHT_BITS, *_SIXTEEN_BITS),
            metadata=("exif", "icc", "xmp", "dpi"),
        ),
        ImageFormat(
            name="WEBP",
            suffixes=(".webp",),
            content_type="image/webp",
            signature=rb"RIFF....WEBP",
            codec="webp_format",
            modes=("RGB", "RGBA"),
            metadata=("exif", "icc", "xmp"),
            has_quality=True,
        ),
        ImageFormat(
            name="TIFF",
            suffixes=(".tif", ".tiff"),
            content_type="image/tiff",
            signature=rb"II[*+]\0|MM\0[*+]",
            codec="tiff_format",
            modes=("1", *_EIGHT_BITS, "CMYK", *_SIXTEEN_BITS),
            metadata=("exif", "icc", "xmp", "dpi"),
        ),
        ImageFormat(
            name="BMP",
            suffixes=(".bmp", ".dib"),
            content_type="image/bmp",
            signature=rb"BM",
            codec="bmp_format",
            modes=("1", "L", "RGB", "RGBA"),
            metadata=("dpi",),
        ),
    )
}

_BY_SUFFIX: Mapping[str, ImageFormat] = {
    suffix: format for format in FORMATS.values() for suffix in format.suffixes
}


def format_of(location: str) -> str | None:
    """The format that a file's name asks for, a key of ``FORMATS``; None if it names none."""
    format = _BY_SUFFIX.get(PurePosixPath(location).suffix.lower())
    return format.name if format else None


def content_type(location: str) -> str:
    """The media type for a file's name."""
    name = format_of(location)
    return FORMATS[name].content_type if name else "application/octet-stream"


def join_with_or(words: Iterable[str]) -> str:
    """``a, b or c``, for messages that name a choice."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


FORMAT_PARAMETERS = tuple(name.lower() for name in FORMATS)
SUFFIX_CHOICE = join_with_or(format.suffixes[0] for format in FORMATS.values())
