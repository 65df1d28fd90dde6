"""Images in memory: pixels in their own mode and depth, and the metadata of their file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.images import cmyk

Array = NDArray[Any]  # uint8, uint16 or bool, see DecodedImage.pixels
Pixels = NDArray[np.uint8]

MODE_DESCRIPTIONS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "RGB": "colour",
    "RGBA": "colour with transparency",
    "CMYK": "CMYK",
    "I;16": "16-bit grey",
    "LA;16": "16-bit grey with transparency",
    "RGB;16": "16-bit colour",
    "RGBA;16": "16-bit colour with transparency",
}
DEEP_MODES = {1: "I;16", 2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}  # by number of channels


@dataclass(frozen=True, kw_only=True)
class SourceEncoding:
    """How the source stored its pixels, so that the result can be stored alike.

    quantisation: JPEG's tables, 64 steps each, row by row. subsampling: Pillow's number, 0 is
    4:4:4. rgb_jpeg: the JPEG holds RGB, not YCbCr. indexed: the source has a palette.
    transparent_colour: PNG's tRNS, in the range of the decoded pixels.
    """

    lossless: bool = True
    progressive: bool = False
    rgb_jpeg: bool = False
    quantisation: tuple[tuple[int, ...], ...] = ()
    subsampling: int = -1
    indexed: bool = False
    transparent_colour: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """A file's metadata, upright: EXIF has orientation 1 and no thumbnail.

    segments: in the source format's own framing, for writing that format again; the other
    fields are for writing another format.
    dpi: (x, y) dots per inch, None if the file does not say.
    """

    segments: tuple[bytes, ...] = ()
    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """A decoded image, with its orientation applied.

    pixels: (H, W) or (H, W, C), read-only; bool in mode ``1``, uint16 in modes that end in
    ``;16``, else uint8.
    mode: Pillow's, and by the same rule ``LA;16``, ``RGB;16`` and ``RGBA;16``. Palettes are
    resolved to RGB or RGBA and transparent colours to an alpha channel; ``encode`` restores
    the source's own.
    format: a key of ``FORMATS``.
    touched: (H, W), True where a pixel differs from the source; None: nowhere.
    source: the file the image came from. ``encode`` returns it if nothing is touched, and
    copies untouched JPEG blocks out of it.
    """

    pixels: Array
    mode: str
    format: str
    encoding: SourceEncoding = field(default_factory=SourceEncoding)
    metadata: Metadata = field(default_factory=Metadata)
    touched: NDArray[np.bool_] | None = None
    source: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def has_alpha(self) -> bool:
        return has_alpha(self.mode)

    def rgb(self) -> Pixels:
        """(H, W, 3) uint8, the engines' input; a view if the mode allows one."""
        return as_rgb(self.pixels, self.mode, profile=self.metadata.icc)

    def alpha(self) -> Pixels | None:
        """(H, W) uint8, 255 = opaque; None if the mode has no alpha."""
        return _eight_bits(self.pixels[..., -1]) if self.has_alpha else None

    def replace(self, pixels: Array, *, touched: NDArray[np.bool_]) -> DecodedImage:
        """The image with other pixels of the same shape and depth; makes them read-only.

        touched: (H, W), those that differ from this image's; earlier ones stay touched.
        """
        pixels.flags.writeable = False
        if self.touched is not None:
            touched = touched | self.touched
        return replace(self, pixels=pixels, touched=touched if touched.any() else None)

    def to_pillow(self) -> Image.Image:
        """The pixels as a Pillow image; not for modes with 16 bits and several channels."""
        pixels = np.ascontiguousarray(self.pixels)
        if self.mode == "CMYK":
            return Image.frombytes(self.mode, self.size, pixels.tobytes())
        return Image.fromarray(pixels)


def has_alpha(mode: str) -> bool:
    return mode.partition(";")[0] in ("LA", "RGBA")


def full_scale(mode: str) -> int:
    """The mode's value for full light, full ink and full opacity."""
    return {"1": 1}.get(mode, 65535 if mode.endswith(";16") else 255)


def as_rgb(pixels: Array, mode: str, *, profile: bytes = b"") -> Pixels:
    """(h, w, 3) uint8 from pixels of the mode. profile: the ICC profile, for CMYK."""
    if mode == "CMYK":
        return cmyk.to_rgb(pixels, profile)
    if mode == "1":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if mode.startswith("RGB"):
        return _eight_bits(pixels[..., :3])
    grey = _eight_bits(pixels[..., 0] if has_alpha(mode) else pixels)
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def _eight_bits(pixels: Array) -> Pixels:
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    return pixels.astype(np.uint8, copy=False)


def from_rgb(rgb: NDArray[np.float32], mode: str, *, profile: bytes = b"") -> NDArray[np.float32]:
    """(..., C) colour channels of the mode, without alpha, from (..., 3) RGB of 0 to 255.

    The result has the mode's own range, 0 to ``full_scale``. profile: as for ``as_rgb``.
    """
    if mode == "CMYK":
        return cmyk.from_rgb(rgb, profile)
    scale = np.float32(full_scale(mode) / 255)
    if mode.startswith("RGB"):
        return rgb if scale == 1 else rgb * scale
    grey = rgb @ np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601
    return grey * scale


def apply_orientation(pixels: Array, orientation: int) -> Array:
    """The pixels as EXIF orientation 1 to 8 displays them."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
