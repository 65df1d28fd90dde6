"""JPEG files: their headers, decoding, and encoding as a whole or by splicing."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import JpegImagePlugin

from shared.errors import ImageError
from shared.images import jpeg_splice, pillow, tiff_ifd, xmp
from shared.images.codec import CannotSplice, Codec, DecodedPixels, Header, Spliced, truncated
from shared.images.image import DecodedImage, Metadata, SourceEncoding, apply_orientation
from shared.images.jpeg_markers import (
    APP0,
    APP1,
    APP2,
    APP13,
    APP14,
    APP15,
    COMMENT,
    FRAMES,
    PROGRESSIVE,
    SOI,
    START_OF_SCAN,
    MarkerError,
    count_scans,
    make_segment,
    walk_segments,
)
from shared.images.photoshop import without_thumbnail

QUALITY = 95

_EXIF, _ICC, _PHOTOSHOP = b"Exif\0\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0"
_JFIF = b"JFIF\0"
_PROFILE_PIECE_BYTES = 65519  # what ICC_PROFILE, number and count leave of a segment
_MAX_SEGMENT_BYTES = 65533  # in the body of a segment
_MAX_SEGMENTS = 10_000  # before the first scan; a file with much metadata has a few hundred
_MAX_SCANS = 100  # a progressive file has about ten
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # the others undo themselves


def read_header(data: bytes) -> Header:
    """Raises ImageError if the frame's size is not in the data."""
    segments, pixels_start = _collect_segments(data)
    if segments.frame is None:
        raise truncated("JPEG")
    marker, body = segments.frame
    depth, height, width = struct.unpack_from(">BHH", body)
    return Header(
        size=(width, height),
        refusal=_refusal(marker, depth) or _scan_refusal(data, pixels_start),
        orientation=tiff_ifd.read_orientation(segments.exif),
        bare=b"".join([SOI, *segments.needed, data[pixels_start:]]),
        encoding=SourceEncoding(lossless=False, progressive=marker == PROGRESSIVE),
        metadata=Metadata(
            segments=tuple(segments.kept),
            exif=tiff_ifd.reset_orientation(segments.exif),
            icc=b"".join(segments.profile[number] for number in sorted(segments.profile)),
            xmp=xmp.read_jpeg_bodies(segments.packets),
            dpi=segments.dpi,
        ),
    )


def _collect_segments(data: bytes) -> tuple[_HeaderSegments, int]:
    """The segments before the first scan, and the offset behind them."""
    segments, end = _HeaderSegments(), len(SOI)
    try:
        for count, segment in enumerate(walk_segments(data, until=START_OF_SCAN)):
            if segment.end > len(data):
                break
            if count == _MAX_SEGMENTS:
                message = f"the JPEG file has over {count:,} segments of metadata; save it again"
                raise ImageError(message)
            segments.add(segment.marker, data[segment.start : segment.end])
            end = segment.end
    except MarkerError as error:
        message = "the JPEG file is damaged before its pixels; upload it again"
        raise ImageError(message) from error
    return segments, end


@dataclass
class _HeaderSegments:
    """What the segments hold. needed: to decode the pixels; kept: as metadata."""

    frame: tuple[int, bytes] | None = None
    exif: bytes = b""
    packets: list[bytes] = field(default_factory=list)
    profile: dict[int, bytes] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    needed: list[bytes] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)

    def add(self, marker: int, segment: bytes) -> None:
        body = segment[4:]
        if marker in FRAMES:
            self.frame = marker, body
        if marker in (APP0, APP14) or not (APP0 <= marker <= APP15 or marker == COMMENT):
            self.needed.append(segment)
        if marker == APP1 and body.startswith(_EXIF):
            self.exif = self.exif or body[len(_EXIF) :]
            segment = make_segment(APP1, _EXIF + tiff_ifd.reset_orientation(body[len(_EXIF) :]))
        elif marker == APP1 and xmp.is_jpeg_body(body):
            self.packets.append(body)
        elif marker == APP2 and body.startswith(_ICC):
            self.profile[body[len(_ICC)]] = body[len(_ICC) + 2 :]
        elif marker == APP0 and body.startswith(_JFIF):
            self.dpi = _dpi(body)
        elif marker == APP13 and body.startswith(_PHOTOSHOP):
            resources = without_thumbnail(body[len(_PHOTOSHOP) :])
            segment = make_segment(APP13, _PHOTOSHOP + resources)
        if _is_kept(marker, body):
            self.kept.append(segment)


