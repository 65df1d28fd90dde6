"""Pictures leave here: pixels and metadata to a file like the source's, or of another format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from shared.errors import FidelityError, ImageError
from shared.images import (
    bmp_format,
    jpeg_format,
    jpeg_splice,
    palette,
    png_format,
    tiff_format,
    webp_format,
)
from shared.images.containers import read_header
from shared.images.decoding import decode, decode_indexed
from shared.images.header import DAMAGE, FORMATS, one_line
from shared.images.image import (
    MODE_DESCRIPTIONS,
    Array,
    DecodedImage,
    Metadata,
    apply_orientation,
    pillow_image,
)

log = logging.getLogger(__name__)

_MODES: Mapping[str, tuple[str, ...]] = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "I;16", "LA;16", "RGB;16", "RGBA;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "LA;16", "RGB;16", "RGBA;16"),
    "BMP": ("1", "L", "RGB", "RGBA"),
}
_WITH_QUALITY = ("JPEG", "WEBP")


def encode(
    picture: DecodedImage,
    *,
    format: str | None = None,
    quality: int | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """The picture's file: its source's own bytes where nothing was touched.

    format: one of ``FORMATS``, or the source's. quality: 1 to 100 for JPEG and WebP, of no
    effect on formats without loss; without it JPEG keeps the source's tables and every block
    that nothing touched, as ``jpeg_splice.splice`` says, and WebP loses nothing. xmp: a packet
    instead of the source's; BMP holds none. Raises ImageError where the format cannot hold
    the picture's depth or alpha, and FidelityError where a JPEG would decode otherwise
    outside what was touched.
    """
    name = format or picture.format
    if name not in FORMATS:
        raise ImageError(f"cannot write {name!r}; use one of {', '.join(FORMATS)}")
    if quality is not None and quality not in range(1, 101):
        raise ImageError(f"quality {quality} is not from 1 to 100")
    quality = quality if name in _WITH_QUALITY else None
    as_it_was = name == picture.format and quality is None and bool(picture.source)
    if as_it_was and picture.touched is None:
        return picture.source
    metadata = picture.metadata if xmp is None else _with_xmp(picture, xmp)
    if as_it_was and name == "JPEG":
        try:
            return _spliced(picture, metadata)
        except jpeg_splice.CannotSplice as error:
            log.warning("a JPEG is encoded as a whole and changes a little everywhere: %s", error)
    if as_it_was and picture.encoding.indexed:
        indexed = _indexed(picture, metadata)
        if indexed is not None:
            return indexed
    return _whole(name, replace(picture, metadata=metadata), quality)


def _with_xmp(picture: DecodedImage, packet: bytes) -> Metadata:
    """The metadata with that packet, in the source format's framing too."""
    metadata = replace(picture.metadata, xmp=packet)
    framing = {"JPEG": jpeg_format.with_xmp, "PNG": png_format.with_xmp}.get(picture.format)
    return replace(metadata, segments=framing(metadata.segments, packet)) if framing else metadata


def _spliced(picture: DecodedImage, metadata: Metadata) -> bytes:
    """The source with its touched blocks rewritten, stored the way round that it was.

    Raises CannotSplice, and FidelityError where a pixel out of reach decodes otherwise.
    """
    header, touched = read_header(picture.source), picture.touched
    assert touched is not None  # noqa: S101 - encode returns the source then
    back = {6: 8, 8: 6}.get(header.orientation, header.orientation)
    segments = metadata.segments
    if header.orientation > 1:
        segments = jpeg_format.with_orientation(segments, header.orientation)
    spliced = jpeg_splice.splice(
        picture.source,
        apply_orientation(picture.pixels, back),
        apply_orientation(touched, back),
        metadata=b"".join(segments),
    )
    result = decode(spliced.data, max_pixels=touched.size)
    differs = result.pixels != picture.pixels
    outside = ~apply_orientation(spliced.reach, header.orientation)
    wrong = np.count_nonzero((differs if differs.ndim == 2 else differs.any(axis=-1)) & outside)
    if wrong or result.mode != picture.mode:
        raise FidelityError(f"{wrong} pixels outside the mask would have changed; report this")
    return spliced.data


def _indexed(picture: DecodedImage, metadata: Metadata) -> bytes | None:
    """The file with its palette; None where it has no room for the new transparency."""
    found = palette.repainted(picture, *decode_indexed(picture.source))
    if found is None:
        return None
    indices, colours = found
    image = Image.fromarray(indices)
    last = int(indices.max()) + 1
    image.putpalette(colours[:last, :3].tobytes(), "RGB")
    alphas = colours[:last, 3].tobytes() if picture.has_alpha else b""
    if picture.format == "PNG":
        return png_format.write_indexed(image, alphas, metadata)
    if picture.format == "TIFF":
        return tiff_format.write_indexed(image, replace(picture, metadata=metadata))
    return bmp_format.write(image, metadata)


def _whole(name: str, picture: DecodedImage, quality: int | None) -> bytes:
    """Every pixel encoded anew."""
    pixels, mode = _fitted(picture, name)
    try:
        match name:
            case "JPEG":
                return jpeg_format.write(pillow_image(pixels, mode), picture, quality)
            case "PNG":
                return png_format.write(pixels, mode, picture)
            case "WEBP":
                return webp_format.write(pillow_image(pixels, mode), picture, quality)
            case "TIFF":
                return tiff_format.write(pixels, mode, picture)
            case _:
                return bmp_format.write(pillow_image(pixels, mode), picture.metadata)
    except DAMAGE as error:
        raise ImageError(f"cannot write {picture.mode} as {name}: {one_line(error)}") from error


def check(picture: DecodedImage, *, format: str | None = None) -> None:
    """Raises ImageError where ``encode`` could not hold the picture in the format."""
    _fitted(picture, format or picture.format)


def _fitted(picture: DecodedImage, name: str) -> tuple[Array, str]:
    """The pixels in a mode the format can hold, without loss; raises ImageError."""
    pixels, mode = picture.pixels, picture.mode
    if mode not in _MODES[name] and picture.has_alpha and _is_opaque(pixels):
        pixels, mode = pixels[..., :-1], mode.replace("A", "")
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if mode not in _MODES[name] and mode == "1":
        pixels, mode = pixels.astype(np.uint8) * np.uint8(255), "L"
    if mode not in _MODES[name] and mode in ("L", "LA"):
        layers = [pixels[..., :1] if mode == "LA" else pixels[..., None]] * 3
        if mode == "LA":
            layers.append(pixels[..., 1:])
        pixels, mode = np.concatenate(layers, axis=-1), "RGBA" if mode == "LA" else "RGB"
    if mode not in _MODES[name]:
        able = [one for one in FORMATS if picture.mode in _MODES[one]]
        raise ImageError(
            f"{name} cannot hold {MODE_DESCRIPTIONS[picture.mode]}; write {' or '.join(able)}"
        )
    return pixels, mode


def _is_opaque(pixels: Array) -> bool:
    return bool((pixels[..., -1] == np.iinfo(pixels.dtype).max).all())
