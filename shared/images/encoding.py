"""Pictures leave here: pixels and metadata to a file like the source's, or of another format."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import FidelityError, ImageError
from shared.images import exif, jpeg
from shared.images.containers import (
    DAMAGE,
    FORMATS,
    TIFF_NEEDED,
    jpeg_segment,
    one_line,
    png_chunk,
    read_header,
)
from shared.images.decoding import decode
from shared.images.picture import MODE_NAMES, Array, Metadata, Picture, pillow_image, turned

log = logging.getLogger(__name__)

PNG_LEVEL = 2
JPEG_QUALITY = 95
WEBP_QUALITY = 95

_MODES: Mapping[str, tuple[str, ...]] = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"),
    "BMP": ("1", "L", "RGB", "RGBA"),
}


def encode(picture: Picture, *, format: str | None = None, quality: int | None = None) -> bytes:
    """The picture's file: its source's own bytes where nothing was touched.

    format: one of ``FORMATS``, or the source's. quality: 1 to 100 for JPEG and WebP; without
    it JPEG keeps the source's tables and every block that nothing touched, as ``jpeg.splice``
    says, and WebP its losslessness. Raises ImageError where the format cannot hold the
    picture's depth or alpha, and FidelityError where a JPEG would decode otherwise outside
    what was touched.
    """
    name = format or picture.format
    if name not in FORMATS:
        raise ImageError(f"cannot write {name!r}; use one of {', '.join(FORMATS)}")
    same = name == picture.format
    if same and picture.touched is None and picture.source and quality is None:
        return picture.source
    if same and name == "JPEG" and picture.source and quality is None:
        try:
            return _spliced(picture)
        except jpeg.CannotSplice as error:
            log.warning("a JPEG is encoded as a whole and changes a little everywhere: %s", error)
    image = pillow_image(*_fitted(picture, name))
    try:
        return _written(name, image, picture, quality)
    except DAMAGE as error:
        raise ImageError(f"cannot write {picture.mode} as {name}: {one_line(error)}") from error


def _fitted(picture: Picture, name: str) -> tuple[Array, str]:
    """The pixels in a mode the format can hold, without loss; raises ImageError."""
    pixels, mode = picture.pixels, picture.mode
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
            f"{name} cannot hold {MODE_NAMES[picture.mode]}; write {' or '.join(able)}"
        )
    return pixels, mode


def _saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def _written(name: str, image: Image.Image, picture: Picture, quality: int | None) -> bytes:
    match name:
        case "JPEG":
            return _write_jpeg(image, picture, quality)
        case "PNG":
            return _write_png(image, picture)
        case "WEBP":
            return _write_webp(image, picture, quality)
        case "TIFF":
            return _write_tiff(image, picture)
        case _:
            return _write_bmp(image, picture)


def _spliced(picture: Picture) -> bytes:
    """The source with its touched blocks rewritten, stored the way round that it was.

    Raises CannotSplice, and FidelityError where a pixel out of reach decodes otherwise.
    """
    header, touched = read_header(picture.source), picture.touched
    assert touched is not None  # noqa: S101 - encode returns the source then
    back = {6: 8, 8: 6}.get(header.orientation, header.orientation)
    stored = exif.oriented(header.exif, header.orientation)
    spliced = jpeg.splice(
        picture.source,
        turned(picture.pixels, back),
        turned(touched, back),
        metadata=picture.metadata.segments.replace(header.exif, stored)
        if header.orientation > 1
        else picture.metadata.segments,
    )
    result = decode(spliced.data, max_pixels=touched.size)
    differs = result.pixels != picture.pixels
    outside = ~turned(spliced.reach, header.orientation)
    wrong = np.count_nonzero((differs if differs.ndim == 2 else differs.any(axis=-1)) & outside)
    if wrong or result.mode != picture.mode:
        raise FidelityError(f"{wrong} pixels outside the mask would have changed; report this")
    return spliced.data


def _write_jpeg(image: Image.Image, picture: Picture, quality: int | None) -> bytes:
    coding, metadata, same = picture.coding, picture.metadata, picture.format == "JPEG"
    options: dict[str, Any] = {"quality": quality or JPEG_QUALITY}
    options["progressive"] = coding.progressive
    if metadata.dpi:
        options["dpi"] = metadata.dpi
    if same and coding.quantisation:
        options |= {"subsampling": coding.subsampling, "keep_rgb": coding.rgb_jpeg}
    if same and coding.quantisation and quality is None:
        options |= {"quality": -1, "qtables": [list(table) for table in coding.quantisation]}
    written = _saved(image, "JPEG", **options)
    segments = metadata.segments if same else _jpeg_metadata(metadata)
    head = 2
    if written[2:4] == b"\xff\xe0":
        after = 4 + int.from_bytes(written[4:6])
        head, written = (2, written[:2] + written[after:]) if same else (after, written)
    return written[:head] + segments + written[head:]


def _jpeg_metadata(metadata: Metadata) -> bytes:
    """EXIF, XMP and the colour profile (in pieces of a segment each) as JPEG segments."""
    piece = 65519
    parts = [metadata.icc[at : at + piece] for at in range(0, len(metadata.icc), piece)]
    bodies = [b"Exif\0\0" + metadata.exif] if metadata.exif else []
    bodies += [b"http://ns.adobe.com/xap/1.0/\0" + metadata.xmp] if metadata.xmp else []
    segments = [jpeg_segment(0xE1, body) for body in bodies if len(body) < 65534]
    for number, part in enumerate(parts, 1):
        segments.append(jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([number, len(parts)]) + part))
    return b"".join(segments)


def _write_png(image: Image.Image, picture: Picture) -> bytes:
    written = _saved(image, "PNG", compress_level=PNG_LEVEL)
    segments = (
        picture.metadata.segments if picture.format == "PNG" else _png_metadata(picture.metadata)
    )
    return written[:33] + segments + written[33:]


def _png_metadata(metadata: Metadata) -> bytes:
    chunks = []
    if metadata.icc:
        chunks.append(png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)
        chunks.append(png_chunk(b"pHYs", struct.pack(">IIB", x, y, 1)))
    if metadata.exif:
        chunks.append(png_chunk(b"eXIf", metadata.exif))
    if metadata.xmp:
        chunks.append(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    return b"".join(chunks)


def _write_webp(image: Image.Image, picture: Picture, quality: int | None) -> bytes:
    metadata = picture.metadata
    return _saved(
        image,
        "WEBP",
        lossless=quality is None and picture.coding.lossless,
        quality=quality or WEBP_QUALITY,
        method=4,
        exact=True,
        exif=metadata.exif,
        icc_profile=metadata.icc,
        xmp=metadata.xmp,
    )


def _write_tiff(image: Image.Image, picture: Picture) -> bytes:
    if picture.format == "TIFF":
        written = _saved(image, "TIFF", compression=picture.coding.compression)
        return exif.with_tags(written, picture.source, but=_TIFF_CHANGED)
    metadata = picture.metadata
    options: dict[str, Any] = {"compression": picture.coding.compression}
    if metadata.dpi:
        options["dpi"] = metadata.dpi
    if metadata.xmp:
        options["tiffinfo"] = {700: metadata.xmp}
    return _saved(image, "TIFF", icc_profile=metadata.icc, **options)


def _write_bmp(image: Image.Image, picture: Picture) -> bytes:
    dpi = picture.metadata.dpi
    return _saved(image, "BMP", **({"dpi": dpi} if dpi else {}))


# How pixels are stored, the orientation, and directories of other versions of the picture.
_TIFF_CHANGED = TIFF_NEEDED | {exif.ORIENTATION, 254, 255, 330}
