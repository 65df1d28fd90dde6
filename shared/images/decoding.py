"""Bytes to pixels, depth and metadata: ``probe`` and ``decode``."""

from __future__ import annotations

import logging
import struct
from dataclasses import replace

import numpy as np
from PIL import Image

from shared.errors import ImageError, ObjectTooLarge, one_line
from shared.image_formats import ImageFormat
from shared.images import palette, pillow, xmp
from shared.images.codec import DAMAGE, Codec, DecodedPixels, Header, load_codec, truncated
from shared.images.image import DecodedImage, apply_orientation
from shared.images.palette import Colours, Indices
from shared.images.signatures import recognise
from shared.images.tiff_ifd import DirectoryError, read_exif_resolution

log = logging.getLogger(__name__)


def probe(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) once upright, from the header; the data may be the first part of a file.

    Raises ImageError, ImageTruncated if more of the file is needed, and ObjectTooLarge.
    """
    header = read_header(recognise(data), data)
    _check_size(header, max_pixels)
    return header.upright_size


def decode(data: bytes, *, max_pixels: int) -> DecodedImage:
    """Decodes a file and applies its orientation.

    Raises ImageError if the file is not an image, is damaged, animated, or cannot be
    written back without loss; ObjectTooLarge, before anything is decoded, above max_pixels.
    """
    format = recognise(data)
    header = read_header(format, data)
    _check_size(header, max_pixels)
    if header.warning:
        log.warning("%s", header.warning)
    decoded = _decode_pixels(format, header)
    pixels = apply_orientation(decoded.pixels, header.orientation)
    # Compositing compares its result with these pixels; nobody may write into them.
    pixels.flags.writeable = False
    return DecodedImage(
        pixels=pixels,
        mode=decoded.mode,
        format=format.name,
        encoding=decoded.encoding,
        metadata=header.metadata,
        source=data,
    )


def decode_indexed(data: bytes) -> tuple[Indices, Colours]:
    """The upright indices and the palette of a file whose ``encoding.indexed`` is true."""
    format = recognise(data)
    header = read_header(format, data)
    image = pillow.load(load_codec(format).plugin, header, header.bare)
    return apply_orientation(np.asarray(image), header.orientation), palette.colours_of(image)


def read_header(format: ImageFormat, data: bytes) -> Header:
    """Reads as much of the file as there is; raises ImageError if the size is not in it."""
    codec = load_codec(format)
    try:
        header = codec.read_header(data)
    except (struct.error, IndexError, DirectoryError) as error:
        raise truncated(format.name) from error
    width, height = header.size
    if width < 1 or height < 1:
        raise ImageError(f"the {format.name} header says {width}x{height} pixels")
    if header.metadata.dpi is None:
        dpi = read_exif_resolution(header.metadata.exif)
        header = replace(header, metadata=replace(header.metadata, dpi=dpi))
    if len(header.metadata.xmp) > xmp.MAX_PACKET_BYTES:
        header = _without_xmp(codec, format, header)
    return header


def _without_xmp(codec: Codec, format: ImageFormat, header: Header) -> Header:
    metadata = replace(header.metadata, xmp=b"")
    if codec.replace_xmp:
        metadata = replace(metadata, segments=codec.replace_xmp(metadata.segments, b""))
    limit = f"{xmp.MAX_PACKET_BYTES / 1e6:g} MB"
    warning = f"the {format.name} file's XMP packet is dropped: it is larger than {limit}"
    return replace(header, metadata=metadata, warning=warning)


def _check_size(header: Header, max_pixels: int) -> None:
    width, height = header.upright_size
    if width * height > max_pixels:
        raise ObjectTooLarge(
            f"{width}x{height} is {width * height / 1e6:.1f} megapixels; at most "
            f"{max_pixels / 1e6:.1f} are allowed: make it smaller or raise the limit"
        )


def _decode_pixels(format: ImageFormat, header: Header) -> DecodedPixels:
    if header.refusal:
        raise ImageError(f"the {format.name} file {header.refusal}")
    codec = load_codec(format)
    try:
        return codec.decode(header) if codec.decode else pillow.decode(codec.plugin, header)
    except Image.DecompressionBombError as error:
        raise ObjectTooLarge(one_line(error)) from error
    except DAMAGE as error:
        # Decoders do not say whether data is missing or wrong.
        raise truncated(format.name) from error