def _dpi(body: bytes) -> tuple[float, float] | None:
    """From JFIF's segment: per inch, or per centimetre."""
    unit, across, down = struct.unpack_from(">BHH", body, 7)
    scale = {1: 1.0, 2: 2.54}.get(unit)
    return (across * scale, down * scale) if scale and across and down else None


def _is_kept(marker: int, body: bytes) -> bool:
    """Metadata, except what lists or shows other versions of the image."""
    if marker == APP0:
        return not body.startswith(b"JFXX\0")
    if marker == APP2:
        return not body.startswith(b"MPF\0")
    return marker == COMMENT or (APP0 <= marker <= APP15 and marker != APP14)


def _refusal(marker: int, depth: int) -> str:
    """Why the file cannot be kept exactly, by ITU-T T.81, table B.1."""
    if marker in (0xC3, 0xC7, 0xCB, 0xCF):
        return "is coded without loss, which few programs read; save it as PNG or baseline JPEG"
    if marker in (0xC5, 0xC6, 0xCD, 0xCE):
        return "is hierarchical, which few programs read; save it as baseline JPEG"
    if marker in (0xC9, 0xCA):
        return "is arithmetic-coded, which few programs read; save it as baseline JPEG"
    return "" if depth == 8 else f"has {depth} bits a channel; save it with 8"


def _scan_refusal(data: bytes, start: int) -> str:
    """Each scan makes a decoder walk over the whole image, however few bytes it has."""
    # Counting by markers is slow; most files have too few bytes that look like a scan.
    if data.count(b"\xff\xda", start) <= _MAX_SCANS:
        return ""
    scans = count_scans(data, start)
    if scans <= _MAX_SCANS:
        return ""
    return f"has {scans} scans, {_MAX_SCANS} at most are read; save it again as baseline JPEG"


def decode(header: Header) -> DecodedPixels:
    image = _load(header)
    pixels, mode = pillow.pixels_of(image)
    encoding = header.encoding
    # Pillow writes CMYK with tables and sampling of its own.
    if image.layers <= 3:
        encoding = replace(
            encoding,
            rgb_jpeg=image.layers == 3 and image.info.get("adobe_transform") == 0,
            quantisation=_tables(image, swap_axes=header.orientation >= 5),
            subsampling=_subsampling(image, swap_axes=header.orientation >= 5),
        )
    return DecodedPixels(pixels=pixels, mode=mode, encoding=encoding)


def _load(header: Header) -> Any:
    """A JpegImageFile. Raises ImageError if pixels are missing, not only the EOI marker."""
    plugin = JpegImagePlugin.JpegImageFile
    if not jpeg_splice.lacks_end(header.bare):
        return pillow.load(plugin, header, header.bare)
    try:
        image, other = (
            pillow.load(plugin, header, data) for data in jpeg_splice.complete(header.bare)
        )
    except CannotSplice as error:
        raise truncated("JPEG") from error
    if image.tobytes() != other.tobytes():
        raise truncated("JPEG")
    return image


def _tables(
    image: JpegImagePlugin.JpegImageFile, *, swap_axes: bool
) -> tuple[tuple[int, ...], ...]:
    """A table per component, the last one standing for the rest, as Pillow writes them."""
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
    if any(component[1:3] != (1, 1) for component in chroma):
        return 0
    return {(2, 1): 1, (2, 2): 2}.get((down, across) if swap_axes else (across, down), 0)


