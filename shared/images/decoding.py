"""Pictures enter here: bytes to pixels, depth and metadata.

Pillow never sees metadata (``containers`` keeps it as raw bytes), and its plugins are
called one by one: ``Image.open`` would try formats that are not allowed and warn about size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from shared.errors import ImageError, ObjectTooLarge
from shared.images import jpeg_splice, palette, png_format, tiff_format, tiff_ifd
from shared.images.containers import read_header
from shared.images.header import DAMAGE, Header, one_line, truncated
from shared.images.image import (
    MODE_DESCRIPTIONS,
    Array,
    DecodedImage,
    Metadata,
    SourceEncoding,
    apply_orientation,
)
from shared.images.palette import Colours, Indices

_PLUGINS: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}


def probe(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) as shown, from the header; the data may be the first part of a file.

    Raises ImageError, ImageTruncated where more of the file is needed, and ObjectTooLarge.
    """
    header = read_header(data)
    _check(header, max_pixels)
    return header.shown


def decode(data: bytes, *, max_pixels: int) -> DecodedImage:
    """Reads a picture and turns it upright.

    Raises ImageError for what is no picture, damaged, animated, or cannot be written back
    exactly; ObjectTooLarge, before anything is decoded, for more than max_pixels.
    """
    header = read_header(data)
    _check(header, max_pixels)
    encoding = SourceEncoding(
        lossless=header.lossless, progressive=header.progressive, key=header.key
    )
    if header.deep:
        pixels, mode = _deep(header)
    else:
        opened = _load(header)
        encoding = _coding(header, opened, encoding)
        image, mode = _resolved(opened)
        pixels = _array(image)
    if header.key:
        pixels, mode = png_format.keyed(pixels, mode, header.key)
    pixels = apply_orientation(pixels, header.orientation)
    pixels.flags.writeable = False
    return DecodedImage(
        pixels=pixels,
        mode=mode,
        format=header.format,
        encoding=encoding,
        metadata=_metadata(header),
        source=data,
    )


def decode_indexed(data: bytes) -> tuple[Indices, Colours]:
    """The indices and the palette of a file that ``decode`` has read as indexed, upright."""
    header = read_header(data)
    image = _load(header)
    return apply_orientation(np.asarray(image), header.orientation), palette.colours_of(image)


def _check(header: Header, max_pixels: int) -> None:
    width, height = header.shown
    if width * height > max_pixels:
        raise ObjectTooLarge(
            f"{width}x{height} is {width * height / 1e6:.1f} megapixels; at most "
            f"{max_pixels / 1e6:.1f} are allowed: make it smaller or raise the limit"
        )


def _deep(header: Header) -> tuple[Array, str]:
    """Pixels and mode of what Pillow would cut to eight bits."""
    _refuse(header)
    decode_deep = {"PNG": png_format.decode_deep, "TIFF": tiff_format.decode_deep}[header.format]
    try:
        return decode_deep(header)
    except DAMAGE as error:
        raise truncated(header.format) from error


def _load(header: Header) -> ImageFile.ImageFile:
    _refuse(header)
    try:
        if header.format == "JPEG" and jpeg_splice.lacks_end(header.bare):
            return _without_end(header)
        return _opened(header, header.bare)
    except Image.DecompressionBombError as error:
        raise ObjectTooLarge(one_line(error)) from error
    except DAMAGE as error:
        raise truncated(header.format) from error


def _refuse(header: Header) -> None:
    if header.frames > 1:
        kind = "has several pages" if header.format == "TIFF" else "is animated"
        raise ImageError(f"the {header.format} file {kind}; save one picture a file")
    if header.refusal:
        raise ImageError(f"the {header.format} file {header.refusal}")


def _opened(header: Header, data: bytes) -> ImageFile.ImageFile:
    image = _PLUGINS[header.format](io.BytesIO(data))
    if image.size != header.size:
        raise ImageError(f"the {header.format} file contradicts itself about its size")
    image.load()
    return image


def _without_end(header: Header) -> ImageFile.ImageFile:
    """A JPEG that lacks nothing but its end; raises ImageError where pixels are missing."""
    try:
        image, other = (_opened(header, data) for data in jpeg_splice.endings(header.bare))
    except jpeg_splice.CannotSplice as error:
        raise truncated(header.format) from error
    if image.tobytes() != other.tobytes():
        raise truncated(header.format)
    return image


def _resolved(image: Image.Image) -> tuple[Image.Image, str]:
    """The image without a palette, and its mode; raises ImageError."""
    mode = "I;16" if image.mode == "I;16B" else image.mode
    if mode == "P":
        mode = "RGBA" if "transparency" in image.info else "RGB"
    if mode not in MODE_DESCRIPTIONS:
        raise ImageError(
            f"pixels of kind {image.mode!r} cannot be repainted without loss; "
            "convert to 8-bit RGB, grey or CMYK"
        )
    if image.mode in (mode, "I;16B"):
        return image, mode
    try:
        return image.convert(mode), mode
    except DAMAGE as error:
        raise truncated(str(image.format)) from error


def _array(image: Image.Image) -> Array:
    pixels = np.asarray(image)
    return pixels.astype(np.uint16) if pixels.dtype.itemsize == 2 else pixels


def _coding(header: Header, image: Image.Image, encoding: SourceEncoding) -> SourceEncoding:
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.layers > 3:
        return replace(encoding, indexed=image.mode == "P")
    return replace(
        encoding,
        rgb_jpeg=image.layers == 3 and image.info.get("adobe_transform") == 0,
        quantisation=_tables(image, swap_axes=header.orientation >= 5),
        subsampling=_subsampling(image, swap_axes=header.orientation >= 5),
    )


def _tables(
    image: JpegImagePlugin.JpegImageFile, *, swap_axes: bool
) -> tuple[tuple[int, ...], ...]:
    """One table a component, the last one standing for the rest, as Pillow writes them."""
    numbers = [component[3] for component in image.layer[: image.layers]]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        del numbers[-1]
    tables = [np.array(image.quantization[number]).reshape(8, 8) for number in numbers]
    return tuple(tuple((table.T if swap_axes else table).ravel().tolist()) for table in tables)


def _subsampling(image: JpegImagePlugin.JpegImageFile, *, swap_axes: bool) -> int:
    """0 (4:4:4), 1 (4:2:2) or 2 (4:2:0); full resolution for what Pillow cannot write."""
    if image.layers != 3:
        return -1
    (_, across, down, _), *chroma = image.layer
    if any(other[1:3] != (1, 1) for other in chroma):
        return 0
    return {(2, 1): 1, (2, 2): 2}.get((down, across) if swap_axes else (across, down), 0)


def _metadata(header: Header) -> Metadata:
    return Metadata(
        segments=header.segments,
        exif=header.exif,
        icc=header.icc,
        xmp=header.xmp,
        dpi=header.dpi or _exif_dpi(header.exif),
    )


def _exif_dpi(block: bytes) -> tuple[float, float] | None:
    try:
        return tiff_format.resolution(block, tiff_ifd.read_directory(block))
    except tiff_ifd.DirectoryError:
        return None
