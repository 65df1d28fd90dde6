"""Pictures: bytes enter in ``decode`` and leave in ``encode``, with depth, alpha and metadata.

Pillow never sees metadata (``shared.containers`` keeps it as raw bytes), and its plugins are
called one by one: ``Image.open`` would try formats that are not allowed and warn about size.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from shared import exif, jpeg
from shared.containers import (
    FORMATS,
    TIFF_NEEDED,
    Header,
    jpeg_segment,
    png_chunk,
    read_header,
    truncated,
)
from shared.errors import FidelityError, ImageError, ObjectTooLarge

log = logging.getLogger(__name__)

Array = NDArray[Any]  # uint8, uint16 or bool, as Picture.pixels says
Pixels = NDArray[np.uint8]

PNG_LEVEL = 2
JPEG_QUALITY = 95
WEBP_QUALITY = 95

_PLUGINS: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_MODES: Mapping[str, tuple[str, ...]] = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"),
    "BMP": ("1", "L", "RGB", "RGBA"),
}
_MODE_NAMES = {
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
# What Pillow's decoders raise on damaged data, besides OSError.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, struct.error, zlib.error),
)


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
        return np.asarray(_image(pixels, mode).convert("RGB"))
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


def probe(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) as shown, from the header; the data may be the first part of a file.

    Raises ImageError (code ``image_truncated`` where more of the file is needed) and
    ObjectTooLarge.
    """
    header = read_header(data)
    _check(header, max_pixels)
    return header.shown


def decode(data: bytes, *, max_pixels: int) -> Picture:
    """Reads a picture and turns it upright.

    Raises ImageError for what is no picture, damaged, animated, or cannot be written back
    exactly; ObjectTooLarge, before anything is decoded, for more than max_pixels.
    """
    header = read_header(data)
    _check(header, max_pixels)
    opened = _load(header)
    image, mode = _resolved(opened)
    pixels = _turned(_array(image), header.orientation)
    pixels.flags.writeable = False
    return Picture(
        pixels=pixels,
        mode=mode,
        format=header.format,
        coding=_coding(header, opened),
        metadata=_metadata(header, opened),
        source=data,
    )


def encode(picture: Picture, *, format: str | None = None, quality: int | None = None) -> bytes:
    """The picture's file: its source's own bytes where nothing was touched.

    format: one of ``FORMATS``, or the source's. quality: 1 to 100 for JPEG and WebP; without
    it JPEG keeps the source's tables and every block that nothing touched, as ``shared.jpeg``
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
    image = _image(*_fitted(picture, name))
    try:
        return _written(name, image, picture, quality)
    except _DAMAGE as error:
        raise ImageError(f"cannot write {picture.mode} as {name}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check(header: Header, max_pixels: int) -> None:
    width, height = header.shown
    if width * height > max_pixels:
        raise ObjectTooLarge(
            f"{width}x{height} is {width * height / 1e6:.1f} megapixels; at most "
            f"{max_pixels / 1e6:.1f} are allowed: make it smaller or raise the limit"
        )


def _load(header: Header) -> ImageFile.ImageFile:
    if header.frames > 1:
        kind = "has several pages" if header.format == "TIFF" else "is animated"
        raise ImageError(f"the {header.format} file {kind}; save one picture a file")
    if header.refusal:
        raise ImageError(f"the {header.format} file {header.refusal}")
    try:
        image = _PLUGINS[header.format](io.BytesIO(header.bare))
        if image.size != header.size:
            raise ImageError(f"the {header.format} file contradicts itself about its size")
        image.load()
    except Image.DecompressionBombError as error:
        raise ObjectTooLarge(one_line(error)) from error
    except _DAMAGE as error:
        raise truncated(header.format) from error
    return image


def _resolved(image: Image.Image) -> tuple[Image.Image, str]:
    """The image without palette or colour key, and its mode; raises ImageError."""
    mode = "I;16" if image.mode == "I;16B" else image.mode
    if mode == "P":
        mode = "RGBA" if "transparency" in image.info else "RGB"
    elif "transparency" in image.info and mode in ("1", "L", "RGB"):
        mode = "RGBA" if mode == "RGB" else "LA"
    if mode not in _MODE_NAMES or (mode == "I;16" and "transparency" in image.info):
        raise ImageError(
            f"pixels of kind {image.mode!r} cannot be repainted without loss; "
            "convert to 8-bit RGB, grey or CMYK"
        )
    return (image if image.mode in (mode, "I;16B") else image.convert(mode)), mode


def _array(image: Image.Image) -> Array:
    pixels = np.asarray(image)
    return pixels.astype(np.uint16) if pixels.dtype.itemsize == 2 else pixels


def _turned(pixels: Array, orientation: int) -> Array:
    """The pixels as EXIF orientation 1 to 8 says they are to be shown."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _coding(header: Header, image: Image.Image) -> Coding:
    compression = str(image.info.get("compression", ""))
    coding = Coding(
        lossless=header.lossless,
        progressive=header.progressive,
        compression=_TIFF_COMPRESSIONS.get(compression, "tiff_adobe_deflate"),
    )
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.layers > 3:
        return coding
    return replace(
        coding,
        rgb_jpeg=image.layers == 3 and image.info.get("adobe_transform") == 0,
        quantisation=_tables(image, turned=header.orientation >= 5),
        subsampling=_subsampling(image, turned=header.orientation >= 5),
    )


