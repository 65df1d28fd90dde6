"""TIFF files: every layout is read; what is written has the source's depth, polarity and tags."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from shared.images import pillow, tiff_ifd
from shared.images.codec import Codec, DecodedPixels, Header, truncated
from shared.images.image import DEEP_MODES, Array, DecodedImage, Metadata
from shared.images.optional_libraries import tifffile
from shared.images.photoshop import without_thumbnail
from shared.images.tiff_ifd import Directory, Tag

_WIDTH, _HEIGHT, _DEPTH, _COMPRESSION, _POLARITY = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS, _STRIP_LENGTHS = 273, 277, 278, 279
_PLANES, _PREDICTOR, _EXTRA, _SAMPLE_FORMAT = 284, 317, 338, 339
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_LENGTHS = 322, 323, 324, 325
_XMP, _ICC, _PHOTOSHOP, _DNG_VERSION = 700, 34675, 34377, 50706
# The tags that say how pixels are stored; every other one is metadata.
_NEEDED = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324}
    | {325, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532}
)
# Not copied to the result: how pixels are stored, the orientation, what holds other versions of
# the image (further directories, Photoshop's layers), and XMP, which Metadata holds.
_NOT_COPIED = _NEEDED | {tiff_ifd.ORIENTATION, 254, 255, 330, 37724, _XMP}
# Pillow warns if one of these has several values.
_SINGLE = (256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323, 332, 512, 513)
_MAX_TILE_PIXELS = 1 << 26
_MAX_VALUES = 1 << 20  # of a tag that the pixels need: strips, tiles, colours of a palette
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INKS, _YCBCR = 0, 1, 2, 5, 6
_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by photometric interpretation
_UNASSOCIATED = 2  # alpha that colours were not multiplied with
_UNDEFINED = 4  # a sample format, read as unsigned integers
_SEPARATE = 2  # planes, one per channel
# Lossy compressions are left out: what they would do to untouched pixels is worse than a
# larger file.
_DEFLATE = 8
_NAMES = {
    **{1: "raw", 2: "tiff_ccitt", 3: "group3", 4: "group4", 5: "tiff_lzw", 32773: "packbits"},
    **{_DEFLATE: "tiff_adobe_deflate", 32946: "tiff_deflate", 34925: "lzma", 50000: "zstd"},
}
_BILEVEL = (2, 3, 4)
_PREDICTED = (5, 8, 32946, 34925, 50000)
_READ_BY_PILLOW = frozenset(_NAMES) | {6, 7, 32771, 32809}
_READ_BY_TIFFFILE = frozenset({34712, 34933, 50001})  # JPEG 2000, PNG, WebP


def read_header(data: bytes) -> Header:
    """Raises ImageTruncated for tags that contradict themselves, DirectoryError for damage."""
    directory = tiff_ifd.read_directory(data)
    entries = [entry for tag, entry in directory.entries.items() if tag in _SINGLE]
    if any(entry.count != 1 for entry in entries):
        raise truncated("TIFF")
    needed = (entry for tag, entry in directory.entries.items() if tag in _NEEDED)
    if any(entry.count > _MAX_VALUES for entry in needed):
        raise truncated("TIFF")
    orientation = directory.integer(data, tiff_ifd.ORIENTATION, 1)
    refusal = _refusal(data, directory)
    return Header(
        size=(directory.integer(data, _WIDTH, 0), directory.integer(data, _HEIGHT, 0)),
        orientation=orientation if orientation in range(1, 9) else 1,
        refusal=refusal,
        is_deep=not refusal and _is_beyond_pillow(data, directory),
        bare=_strip_metadata(data, directory),
        metadata=Metadata(
            exif=tiff_ifd.make_exif(data),
            icc=directory.value(data, _ICC),
            xmp=directory.value(data, _XMP),
            dpi=tiff_ifd.read_resolution(data, directory),
        ),
    )


def _refusal(data: bytes, directory: Directory) -> str:
    """Why the file cannot be written back without loss, with the remedy; empty if it can."""
    if directory.next:
        return "has several pages; save one image per file"
    if _DNG_VERSION in directory.entries:
        return "is a camera's raw image (DNG); develop it first"
    width, height = (directory.integer(data, tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if width * height > _MAX_TILE_PIXELS:
        return "is one huge tile; save it in strips"
    return (
        _coding_refusal(data, directory)
        or _channels_refusal(data, directory)
        or _depth_refusal(data, directory)
    )


def _coding_refusal(data: bytes, directory: Directory) -> str:
    kind = directory.integer(data, _POLARITY, 1)
    if kind not in _CHANNELS:
        return f"has colours of a rare kind ({kind}); convert to grey, RGB or CMYK"
    compression = directory.integer(data, _COMPRESSION, 1)
    if compression in _READ_BY_PILLOW:
        return ""
    if compression in _READ_BY_TIFFFILE and kind in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        return ""
    return f"is compressed in a way that few programs read ({compression}); save it with LZW"


def _channels_refusal(data: bytes, directory: Directory) -> str:
    samples, kind = directory.integer(data, _SAMPLES, 1), directory.integer(data, _POLARITY, 1)
    extra = samples - _CHANNELS.get(kind, samples)
    if extra > 1 or (extra and kind not in (_BLACK_IS_ZERO, _RGB)):
        return f"has {extra} extra channels; save it as grey, RGB or CMYK, with alpha at most"
    # A fourth channel that is not named is taken for alpha, as other programs do.
    if extra == 1 and _EXTRA not in directory.entries and kind != _RGB:
        return "has an unnamed extra channel; save it as grey, or grey with alpha"
    return ""


def _depth_refusal(data: bytes, directory: Directory) -> str:
    samples, kind = directory.integer(data, _SAMPLES, 1), directory.integer(data, _POLARITY, 1)
    depths = directory.integers(data, _DEPTH) or (1,)
    depths = depths[:8]  # a file may list millions
    if len(set(depths)) > 1 or depths[0] > 16 or (samples > 1 and depths[0] not in (8, 16)):
        return f"has {', '.join(map(str, depths))} bits a channel; save it with 8 or 16"
    if depths[0] > 8 and (depths[0] != 16 or kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB)):
        return f"has {depths[0]} bits a channel and is not plain grey or RGB; save it with 8"
    if depths[0] in (8, 16) and set(directory.integers(data, _SAMPLE_FORMAT)) - {1, _UNDEFINED}:
        return f"holds signed numbers or floats; save it as plain {depths[0]}-bit grey or RGB"
    return ""


def _is_beyond_pillow(data: bytes, directory: Directory) -> bool:
    """Whether Pillow would cut the depth, misread planes or polarity, or cannot decompress."""
    depth, kind = directory.integer(data, _DEPTH, 1), directory.integer(data, _POLARITY, 1)
    samples = directory.integer(data, _SAMPLES, 1)
    if directory.integer(data, _COMPRESSION, 1) in _READ_BY_TIFFFILE:
        return True
    if depth == 16:
        return samples > 1 or kind == _WHITE_IS_ZERO
    return samples > 1 and directory.integer(data, _PLANES, 1) == _SEPARATE and kind != _YCBCR


def _strip_metadata(data: bytes, directory: Directory) -> bytes:
    """The file with a new directory at its end that holds only what the pixels need.

    It is a classic one, because Pillow does not read big-endian BigTIFF.
    """
    order, tags = directory.order, []
    for number, entry in directory.entries.items():
        if number not in _NEEDED:
            continue
        kind, body = entry.type, directory.value(data, number)
        if kind in (16, 18):  # BigTIFF's 64-bit integers
            numbers = directory.integers(data, number)
            kind, body = 4, struct.pack(f"{order}{entry.count}I", *numbers)
        # Pillow would divide by alpha that colours were multiplied with.
        if number == _EXTRA and kind == 3 and entry.count == 1:
            body = struct.pack(f"{order}H", _UNASSOCIATED)
        tags.append(Tag(number=number, type=kind, count=entry.count, body=body))
    return tiff_ifd.append_directory(data, tags, order=order)


def decode(header: Header) -> DecodedPixels:
    if header.is_deep:
        return _decode_deep(header)
    return pillow.decode(TiffImagePlugin.TiffImageFile, header)


def _decode_deep(header: Header) -> DecodedPixels:
    """What Pillow cannot read, by tifffile. Raises ValueError for damage."""
    data, directory = header.bare, tiff_ifd.read_directory(header.bare)
    _check_pieces(header, directory)
    with tifffile().TiffFile(io.BytesIO(data)) as file:
        pixels = np.asarray(file.pages[0].asarray(maxworkers=1))
    if directory.integer(data, _SAMPLES, 1) > 1 and _has_planes(data, directory):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[1::-1] != header.size or pixels.dtype.itemsize > 2:
        raise ValueError("the pixels contradict the header")
    kind = directory.integer(data, _POLARITY, 1)
    if kind == _WHITE_IS_ZERO:
        pixels = np.iinfo(pixels.dtype).max - pixels
    native = pixels.astype(pixels.dtype.newbyteorder("="))
    mode = _mode_of(native, is_cmyk=kind == _INKS)
    return DecodedPixels(pixels=native, mode=mode, encoding=header.encoding)


def _has_planes(data: bytes, directory: Directory) -> bool:
    return directory.integer(data, _PLANES, 1) == _SEPARATE


def _mode_of(pixels: Array, *, is_cmyk: bool) -> str:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    mode = "CMYK" if is_cmyk else DEEP_MODES[channels]
    if pixels.dtype.itemsize == 1:
        return "L" if channels == 1 else mode.partition(";")[0]
    return mode


def _check_pieces(header: Header, directory: Directory) -> None:
    """Raises ValueError if strips or tiles are missing: tifffile would leave them black."""
    data, (width, height) = header.bare, header.size
    planes = directory.integer(data, _SAMPLES, 1) if _has_planes(data, directory) else 1
    if _TILE_WIDTH in directory.entries:
        across, down = (directory.integer(data, tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
        places = _TILE_OFFSETS, _TILE_LENGTHS
    else:
        across, down = width, min(directory.integer(data, _STRIP_ROWS, height), height)
        places = _STRIP_OFFSETS, _STRIP_LENGTHS
    offsets, lengths = (directory.integers(data, tag) for tag in places)
    if across < 1 or down < 1:
        raise ValueError("its strips have no size")
    pieces = ceil(width / across) * ceil(height / down) * planes
    if len(offsets) != pieces or len(lengths) != pieces:
        raise ValueError(f"it has {len(offsets)} strips or tiles, not {pieces}")
    for offset, length in zip(offsets, lengths, strict=True):
        if length == 0 or offset + length > len(data):
            raise ValueError("a strip or tile lies outside the file")


def encode(image: DecodedImage, _quality: int | None) -> bytes:
    """In strips, little-endian; with the source's compression, polarity, alpha and tags."""
    storage = _Storage.of(image)
    pixels, mode, values = image.pixels, image.mode, {}
    if storage.polarity == _WHITE_IS_ZERO and mode in ("1", "L", "I;16"):
        pixels, values[_POLARITY] = ~pixels, _WHITE_IS_ZERO
    if image.has_alpha:
        values[_EXTRA] = storage.extra
    compression = storage.compression
    if compression in _BILEVEL and mode != "1":
        compression = _DEFLATE
    predicted = storage.predicted and mode != "1"
    if mode.endswith(";16"):
        written = _by_tifffile(pixels, mode, compression, predicted=predicted)
    else:
        flat = replace(image, pixels=pixels).to_pillow()
        written = _by_pillow(flat, compression, predicted=predicted)
    return _add_tags(tiff_ifd.set_values(written, values), image)


