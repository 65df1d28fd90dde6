"""PNG files: their chunks, 16 bits a channel, palettes and transparent colours."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
from PIL import Image, PngImagePlugin

from shared.errors import ImageError
from shared.images import pillow, tiff_ifd, xmp
from shared.images.codec import Codec, DecodedPixels, Header
from shared.images.image import DEEP_MODES, Array, DecodedImage, Metadata, SourceEncoding
from shared.images.optional_libraries import imagecodecs

LEVEL = 4  # of deflate; level 6 takes 6.5 s for 24 megapixels (measured)

_KEPT = frozenset({b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI"})
_NEEDED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_MAX_PROFILE_BYTES = 16 << 20
_MAX_CHUNKS = 200_000  # 1.6 GB in libpng's chunks of 8 kB
_MAX_PACKETS = 8  # that are inflated, to find one that is not damaged
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types
_HEAD = 33  # bytes of signature and IHDR
_METRES_PER_INCH = 0.0254
_Chunk = tuple[bytes, int, int]  # name, start and end of the whole chunk


def read_header(data: bytes) -> Header:
    """Raises ImageError if the first chunk is not IHDR."""
    width, height, depth, colour_type = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR":
        raise ImageError("the PNG file does not start with its header; upload it again")
    chunks = list(islice(_chunks(data), _MAX_CHUNKS + 1))
    if len(chunks) > _MAX_CHUNKS:
        raise ImageError(f"the PNG file has over {_MAX_CHUNKS:,} chunks; save it again")
    bodies: dict[bytes, bytes] = {}
    for name, start, end in chunks:
        bodies.setdefault(name, data[start + 8 : end - 4])
    return Header(
        size=(width, height),
        orientation=tiff_ifd.read_orientation(bodies.get(b"eXIf", b"")),
        refusal="is animated; save one image per file" if b"acTL" in bodies else "",
        bare=_strip_metadata(data, chunks, colour_type),
        is_deep=depth == 16 and colour_type != _GREY,
        encoding=SourceEncoding(
            transparent_colour=_transparent_colour(bodies.get(b"tRNS", b""), depth, colour_type)
        ),
        metadata=_read_metadata(data, chunks, bodies),
    )


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Each chunk that the pixels need or that is complete; the last may end past the data."""
    start = 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        name = data[start + 4 : start + 8]
        if end > len(data) and name not in _NEEDED:
            return
        yield name, start, end
        start = end


def _strip_metadata(data: bytes, chunks: Sequence[_Chunk], colour_type: int) -> bytes:
    """The file without metadata, and without a transparent colour, which ``decode`` applies."""
    kept = [
        data[start:end]
        for name, start, end in chunks
        if name in _NEEDED and (name != b"tRNS" or colour_type == _PALETTE)
    ]
    return data[:8] + b"".join(kept)


def _read_metadata(data: bytes, chunks: Sequence[_Chunk], bodies: dict[bytes, bytes]) -> Metadata:
    segments = []
    packets = []
    for name, start, end in chunks:
        if name == b"eXIf":
            exif = tiff_ifd.reset_orientation(data[start + 8 : end - 4])
            segments.append(make_chunk(name, exif))
        # A lower-case fourth letter marks a chunk that is safe to copy after an edit.
        elif name in _KEPT or (name[3:4].islower() and name not in _NEEDED):
            segments.append(data[start:end])
        if name == b"iTXt" and data.startswith(xmp.PNG_KEYWORD, start + 8):
            packets.append((start + 8, end - 4))
    return Metadata(
        segments=tuple(segments),
        exif=tiff_ifd.reset_orientation(bodies.get(b"eXIf", b"")),
        icc=_profile(bodies.get(b"iCCP", b"")),
        xmp=_read_packet(data, packets),
        dpi=_dpi(bodies.get(b"pHYs", b"")),
    )