def _tables(image: JpegImagePlugin.JpegImageFile, *, turned: bool) -> tuple[tuple[int, ...], ...]:
    """One table a component, the last one standing for the rest, as Pillow writes them."""
    numbers = [component[3] for component in image.layer[: image.layers]]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        del numbers[-1]
    tables = [np.array(image.quantization[number]).reshape(8, 8) for number in numbers]
    return tuple(tuple((table.T if turned else table).ravel().tolist()) for table in tables)


def _subsampling(image: JpegImagePlugin.JpegImageFile, *, turned: bool) -> int:
    """0 (4:4:4), 1 (4:2:2) or 2 (4:2:0); full resolution for what Pillow cannot write."""
    if image.layers != 3:
        return -1
    (_, across, down, _), *chroma = image.layer
    if any(other[1:3] != (1, 1) for other in chroma):
        return 0
    return {(2, 1): 1, (2, 2): 2}.get((down, across) if turned else (across, down), 0)


def _metadata(header: Header, image: Image.Image) -> Metadata:
    dpi = image.info.get("dpi")
    return Metadata(
        segments=header.segments,
        exif=header.exif,
        icc=header.icc,
        xmp=header.xmp,
        dpi=header.dpi or ((float(dpi[0]), float(dpi[1])) if dpi else None),
    )


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
            f"{name} cannot hold {_MODE_NAMES[picture.mode]}; write {' or '.join(able)}"
        )
    return pixels, mode


def _image(pixels: Array, mode: str) -> Image.Image:
    pixels = np.ascontiguousarray(pixels)
    if mode == "CMYK":
        size = (pixels.shape[1], pixels.shape[0])
        return Image.frombytes(mode, size, pixels.tobytes())
    return Image.fromarray(pixels)


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
        _turned(picture.pixels, back),
        _turned(touched, back),
        metadata=picture.metadata.segments.replace(header.exif, stored)
        if header.orientation > 1
        else picture.metadata.segments,
    )
    result = decode(spliced.data, max_pixels=touched.size)
    differs = result.pixels != picture.pixels
    outside = ~_turned(spliced.reach, header.orientation)
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
# Lossy compressions inside TIFF are left out: what they would do to untouched pixels is worse
# than a larger file.
_TIFF_COMPRESSIONS = {
    name: name
    for name in (
        *("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"),
        *("group3", "group4", "lzma", "zstd"),
    )
}
