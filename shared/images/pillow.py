"""Decoding by one of Pillow's plugins."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFile

from shared.errors import ImageError
from shared.images.codec import DecodedPixels, Header
from shared.images.image import MODE_DESCRIPTIONS, Array

Plugin = Callable[..., ImageFile.ImageFile]


def decode(plugin: Plugin, header: Header) -> DecodedPixels:
    image = load(plugin, header, header.bare)
    pixels, mode = pixels_of(image)
    encoding = replace(header.encoding, indexed=image.mode == "P")
    return DecodedPixels(pixels=pixels, mode=mode, encoding=encoding)


def load(plugin: Plugin, header: Header, data: bytes) -> ImageFile.ImageFile:
    """The loaded image; raises ImageError if its size is not the header's."""
    image = plugin(io.BytesIO(data))
    if image.size != header.size:
        raise ImageError(f"the {image.format} file contradicts itself about its size")
    image.load()
    return image


def pixels_of(image: Image.Image) -> tuple[Array, str]:
    """Pixels and mode, a palette resolved; raises ImageError for an unsupported mode."""
    mode = "I;16" if image.mode == "I;16B" else image.mode
    if mode == "P":
        mode = "RGBA" if "transparency" in image.info else "RGB"
    if mode not in MODE_DESCRIPTIONS:
        raise ImageError(
            f"pixels of mode {image.mode!r} cannot be repainted without loss; "
            "convert to 8-bit RGB, grey or CMYK"
        )
    resolved = image if image.mode in (mode, "I;16B") else image.convert(mode)
    pixels = np.asarray(resolved)
    # Big-endian grey becomes the machine's own byte order.
    return pixels.astype(np.uint16) if pixels.dtype.itemsize == 2 else pixels, mode