def _read_packet(data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """The first packet that is not damaged; b"" if there is none."""
    # Read one at a time: many packed packets would fill the memory.
    for start, end in places[:_MAX_PACKETS]:
        packet = xmp.read_png_text(data[start:end])
        if packet:
            return packet
    return b""


def _transparent_colour(body: bytes, depth: int, colour_type: int) -> tuple[int, ...]:
    """The colour in tRNS, in the range of the decoded pixels."""
    count = {_GREY: 1, _RGB: 3}.get(colour_type, 0)
    if not count or depth == 0 or len(body) < 2 * count:
        return ()
    scale = 255 // (2**depth - 1) if depth < 8 else 1
    return tuple(value % 2**depth * scale for value in struct.unpack_from(f">{count}H", body))


def _dpi(body: bytes) -> tuple[float, float] | None:
    if len(body) != 9 or body[8] != 1:  # 1: pixels per metre
        return None
    x, y = struct.unpack_from(">II", body)
    return x * _METRES_PER_INCH, y * _METRES_PER_INCH


def _profile(body: bytes) -> bytes:
    profile = xmp.inflate(body.partition(b"\0")[2][1:], _MAX_PROFILE_BYTES)
    return profile if len(profile) <= _MAX_PROFILE_BYTES else b""


def make_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def decode(header: Header) -> DecodedPixels:
    if header.is_deep:
        decoded = _decode_deep(header)
    else:
        decoded = pillow.decode(PngImagePlugin.PngImageFile, header)
    colour = header.encoding.transparent_colour
    if not colour:
        return decoded
    pixels, mode = add_alpha(decoded.pixels, decoded.mode, colour)
    return DecodedPixels(pixels=pixels, mode=mode, encoding=decoded.encoding)


def _decode_deep(header: Header) -> DecodedPixels:
    """16 bits a channel, by imagecodecs. Raises ValueError for damage."""
    pixels = np.asarray(imagecodecs().png_decode(header.bare))
    if pixels.dtype != np.uint16 or pixels.shape[1::-1] != header.size:
        raise ValueError("the pixels contradict the header")
    mode = DEEP_MODES[pixels.shape[2] if pixels.ndim == 3 else 1]
    return DecodedPixels(pixels=pixels, mode=mode, encoding=header.encoding)


def add_alpha(pixels: Array, mode: str, colour: tuple[int, ...]) -> tuple[Array, str]:
    """The pixels with an alpha channel that is 0 where they have the transparent colour."""
    if mode == "1":
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    colours = pixels.reshape(*pixels.shape[:2], -1)
    opaque = np.iinfo(colours.dtype).max
    alpha = np.where((colours == colour).all(axis=-1), 0, opaque).astype(colours.dtype)
    with_alpha = {"1": "LA", "L": "LA", "I;16": "LA;16", "RGB": "RGBA", "RGB;16": "RGBA;16"}
    return np.concatenate([colours, alpha[..., None]], axis=-1), with_alpha[mode]


def remove_alpha(pixels: Array, mode: str, colour: tuple[int, ...]) -> tuple[Array, str] | None:
    """The inverse of ``add_alpha``; None if alpha has values in between.

    An opaque pixel of the transparent colour changes by one level in its last channel.
    """
    opaque = np.iinfo(pixels.dtype).max
    is_clear, colours = pixels[..., -1] == 0, pixels[..., :-1].copy()
    if not (is_clear | (pixels[..., -1] == opaque)).all():
        return None
    clash = ~is_clear & (colours == colour).all(axis=-1)
    colours[clash, -1] ^= 1
    colours[is_clear] = colour
    without_alpha = {"LA": "L", "LA;16": "I;16", "RGBA": "RGB", "RGBA;16": "RGB;16"}
    return colours[..., 0] if colours.shape[-1] == 1 else colours, without_alpha[mode]


def encode(image: DecodedImage, _quality: int | None) -> bytes:
    """Keeps the source's transparent colour if it still expresses the alpha channel."""
    was_png, colour = image.format == "PNG", image.encoding.transparent_colour
    segments = list(image.metadata.segments) if was_png else _make_chunks(image.metadata)
    if was_png and colour and image.has_alpha:
        keyed = remove_alpha(image.pixels, image.mode, colour)
        if keyed is not None:
            image = replace(image, pixels=keyed[0], mode=keyed[1])
            segments.append(make_chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour)))
    return _insert_chunks(_encode_pixels(image), segments)


def _encode_pixels(image: DecodedImage) -> bytes:
    if image.mode.endswith(";16"):
        return bytes(imagecodecs().png_encode(np.ascontiguousarray(image.pixels), level=LEVEL))
    return _encode_by_pillow(image.to_pillow())


def encode_indexed(indexed: Image.Image, image: DecodedImage) -> bytes:
    return _insert_chunks(_encode_by_pillow(indexed), image.metadata.segments)


def _encode_by_pillow(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=LEVEL)
    return buffer.getvalue()


def _insert_chunks(written: bytes, chunks: Sequence[bytes]) -> bytes:
    return written[:_HEAD] + b"".join(chunks) + written[_HEAD:]


def replace_xmp(segments: Sequence[bytes], packet: bytes) -> tuple[bytes, ...]:
    """The chunks with that packet instead of any they hold; with none for b""."""
    start = b"iTXt" + xmp.PNG_KEYWORD
    others = (chunk for chunk in segments if not chunk[4:].startswith(start))
    return (*others, *([make_chunk(b"iTXt", xmp.make_png_text(packet))] if packet else []))


def _make_chunks(metadata: Metadata) -> list[bytes]:
    chunks = []
    if metadata.icc:
        chunks.append(make_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi:
        x, y = (round(dots / _METRES_PER_INCH) for dots in metadata.dpi)
        chunks.append(make_chunk(b"pHYs", struct.pack(">IIB", x, y, 1)))
    if metadata.exif:
        chunks.append(make_chunk(b"eXIf", metadata.exif))
    if metadata.xmp:
        chunks.append(make_chunk(b"iTXt", xmp.make_png_text(metadata.xmp)))
    return chunks


CODEC = Codec(
    plugin=PngImagePlugin.PngImageFile,
    read_header=read_header,
    decode=decode,
    encode=encode,
    encode_indexed=encode_indexed,
    replace_xmp=replace_xmp,
)