def encode_indexed(indexed: Image.Image, image: DecodedImage) -> bytes:
    storage = _Storage.of(image)
    written = _by_pillow(indexed, storage.compression, predicted=storage.predicted)
    return _add_tags(written, image)


@dataclass(frozen=True, kw_only=True)
class _Storage:
    """How a TIFF source stores its pixels, in the numbers of the specification."""

    compression: int = _DEFLATE
    predicted: bool = True
    polarity: int = _BLACK_IS_ZERO
    extra: int = _UNASSOCIATED

    @classmethod
    def of(cls, image: DecodedImage) -> _Storage:
        if image.format != "TIFF" or not image.source:
            return cls()
        data, directory = image.source, tiff_ifd.read_directory(image.source)
        compression = directory.integer(data, _COMPRESSION, 1)
        if compression not in _NAMES:
            return cls()
        return cls(
            compression=compression,
            predicted=directory.integer(data, _PREDICTOR, 1) == 2 and compression in _PREDICTED,
            polarity=directory.integer(data, _POLARITY, 1),
            extra=directory.integer(data, _EXTRA, _UNASSOCIATED),
        )


def _by_pillow(image: Image.Image, compression: int, *, predicted: bool) -> bytes:
    buffer = io.BytesIO()
    info = {_PREDICTOR: 2} if predicted else {}
    image.save(buffer, "TIFF", compression=_NAMES[compression], tiffinfo=info)
    return buffer.getvalue()


