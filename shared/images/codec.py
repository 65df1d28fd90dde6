"""The Codec record: what the module of each image format provides, and the types it uses."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from shared.errors import ImageError, ImageTruncated
from shared.image_formats import ImageFormat
from shared.images.image import Array, DecodedImage, Metadata, SourceEncoding

# What the decoders of Pillow, imagecodecs and tifffile raise for damaged data.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, struct.error, zlib.error, RuntimeError),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself before its pixels are decoded.

    size: (width, height) as stored; orientation: EXIF's 1 to 8, how to display it.
    refusal: why the file cannot be repainted without loss, with the remedy; usually empty.
    bare: the file without its metadata. Pillow reads only this, so that no damaged or
    oversized tag can warn, fail or use memory.
    warning: what is dropped of the metadata, to be logged when the file is decoded.
    is_deep: Pillow would reduce the pixels to 8 bits or misread them; another decoder is needed.
    """

    size: tuple[int, int]
    orientation: int = 1
    refusal: str = ""
    warning: str = ""
    bare: bytes = b""
    is_deep: bool = False
    encoding: SourceEncoding = field(default_factory=SourceEncoding)
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) once the orientation is applied."""
        return self.size if self.orientation < 5 else (self.size[1], self.size[0])


@dataclass(frozen=True, kw_only=True)
class DecodedPixels:
    """Pixels as stored, before the orientation is applied; as in ``DecodedImage``."""

    pixels: Array
    mode: str
    encoding: SourceEncoding


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """A file with only the touched parts rewritten.

    reach: (H, W), the pixels that may decode differently from the source.
    copied: the share of the source's blocks that were copied, 0 to 1.
    """

    data: bytes
    reach: NDArray[np.bool_]
    copied: float


class CannotSplice(ImageError):
    """The file must be encoded as a whole; ``str()`` says why."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How one format is read and written.

    plugin: Pillow's decoder. It is called directly: ``Image.open`` would try formats that are
    not allowed, and only warn about decompression bombs.
    read_header: reads as much as there is of a file that may be cut short. May raise
    struct.error, IndexError or DirectoryError if data is missing, which means truncated.
    decode: by the plugin if None. May raise any of DAMAGE.
    encode: writes every pixel anew. The image's mode is one of the format's modes; quality is
    1 to 100, or None for as good as the source.
    encode_indexed: writes a Pillow image of mode ``P`` with the metadata of the DecodedImage;
    the alpha of its palette entries is in ``info["transparency"]``. None: no palettes.
    replace_xmp: ``Metadata.segments`` with another XMP packet, or without one for b"". None: the
    format has no segments.
    splice: rewrites only what is touched, or raises CannotSplice. None: always encodes anew.
    """

    plugin: Callable[..., ImageFile.ImageFile]
    read_header: Callable[[bytes], Header]
    encode: Callable[[DecodedImage, int | None], bytes]
    decode: Callable[[Header], DecodedPixels] | None = None
    encode_indexed: Callable[[Image.Image, DecodedImage], bytes] | None = None
    replace_xmp: Callable[[Sequence[bytes], bytes], tuple[bytes, ...]] | None = None
    splice: Callable[[DecodedImage], Spliced] | None = None


def load_codec(format: ImageFormat) -> Codec:
    """Imports the format's module at its first use."""
    # The names come from FORMATS, so nothing from outside is imported.
    codec: Codec = import_module(f"shared.images.{format.codec}").CODEC
    return codec


def truncated(format: str) -> ImageTruncated:
    return ImageTruncated(f"the {format} file ends too early or is damaged; upload it again")