def replace_xmp(segments: Sequence[bytes], packet: bytes) -> tuple[bytes, ...]:
    """The segments with that packet instead of any they hold, behind EXIF; with none for b""."""
    others = [
        segment for segment in segments if segment[1] != APP1 or not xmp.is_jpeg_body(segment[4:])
    ]
    place = 0
    while place < len(others) and (others[place][1] == APP0 or _is_exif(others[place])):
        place += 1
    bodies = xmp.make_jpeg_bodies(packet) if packet else []
    packets = [make_segment(APP1, body) for body in bodies]
    return (*others[:place], *packets, *others[place:])


def _set_orientation(segments: Sequence[bytes], orientation: int) -> tuple[bytes, ...]:
    """The segments with that orientation, 1 to 8, in the EXIF block that names one."""
    return tuple(
        make_segment(APP1, _EXIF + tiff_ifd.set_orientation(segment[10:], orientation))
        if _is_exif(segment)
        else segment
        for segment in segments
    )


def _is_exif(segment: bytes) -> bool:
    return segment[1] == APP1 and segment[4:10] == _EXIF


def splice(image: DecodedImage) -> Spliced:
    """The source with its touched blocks rewritten, in the orientation it is stored in.

    Raises CannotSplice.
    """
    assert image.touched is not None  # noqa: S101 - encode returns the source then
    orientation = read_header(image.source).orientation
    inverse = _INVERSE_ORIENTATION.get(orientation, orientation)
    segments = image.metadata.segments
    if orientation > 1:
        segments = _set_orientation(segments, orientation)
    spliced = jpeg_splice.splice(
        image.source,
        apply_orientation(image.pixels, inverse),
        apply_orientation(image.touched, inverse),
        metadata=b"".join(segments),
    )
    return replace(spliced, reach=apply_orientation(spliced.reach, orientation))


def encode(image: DecodedImage, quality: int | None) -> bytes:
    """Encodes every block anew; without a quality, with the source's tables if it was a JPEG."""
    encoding, metadata, was_jpeg = image.encoding, image.metadata, image.format == "JPEG"
    options: dict[str, Any] = {"quality": quality or QUALITY, "progressive": encoding.progressive}
    if metadata.dpi:
        options["dpi"] = metadata.dpi
    if was_jpeg and encoding.quantisation:
        options |= {"subsampling": encoding.subsampling, "keep_rgb": encoding.rgb_jpeg}
        if quality is None:
            tables = [list(table) for table in encoding.quantisation]
            options |= {"quality": -1, "qtables": tables}
    buffer = io.BytesIO()
    image.to_pillow().save(buffer, "JPEG", **options)
    segments = metadata.segments if was_jpeg else _make_segments(metadata)
    return _insert_segments(buffer.getvalue(), segments, replace_jfif=was_jpeg)


def _insert_segments(written: bytes, segments: Sequence[bytes], *, replace_jfif: bool) -> bytes:
    """The file with the segments behind its JFIF segment, or in place of it."""
    start = end = len(SOI)
    if written[start + 1] == APP0:
        end += 2 + int.from_bytes(written[4:6])
    return written[: start if replace_jfif else end] + b"".join(segments) + written[end:]


def _make_segments(metadata: Metadata) -> list[bytes]:
    """EXIF, XMP and the colour profile as segments; raises ImageError for EXIF that is too long."""
    if len(_EXIF) + len(metadata.exif) > _MAX_SEGMENT_BYTES:
        raise ImageError(
            f"JPEG holds at most 64 kB of EXIF, not {len(metadata.exif)} bytes; "
            "write PNG, WebP or TIFF"
        )
    segments = [make_segment(APP1, _EXIF + metadata.exif)] if metadata.exif else []
    if metadata.xmp:
        segments += [make_segment(APP1, body) for body in xmp.make_jpeg_bodies(metadata.xmp)]
    starts = range(0, len(metadata.icc), _PROFILE_PIECE_BYTES)
    for number, start in enumerate(starts, 1):
        piece = metadata.icc[start : start + _PROFILE_PIECE_BYTES]
        segments.append(make_segment(APP2, _ICC + bytes([number, len(starts)]) + piece))
    return segments


CODEC = Codec(
    plugin=JpegImagePlugin.JpegImageFile,
    read_header=read_header,
    decode=decode,
    encode=encode,
    replace_xmp=replace_xmp,
    splice=splice,
)
