"""Pixels and metadata to a file like the source's, or of another format: ``encode``."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
from PIL import Image

from shared.errors import FidelityError, ImageError, one_line
from shared.image_formats import FORMATS, ImageFormat
from shared.images import palette
from shared.images.codec import DAMAGE, CannotSplice, Codec, Spliced, load_codec
from shared.images.decoding import decode, decode_indexed
from shared.images.image import MODE_DESCRIPTIONS, Array, DecodedImage

log = logging.getLogger(__name__)


def encode(
    image: DecodedImage,
    *,
    format: str | None = None,
    quality: int | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """Encodes the image; returns the source's own bytes if nothing was touched.

    format: a key of ``FORMATS``; None: the source's. quality: 1 to 100 for JPEG and WebP, no
    effect on lossless formats; None: JPEG keeps the source's tables and copies every untouched
    block (``jpeg_splice.splice``), and WebP is lossless. xmp: a packet that replaces the
    source's; BMP has no place for one. Raises ImageError if the format cannot store the
    image's depth or alpha, and FidelityError where a JPEG would decode differently outside
    the touched pixels.
    """
    target = _find_format(format or image.format)
    if quality is not None and quality not in range(1, 101):
        raise ImageError(f"quality {quality} is not from 1 to 100")
    quality = quality if target.has_quality else None
    is_like_source = target.name == image.format and quality is None and bool(image.source)
    if is_like_source and image.touched is None:
        return image.source
    if xmp is not None:
        image = _replace_xmp(image, xmp)
    if is_like_source:
        data = _encode_like_source(load_codec(target), image)
        if data is not None:
            return data
    return _encode_whole(target, image, quality)


def check(image: DecodedImage, *, format: str | None = None) -> None:
    """Raises ImageError if ``encode`` could not store the image in the format."""
    _convert_mode(image, _find_format(format or image.format))


def _find_format(name: str) -> ImageFormat:
    if name not in FORMATS:
        raise ImageError(f"cannot write {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _replace_xmp(image: DecodedImage, packet: bytes) -> DecodedImage:
    """The image with that packet in its metadata, and in the source format's segments."""
    metadata = replace(image.metadata, xmp=packet)
    replace_in_segments = load_codec(FORMATS[image.format]).replace_xmp
    if replace_in_segments:
        metadata = replace(metadata, segments=replace_in_segments(metadata.segments, packet))
    return replace(image, metadata=metadata)


def _encode_like_source(codec: Codec, image: DecodedImage) -> bytes | None:
    """The source with its untouched blocks or its palette kept; None if that is impossible."""
    if codec.splice:
        try:
            return _verified(codec.splice(image), image)
        except CannotSplice as error:
            log.warning(
                "a %s is encoded as a whole and changes a little everywhere: %s",
                image.format,
                error,
            )
    if codec.encode_indexed and image.encoding.indexed:
        indexed = _repaint_palette(image)
        return codec.encode_indexed(indexed, image) if indexed is not None else None
    return None


def _verified(spliced: Spliced, image: DecodedImage) -> bytes:
    """The spliced file; raises FidelityError if a pixel out of reach decodes differently."""
    # The one guarantee users rely on, so it is checked on every file and not only in tests.
    result = decode(spliced.data, max_pixels=spliced.reach.size)
    differs = result.pixels != image.pixels
    differs = differs if differs.ndim == 2 else differs.any(axis=-1)
    wrong = np.count_nonzero(differs & ~spliced.reach)
    if wrong or result.mode != image.mode:
        raise FidelityError(f"{wrong} pixels outside the mask would have changed; report this")
    return spliced.data


def _repaint_palette(image: DecodedImage) -> Image.Image | None:
    """The image with the source's palette; None if it cannot hold the new transparency."""
    repainted = palette.repaint(image, *decode_indexed(image.source))
    if repainted is None:
        return None
    indices, colours = repainted
    # Entries behind the last one in use would only make the file larger.
    used = int(indices.max()) + 1
    indexed = Image.fromarray(indices)
    indexed.putpalette(colours[:used, :3].tobytes(), "RGB")
    if image.has_alpha:
        indexed.info["transparency"] = colours[:used, 3].tobytes()
    return indexed


def _encode_whole(format: ImageFormat, image: DecodedImage, quality: int | None) -> bytes:
    """Encodes every pixel anew."""
    pixels, mode = _convert_mode(image, format)
    try:
        return load_codec(format).encode(replace(image, pixels=pixels, mode=mode), quality)
    except DAMAGE as error:
        message = f"cannot write {image.mode} as {format.name}: {one_line(error)}"
        raise ImageError(message) from error


def _convert_mode(image: DecodedImage, format: ImageFormat) -> tuple[Array, str]:
    """The pixels in a mode that the format stores, without loss; raises ImageError."""
    pixels, mode = image.pixels, image.mode
    # Each step loses nothing: opaque alpha says nothing, black and white is grey, grey is colour.
    if mode not in format.modes and image.has_alpha and _is_opaque(pixels):
        pixels, mode = pixels[..., :-1], mode.replace("A", "")
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if mode not in format.modes and mode == "1":
        pixels, mode = pixels.astype(np.uint8) * np.uint8(255), "L"
    if mode not in format.modes and mode in ("L", "LA"):
        grey = pixels[..., :1] if mode == "LA" else pixels[..., None]
        channels = [grey, grey, grey, *([pixels[..., 1:]] if mode == "LA" else [])]
        pixels, mode = np.concatenate(channels, axis=-1), "RGBA" if mode == "LA" else "RGB"
    if mode not in format.modes:
        able = [other.name for other in FORMATS.values() if image.mode in other.modes]
        raise ImageError(
            f"{format.name} cannot hold {MODE_DESCRIPTIONS[image.mode]}; write {' or '.join(able)}"
        )
    return pixels, mode


def _is_opaque(pixels: Array) -> bool:
    return bool((pixels[..., -1] == np.iinfo(pixels.dtype).max).all())