def _by_tifffile(pixels: Array, mode: str, compression: int, *, predicted: bool) -> bytes:
    options: dict[str, Any] = {"photometric": "rgb" if mode.startswith("RGB") else "minisblack"}
    if mode in ("LA;16", "RGBA;16"):
        options["extrasamples"] = ["unassalpha"]
    if mode != "I;16":
        options["planarconfig"] = "contig"
    buffer = io.BytesIO()
    tifffile().imwrite(
        buffer,
        np.ascontiguousarray(pixels),
        byteorder="<",
        bigtiff=False,
        compression=None if compression == 1 else compression,
        predictor=predicted,
        rowsperstrip=max(1, (1 << 18) // (pixels[0].nbytes or 1)),
        metadata=None,
        software=False,
        maxworkers=1,
        **options,
    )
    return buffer.getvalue()


def _add_tags(written: bytes, image: DecodedImage) -> bytes:
    """The file with the metadata: the source's tags if it was a TIFF, else its EXIF block."""
    metadata = image.metadata
    # The source's own packet is not copied: it may be too long, or replaced.
    added = {_XMP: (1, metadata.xmp)} if metadata.xmp else {}
    if image.format == "TIFF" and image.source:
        directory = tiff_ifd.read_directory(image.source)
        resources = directory.value(image.source, _PHOTOSHOP)
        if resources:
            added[_PHOTOSHOP] = (7, without_thumbnail(resources))
        return tiff_ifd.copy_tags(
            written,
            image.source,
            skipped=_NOT_COPIED,
            added=added,
            dropped=frozenset({_EXTRA} - directory.entries.keys()),
        )
    if metadata.icc:
        added[_ICC] = (7, metadata.icc)
    if metadata.dpi:
        x, y = (struct.pack("<II", round(dots * 100), 100) for dots in metadata.dpi)
        unit = struct.pack("<H", 2)  # inches
        added[tiff_ifd.X_RESOLUTION] = (5, x)
        added[tiff_ifd.Y_RESOLUTION] = (5, y)
        added[tiff_ifd.RESOLUTION_UNIT] = (3, unit)
    exif = metadata.exif or tiff_ifd.EMPTY
    return tiff_ifd.copy_tags(written, exif, skipped=_NOT_COPIED, added=added)


CODEC = Codec(
    plugin=TiffImagePlugin.TiffImageFile,
    read_header=read_header,
    decode=decode,
    encode=encode,
    encode_indexed=encode_indexed,
)
