"""TIFF files: every layout is read; what is written has the source's depth, polarity and tags."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from shared.images import tiff_ifd as tags
from shared.images.header import Header, truncated
from shared.images.image import DEEP_MODES, Array, DecodedImage, pillow_image
from shared.images.optional_libraries import tifffile
from shared.images.photoshop import without_thumbnail
from shared.images.tiff_ifd import Directory

# The tags that say how pixels are stored; every other one is metadata.
_NEEDED = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324}
    | {325, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532}
)
_DEPTH, _COMPRESSION, _POLARITY, _PLANES, _PREDICTOR, _EXTRA = 258, 259, 262, 284, 317, 338
_XMP, _ICC, _PHOTOSHOP = 700, 34675, 34377
# How pixels are stored, the orientation, and whatever holds other versions of the picture:
# directories, and Photoshop's layers.
_CHANGED = _NEEDED | {tags.ORIENTATION, 254, 255, 330, 37724}
# Pillow warns where one of these has several values.
_SINGLE = (256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323, 332, 512, 513)
_MAX_TILE_PIXELS = 1 << 26
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INKS = 0, 1, 2, 5
_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # by photometric interpretation
_UNASSOCIATED = 2  # alpha that colours were not multiplied with
_UNDEFINED = 4  # a sample format, read as plain numbers
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


def read(data: bytes) -> Header:
    """Raises ImageError for tags that contradict themselves, DirectoryError for damage."""
    directory = tags.read_directory(data)
    entries = [entry for tag, entry in directory.entries.items() if tag in _SINGLE]
    if any(entry.count != 1 for entry in entries):
        raise truncated("TIFF")
    orientation = directory.integer(data, tags.ORIENTATION, 1)
    refusal = _refusal(data, directory)
    return Header(
        format="TIFF",
        size=(directory.integer(data, 256, 0), directory.integer(data, 257, 0)),
        orientation=orientation if orientation in range(1, 9) else 1,
        frames=2 if directory.next else 1,
        refusal=refusal,
        deep=not refusal and _is_beyond_pillow(data, directory),
        dpi=resolution(data, directory),
        bare=_bare(data, directory),
        exif=tags.block(data),
        icc=_bytes(data, directory, _ICC),
        xmp=_bytes(data, directory, _XMP),
    )


def _refusal(data: bytes, directory: Directory) -> str:
    """Why what the file holds cannot be written back exactly, with the remedy; or nothing."""
    if 50706 in directory.entries:
        return "is a camera's raw picture (DNG); develop it first"
    if directory.integer(data, 322, 0) * directory.integer(data, 323, 0) > _MAX_TILE_PIXELS:
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
    samples, kind = directory.integer(data, 277, 1), directory.integer(data, _POLARITY, 1)
    extra = samples - _CHANNELS.get(kind, samples)
    if extra > 1 or (extra and kind not in (_BLACK_IS_ZERO, _RGB)):
        return f"has {extra} extra channels; save it as grey, RGB or CMYK, with alpha at most"
    # A fourth channel that is not named is taken for alpha, as other programs do.
    if extra == 1 and _EXTRA not in directory.entries and kind != _RGB:
        return "has an unnamed extra channel; save it as grey, or grey with alpha"
    return ""


def _depth_refusal(data: bytes, directory: Directory) -> str:
    samples, kind = directory.integer(data, 277, 1), directory.integer(data, _POLARITY, 1)
    depths = directory.integers(data, _DEPTH) or (1,)
    if len(set(depths)) > 1 or depths[0] > 16 or (samples > 1 and depths[0] not in (8, 16)):
        return f"has {', '.join(map(str, depths))} bits a channel; save it with 8 or 16"
    if depths[0] > 8 and (depths[0] != 16 or kind not in (0, 1, 2)):
        return f"has {depths[0]} bits a channel and is not plain grey or RGB; save it with 8"
    if depths[0] in (8, 16) and set(directory.integers(data, 339)) - {1, _UNDEFINED}:
        return f"holds signed numbers or floats; save it as plain {depths[0]}-bit grey or RGB"
    return ""


def _is_beyond_pillow(data: bytes, directory: Directory) -> bool:
    """Whether Pillow would cut the depth, misread planes or polarity, or cannot decompress."""
    depth, kind = directory.integer(data, _DEPTH, 1), directory.integer(data, _POLARITY, 1)
    samples = directory.integer(data, 277, 1)
    if directory.integer(data, _COMPRESSION, 1) in _READ_BY_TIFFFILE:
        return True
    if depth == 16:
        return samples > 1 or kind == _WHITE_IS_ZERO
    return samples > 1 and directory.integer(data, _PLANES, 1) == 2 and kind != 6


def resolution(data: bytes, directory: Directory) -> tuple[float, float] | None:
    """(x, y) dots per inch, where the directory says so."""
    sides = [_bytes(data, directory, tag) for tag in (282, 283)]
    unit = {2: 1.0, 3: 2.54}.get(directory.integer(data, 296, 2))
    if unit is None or any(len(side) != 8 for side in sides):
        return None
    pairs = [struct.unpack(f"{directory.order}II", side) for side in sides]
    if any(0 in pair for pair in pairs):
        return None
    return pairs[0][0] / pairs[0][1] * unit, pairs[1][0] / pairs[1][1] * unit


def _bytes(data: bytes, directory: Directory, tag: int) -> bytes:
    entry = directory.entries.get(tag)
    return data[entry.place : entry.place + entry.length] if entry else b""


def _bare(data: bytes, directory: Directory) -> bytes:
    """The file with a new directory at its end that holds only what the pixels need.

    It is a classic one, because Pillow reads no big-endian BigTIFF. Alpha that colours were
    multiplied with is called plain alpha, or Pillow would divide.
    """
    order = directory.order
    entries = [entry for tag, entry in sorted(directory.entries.items()) if tag in _NEEDED]
    start = len(data) + len(data) % 2
    behind = start + 2 + 12 * len(entries) + 4
    lines, tail = [], bytearray()
    for entry in entries:
        kind, body = entry.type, data[entry.place : entry.place + entry.length]
        if kind in (16, 18):
            kind, body = (
                4,
                struct.pack(f"{order}{entry.count}I", *directory.integers(data, entry.tag)),
            )
        if entry.tag == _EXTRA and kind == 3 and entry.count == 1:
            body = struct.pack(f"{order}H", _UNASSOCIATED)
        place = struct.pack(f"{order}I", behind + len(tail))
        lines.append(struct.pack(f"{order}HHI", entry.tag, kind, entry.count))
        lines.append(body.ljust(4, b"\0") if len(body) <= 4 else place)
        tail += b"" if len(body) <= 4 else body.ljust(len(body) + len(body) % 2, b"\0")
    head = data[:2] + struct.pack(f"{order}HI", 42, start) + data[8:]
    count = struct.pack(f"{order}H", len(entries))
    return b"".join([head.ljust(start, b"\0"), count, *lines, bytes(4), tail])


def decode_deep(header: Header) -> tuple[Array, str]:
    """What Pillow cannot read, by tifffile: pixels and their mode. Raises ValueError for damage."""
    directory = tags.read_directory(header.bare)
    _check_pieces(header, directory)
    with tifffile().TiffFile(io.BytesIO(header.bare)) as file:
        pixels = np.asarray(file.pages[0].asarray(maxworkers=1))
    if directory.integer(header.bare, 277, 1) > 1 and directory.integer(header.bare, 284, 1) == 2:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[1::-1] != header.size or pixels.dtype.itemsize > 2:
        raise ValueError("it contradicts itself")
    kind = directory.integer(header.bare, _POLARITY, 1)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if kind == _WHITE_IS_ZERO:
        pixels = np.iinfo(pixels.dtype).max - pixels
    mode = "CMYK" if kind == _INKS else DEEP_MODES[channels]
    native = pixels.dtype.newbyteorder("=")
    if native.itemsize == 1:
        mode = "L" if channels == 1 else mode.partition(";")[0]
    return pixels.astype(native), mode


def _check_pieces(header: Header, directory: Directory) -> None:
    """Raises ValueError where strips or tiles are missing: tifffile would leave them black."""
    data, (width, height) = header.bare, header.size
    number = directory.integer
    planes = number(data, 277, 1) if number(data, _PLANES, 1) == 2 else 1
    if 322 in directory.entries:
        across, down = number(data, 322, 0), number(data, 323, 0)
        offsets, lengths = directory.integers(data, 324), directory.integers(data, 325)
    else:
        across, down = width, min(number(data, 278, height), height)
        offsets, lengths = directory.integers(data, 273), directory.integers(data, 279)
    if across < 1 or down < 1:
        raise ValueError("its strips have no size")
    pieces = ceil(width / across) * ceil(height / down) * planes
    if len(offsets) != pieces or len(lengths) != pieces:
        raise ValueError(f"it has {len(offsets)} strips or tiles, not {pieces}")
    for offset, length in zip(offsets, lengths, strict=True):
        if length == 0 or offset + length > len(data):
            raise ValueError("a strip or tile lies outside the file")


def write(pixels: Array, mode: str, picture: DecodedImage) -> bytes:
    """In strips, little-endian; with the source's compression, polarity, alpha and tags."""
    stored = _Stored.of(picture)
    values = {}
    if stored.polarity == _WHITE_IS_ZERO and mode in ("1", "L", "I;16"):
        pixels, values[_POLARITY] = ~pixels, _WHITE_IS_ZERO
    if picture.has_alpha:
        values[_EXTRA] = stored.extra
    compression = _for_mode(stored.compression, mode)
    predicted = stored.predicted and mode != "1"
    if mode.endswith(";16"):
        written = _by_tifffile(pixels, mode, compression, predicted=predicted)
    else:
        written = _by_pillow(pillow_image(pixels, mode), compression, predicted=predicted)
    return _tagged(tags.set_values(written, values), picture)


