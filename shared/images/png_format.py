"""PNG files: their chunks, 16 bits a channel and transparent colours."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import ImageError
from shared.images import tiff_ifd as tags
from shared.images import xmp as packets
from shared.images.header import Header
from shared.images.image import DEEP_MODES, Array, DecodedImage, Metadata, pillow_image
from shared.images.optional_libraries import imagecodecs

LEVEL = 4

_KEPT = frozenset({b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI"})
_NEEDED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_MAX_PROFILE_BYTES = 16 << 20
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types
_HEAD = 33  # bytes of signature and IHDR


def read(data: bytes) -> Header:
    """Raises ImageError where the first chunk is no header."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR":
        raise ImageError("the PNG file does not start with its header; upload it again")
    bodies: dict[bytes, bytes] = {}
    bare, segments = [data[:8]], []
    packet = b""
    for name, start, end in _chunks(data):
        body = data[start + 8 : end - 4]
        bodies.setdefault(name, body)
        if name in _NEEDED:
            if name != b"tRNS" or colour == _PALETTE:
                bare.append(data[start:end])
        elif name == b"eXIf":
            segments.append(png_chunk(name, tags.reset_orientation(body)))
        elif name in _KEPT or name[3:4].islower():
            segments.append(data[start:end])
        if name == b"iTXt" and body.startswith(packets.PNG_KEYWORD):
            packet = packet or packets.read_png_text(body)
    exif = bodies.get(b"eXIf", b"")
    frames = int.from_bytes(bodies.get(b"acTL", b"")[:4])
    return Header(
        format="PNG",
        size=(width, height),
        orientation=tags.orientation(exif),
        frames=max(frames, 2) if b"acTL" in bodies else 1,
        deep=depth == 16 and colour != _GREY,
        key=_key(bodies.get(b"tRNS", b""), depth, colour),
        dpi=_dpi(bodies.get(b"pHYs", b"")),
        bare=b"".join(bare),
        segments=tuple(segments),
        exif=tags.reset_orientation(exif),
        icc=_profile(bodies.get(b"iCCP", b"")),
        xmp=packet,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk; the last one may reach past the end of the data."""
    start = 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        name = data[start + 4 : start + 8]
        if end > len(data) and name not in _NEEDED:
            return
        yield name, start, end
        start = end


def _key(body: bytes, depth: int, colour: int) -> tuple[int, ...]:
    """The transparent colour, in the range of the decoded pixels."""
    count = {_GREY: 1, _RGB: 3}.get(colour, 0)
    if not count or depth == 0 or len(body) < 2 * count:
        return ()
    scale = 255 // (2**depth - 1) if depth < 8 else 1
    return tuple(value % 2**depth * scale for value in struct.unpack_from(f">{count}H", body))


def _dpi(body: bytes) -> tuple[float, float] | None:
    if len(body) != 9 or body[8] != 1:
        return None
    across, down = struct.unpack_from(">II", body)
    return across * 0.0254, down * 0.0254


def _profile(body: bytes) -> bytes:
    return packets.inflate(body.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def decode_deep(header: Header) -> tuple[Array, str]:
    """Pixels with 16 bits a channel, and their mode. Raises ValueError for damage."""
    pixels = np.asarray(imagecodecs().png_decode(header.bare))
    if pixels.dtype != np.uint16 or pixels.shape[1::-1] != header.size:
        raise ValueError("it contradicts itself")
    return pixels, DEEP_MODES[pixels.shape[2] if pixels.ndim == 3 else 1]


def keyed(pixels: Array, mode: str, key: tuple[int, ...]) -> tuple[Array, str]:
    """The pixels with an alpha channel that is 0 where they have the transparent colour."""
    if mode == "1":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    colours = pixels.reshape(*pixels.shape[:2], -1)
    full = np.iinfo(colours.dtype).max
    alpha = np.where((colours == key).all(axis=-1), 0, full).astype(colours.dtype)
    named = {"1": "LA", "L": "LA", "I;16": "LA;16", "RGB": "RGBA", "RGB;16": "RGBA;16"}[mode]
    return np.concatenate([colours, alpha[..., None]], axis=-1), named


def without_alpha(pixels: Array, mode: str, key: tuple[int, ...]) -> tuple[Array, str] | None:
    """What ``keyed`` would make these pixels of; None where alpha has values between.

    An opaque pixel that would have the transparent colour moves by one step of its last channel.
    """
    full = np.iinfo(pixels.dtype).max
    clear, colours = pixels[..., -1] == 0, pixels[..., :-1].copy()
    if not (clear | (pixels[..., -1] == full)).all():
        return None
    clash = ~clear & (colours == key).all(axis=-1)
    colours[clash, -1] ^= 1
    colours[clear] = key
    named = {"LA": "L", "LA;16": "I;16", "RGBA": "RGB", "RGBA;16": "RGB;16"}[mode]
    return colours[..., 0] if colours.shape[-1] == 1 else colours, named


def write(pixels: Array, mode: str, picture: DecodedImage) -> bytes:
    """The source's transparent colour is kept, if it had one and it still says everything."""
    same, key = picture.format == "PNG", picture.encoding.key
    segments = list(picture.metadata.segments) if same else _framed(picture.metadata)
    plain = without_alpha(pixels, mode, key) if same and key and picture.has_alpha else None
    if plain is not None:
        pixels, mode = plain
        segments.append(png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    if mode.endswith(";16"):
        written = bytes(imagecodecs().png_encode(np.ascontiguousarray(pixels), level=LEVEL))
    else:
        written = _by_pillow(pillow_image(pixels, mode))
    return written[:_HEAD] + b"".join(segments) + written[_HEAD:]


def write_indexed(image: Image.Image, alphas: bytes, metadata: Metadata) -> bytes:
    """A palette image; alphas: of the palette's entries, b"" where all are opaque."""
    written = _by_pillow(image, **({"transparency": alphas} if alphas else {}))
    return written[:_HEAD] + b"".join(metadata.segments) + written[_HEAD:]


def _by_pillow(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=LEVEL, **options)
    return buffer.getvalue()


def with_xmp(segments: Sequence[bytes], packet: bytes) -> tuple[bytes, ...]:
    """The chunks with that packet instead of any they hold."""
    keyword = b"iTXt" + packets.PNG_KEYWORD
    others = (one for one in segments if one[4 : 4 + len(keyword)] != keyword)
    return (*others, png_chunk(b"iTXt", packets.make_png_text(packet)))


def _framed(metadata: Metadata) -> list[bytes]:
    chunks = []
    if metadata.icc:
        chunks.append(png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)
        chunks.append(png_chunk(b"pHYs", struct.pack(">IIB", x, y, 1)))
    if metadata.exif:
        chunks.append(png_chunk(b"eXIf", metadata.exif))
    if metadata.xmp:
        chunks.append(png_chunk(b"iTXt", packets.make_png_text(metadata.xmp)))
    return chunks
