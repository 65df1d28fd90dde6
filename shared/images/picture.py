"""Pictures in memory: pixels in their own mode and depth, and what their file said besides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]  # uint8, uint16 or bool, as Picture.pixels says
Pixels = NDArray[np.uint8]

MODE_NAMES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "RGB": "colour",
    "RGBA": "colour with transparency",
    "CMYK": "CMYK",
    "I;16": "16-bit grey",
}
_SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".dib": "BMP"},
}
# Lossy compressions inside TIFF are left out: what they would do to untouched pixels is worse
# than a larger file.
TIFF_COMPRESSIONS = {
    name: name
    for name in (
        *("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
        *("group3", "group4", "lzma", "zstd"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How the source stored its pixels, so that the result can be stored alike.

    quantisation: JPEG tables, each 64 steps row by row. subsampling: Pillow's number, 0 is
    4:4:4. rgb_jpeg: the JPEG holds RGB, not YCbCr. compression: TIFF's, by Pillow's name.
    """

    lossless: bool = True
    progressive: bool = False
    rgb_jpeg: bool = False
    quantisation: tuple[tuple[int, ...], ...] = ()
    subsampling: int = -1
    compression: str = "tiff_adobe_deflate"


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """segments: in the source format's own framing; the others for writing other formats.

    dpi: (x, y) dots per inch, or None where the file does not say.
    """

    segments: bytes = b""
    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture, upright.

    pixels: (H, W) or (H, W, C), uint8, uint16 (mode ``I;16``) or bool (mode ``1``). Read only.
    mode: Pillow's; palettes are already resolved to RGB or RGBA, colour keys to an alpha
    channel, because a palette has no room for new colours: every old pixel keeps its colour.
    touched: (H, W), the pixels that differ from the source; None: none does.
    source: the bytes the picture came from. They are the result where nothing is touched, and
    unchanged JPEG blocks can be copied out of them.
    """

    pixels: Array
    mode: str
    format: str
    coding: Coding = field(default_factory=Coding)
    metadata: Metadata = field(default_factory=Metadata)
    touched: NDArray[np.bool_] | None = None
    source: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def has_alpha(self) -> bool:
        return self.mode in ("LA", "RGBA")

    def rgb(self) -> Pixels:
        """(H, W, 3) uint8, what an engine sees; a view wherever the mode allows one."""
        return as_rgb(self.pixels, self.mode)

    def alpha(self) -> Pixels | None:
        """(H, W) uint8 view, 255 = opaque; None where the mode has no alpha."""
        return self.pixels[..., -1].astype(np.uint8, copy=False) if self.has_alpha else None

    def replace(self, pixels: Array, *, touched: NDArray[np.bool_]) -> Picture:
        """The picture with other pixels of the same shape and depth. touched: (H, W)."""
        pixels.flags.writeable = False
        return replace(self, pixels=pixels, touched=touched if touched.any() else None)


def as_rgb(pixels: Array, mode: str) -> Pixels:
    """(h, w, 3) uint8 from pixels of the mode."""
    if mode == "RGB":
        return pixels.astype(np.uint8, copy=False)
    if mode == "RGBA":
        return pixels[..., :3].astype(np.uint8, copy=False)
    if mode == "CMYK":
        return np.asarray(pillow_image(pixels, mode).convert("RGB"))
    if mode == "1":
        grey = pixels.astype(np.uint8) * np.uint8(255)
    elif mode == "I;16":
        grey = (pixels >> 8).astype(np.uint8)
    else:
        grey = (pixels[..., 0] if mode == "LA" else pixels).astype(np.uint8, copy=False)
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def from_rgb(rgb: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """The mode's own colour channels, without alpha, from (h, w, 3) RGB of 0 to 255.

    Returns (h, w, C) in the mode's own range: 65535 for ``I;16``, 1 for ``1``, else 255.
    """
    if mode in ("RGB", "RGBA"):
        return rgb
    if mode == "CMYK":
        ink = 255 - rgb
        return np.concatenate([ink, np.zeros_like(ink[..., :1])], axis=-1)
    grey = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601
    return grey * np.float32({"I;16": 257, "1": 1 / 255}.get(mode, 1))


def format_of(location: str) -> str | None:
    """The format that a file's name asks for, one of ``FORMATS``; None where it names none."""
    return _SUFFIXES.get(PurePosixPath(location).suffix.lower())


def turned(pixels: Array, orientation: int) -> Array:
    """The pixels as EXIF orientation 1 to 8 says they are to be shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def pillow_image(pixels: Array, mode: str) -> Image.Image:
    pixels = np.ascontiguousarray(pixels)
    if mode == "CMYK":
        size = (pixels.shape[1], pixels.shape[0])
        return Image.frombytes(mode, size, pixels.tobytes())
    return Image.fromarray(pixels)