def _for_mode(compression: int, mode: str) -> int:
    return _DEFLATE if compression in _BILEVEL and mode != "1" else compression


def write_indexed(image: Image.Image, picture: DecodedImage) -> bytes:
    """A palette image, stored as the source is."""
    stored = _Stored.of(picture)
    written = _by_pillow(image, stored.compression, predicted=stored.predicted)
    return _tagged(written, picture)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """How a TIFF source keeps its pixels, in the numbers of the specification."""

    compression: int = _DEFLATE
    predicted: bool = True
    polarity: int = _BLACK_IS_ZERO
    extra: int = _UNASSOCIATED

    @classmethod
    def of(cls, picture: DecodedImage) -> _Stored:
        if picture.format != "TIFF" or not picture.source:
            return cls()
        data, directory = picture.source, tags.read_directory(picture.source)
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


def _tagged(written: bytes, picture: DecodedImage) -> bytes:
    """The file with the metadata: the source's tags if it was a TIFF, else its EXIF block."""
    metadata = picture.metadata
    added = {_XMP: (1, metadata.xmp)} if metadata.xmp else {}
    if picture.format == "TIFF" and picture.source:
        added |= _resources(picture.source)
        dropped = {_EXTRA} - tags.read_directory(picture.source).entries.keys()
        return tags.copy_tags(
            written, picture.source, but=_CHANGED, added=added, dropped=frozenset(dropped)
        )
    if metadata.icc:
        added[_ICC] = (7, metadata.icc)
    if metadata.dpi:
        across, down = (struct.pack("<II", round(dots * 100), 100) for dots in metadata.dpi)
        added |= {282: (5, across), 283: (5, down), 296: (3, struct.pack("<H", 2))}
    return tags.copy_tags(written, metadata.exif or tags.EMPTY, but=_CHANGED, added=added)


def _resources(source: bytes) -> dict[int, tuple[int, bytes]]:
    resources = _bytes(source, tags.read_directory(source), _PHOTOSHOP)
    return {_PHOTOSHOP: (7, without_thumbnail(resources))} if resources else {}
