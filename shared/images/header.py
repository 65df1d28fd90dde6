"""What a picture file says about itself before its pixels are decoded."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from shared.errors import ImageTruncated

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

# What Pillow's and imagecodecs' decoders raise on damaged data, besides OSError.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, struct.error, zlib.error, RuntimeError),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself before its pixels are decoded.

    size: (width, height) as stored; orientation 1 to 8 says how it is to be shown.
    refusal: why the pixels cannot be kept exactly, if so, with the remedy. bare: the file
    without its metadata. deep: 16 bits a channel and more than plain grey, which Pillow would
    cut to eight. key: PNG's transparent colour, in the file's depth.
    segments: metadata in the format's own framing, upright, ready to be put back.
    """

    format: str
    size: tuple[int, int]
    orientation: int = 1
    frames: int = 1
    refusal: str = ""
    lossless: bool = True
    progressive: bool = False
    deep: bool = False
    key: tuple[int, ...] = ()
    bare: bytes = b""
    segments: tuple[bytes, ...] = ()
    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) once the orientation is applied."""
        return self.size if self.orientation < 5 else (self.size[1], self.size[0])


def truncated(name: str) -> ImageTruncated:
    return ImageTruncated(f"the {name} file ends too early or is damaged; upload it again")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
