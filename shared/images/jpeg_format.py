"""JPEG files: what their headers say, and files that are encoded as a whole."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from shared.errors import ImageError
from shared.images import tiff_ifd, xmp
from shared.images.header import Header, truncated
from shared.images.image import DecodedImage, Metadata
from shared.images.photoshop import without_thumbnail

QUALITY = 95

_EXIF, _ICC, _PHOTOSHOP = b"Exif\0\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0"
_APP0, _APP1, _APP2, _APP13, _APP14, _APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
_COMMENT = 0xFE
_JFIF = b"JFIF\0"
_TABLES_AMONG_FRAMES = (0xC4, 0xC8, 0xCC)
_PROGRESSIVE = 0xC2
_PROFILE_PIECE_BYTES = 65519
_MOST_BYTES = 65533
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_MOST_SCANS = 100


def read(data: bytes) -> Header:
    """Raises ImageError where the frame's size is not in the data."""
    found = _Found()
    place = 2
    for marker, start, place in _segments(data):
        found.add(marker, data[start:place])
    if found.frame is None:
        raise truncated("JPEG")
    marker, body = found.frame
    depth, height, width = struct.unpack_from(">BHH", body)
    return Header(
        format="JPEG",
        size=(width, height),
        refusal=_refusal(marker, depth) or _bomb(data, place),
        lossless=False,
        progressive=marker == _PROGRESSIVE,
        orientation=tiff_ifd.orientation(found.exif),
        dpi=found.dpi,
        bare=b"".join([data[:2], *found.needed, data[place:]]),
        segments=tuple(found.kept),
        exif=tiff_ifd.reset_orientation(found.exif),
        xmp=xmp.read_jpeg_bodies(found.packets),
        icc=b"".join(found.profile[key] for key in sorted(found.profile)),
    )


@dataclass
class _Found:
    """The segments seen so far. needed: for the pixels; kept: as metadata."""

    frame: tuple[int, bytes] | None = None
    exif: bytes = b""
    packets: list[bytes] = field(default_factory=list)
    profile: dict[int, bytes] = field(default_factory=dict)
    dpi: tuple[float, float] | None = None
    needed: list[bytes] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)

    def add(self, marker: int, segment: bytes) -> None:
        body = segment[4:]
        if 0xC0 <= marker <= 0xCF and marker not in _TABLES_AMONG_FRAMES:
            self.frame = marker, body
        if marker in (_APP0, _APP14) or not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            self.needed.append(segment)
        if marker == _APP1 and body.startswith(_EXIF):
            self.exif = self.exif or body[len(_EXIF) :]
            segment = make_segment(_APP1, _EXIF + tiff_ifd.reset_orientation(body[len(_EXIF) :]))
        elif marker == _APP1 and xmp.is_jpeg_body(body):
            self.packets.append(body)
        elif marker == _APP2 and body.startswith(_ICC):
            self.profile[body[len(_ICC)]] = body[len(_ICC) + 2 :]
        elif marker == _APP0 and body.startswith(_JFIF):
            self.dpi = _dpi(body)
        elif marker == _APP13 and body.startswith(_PHOTOSHOP):
            resources = without_thumbnail(body[len(_PHOTOSHOP) :])
            segment = make_segment(_APP13, _PHOTOSHOP + resources)
        if _is_kept(marker, body):
            self.kept.append(segment)


def _dpi(body: bytes) -> tuple[float, float] | None:
    """From JFIF's segment: per inch, or per centimetre."""
    unit, across, down = struct.unpack_from(">BHH", body, 7)
    scale = {1: 1.0, 2: 2.54}.get(unit)
    return (across * scale, down * scale) if scale and across and down else None


def _is_kept(marker: int, body: bytes) -> bool:
    """Metadata, except what lists or shows other versions of the picture."""
    if marker == _APP0:
        return not body.startswith(b"JFXX\0")
    if marker == _APP2:
        return not body.startswith(b"MPF\0")
    return marker == _COMMENT or (_APP0 <= marker <= _APP15 and marker != _APP14)


def _refusal(marker: int, depth: int) -> str:
    """Why the file cannot be kept exactly, by ITU-T T.81, table B.1."""
    if marker in (0xC3, 0xC7, 0xCB, 0xCF):
        return "is coded without loss, which few programs read; save it as PNG or baseline JPEG"
    if marker in (0xC5, 0xC6, 0xCD, 0xCE):
        return "is hierarchical, which few programs read; save it as baseline JPEG"
    if marker in (0xC9, 0xCA):
        return "is arithmetic-coded, which few programs read; save it as baseline JPEG"
    return "" if depth == 8 else f"has {depth} bits a channel; save it with 8"


def _bomb(data: bytes, start: int) -> str:
    """Each scan makes a decoder walk over the whole picture, however few bytes it has."""
    if data.count(b"\xff\xda", start) <= _MOST_SCANS:
        return ""  # most files; what follows is slow
    scans, found = 0, _MARKER.search(data, start)
    while found and data[found.start() + 1] != _END:
        scans += data[found.start() + 1] == _SCAN
        length = int.from_bytes(data[found.end() : found.end() + 2])
        found = _MARKER.search(data, found.end() + length)
    if scans <= _MOST_SCANS:
        return ""
    return f"has {scans} scans, {_MOST_SCANS} at most are read; save it again as baseline JPEG"


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment before the first scan, as far as the data goes."""
    start = 2
    while start + 4 <= len(data):
        if data[start] != 0xFF:
            raise ImageError("the JPEG file is damaged before its pixels; upload it again")
        marker = data[start + 1]
        if marker == 0xFF:
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if marker in (0xD9, 0xDA) or end > len(data):
            return
        yield marker, start, end
        start = end


def make_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_xmp(segments: Sequence[bytes], packet: bytes) -> tuple[bytes, ...]:
    """The segments with that packet instead of any they hold, behind the EXIF block."""
    others = [one for one in segments if one[1] != _APP1 or not xmp.is_jpeg_body(one[4:])]
    place = 0
    while place < len(others) and (others[place][1] == _APP0 or others[place][4:10] == _EXIF):
        place += 1
    packets = [make_segment(_APP1, body) for body in xmp.make_jpeg_bodies(packet)]
    return (*others[:place], *packets, *others[place:])


def with_orientation(segments: Sequence[bytes], orientation: int) -> tuple[bytes, ...]:
    """The segments with that orientation, 1 to 8, in the EXIF block that names one."""
    return tuple(
        make_segment(_APP1, _EXIF + tiff_ifd.set_orientation(one[10:], orientation))
        if one[1] == _APP1 and one[4:10] == _EXIF
        else one
        for one in segments
    )


def write(image: Image.Image, picture: DecodedImage, quality: int | None) -> bytes:
    """Every block encoded anew; without a quality, with the source's tables if it was a JPEG."""
    encoding, metadata, same = picture.encoding, picture.metadata, picture.format == "JPEG"
    options: dict[str, Any] = {"quality": quality or QUALITY, "progressive": encoding.progressive}
    if metadata.dpi:
        options["dpi"] = metadata.dpi
    if same and encoding.quantisation:
        options |= {"subsampling": encoding.subsampling, "keep_rgb": encoding.rgb_jpeg}
    if same and encoding.quantisation and quality is None:
        options |= {"quality": -1, "qtables": [list(table) for table in encoding.quantisation]}
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    written = buffer.getvalue()
    segments = b"".join(metadata.segments if same else _framed(metadata))
    head = 2
    if written[2:4] == b"\xff\xe0":
        after = 4 + int.from_bytes(written[4:6])
        head, written = (2, written[:2] + written[after:]) if same else (after, written)
    return written[:head] + segments + written[head:]


def _framed(metadata: Metadata) -> list[bytes]:
    """EXIF, XMP and the colour profile as segments; raises ImageError for EXIF that is too long."""
    if len(_EXIF) + len(metadata.exif) > _MOST_BYTES:
        raise ImageError(
            f"JPEG holds at most 64 kB of EXIF, not {len(metadata.exif)} bytes; "
            "write PNG, WebP or TIFF"
        )
    segments = [make_segment(_APP1, _EXIF + metadata.exif)] if metadata.exif else []
    if metadata.xmp:
        segments += [make_segment(_APP1, body) for body in xmp.make_jpeg_bodies(metadata.xmp)]
    starts = range(0, len(metadata.icc), _PROFILE_PIECE_BYTES)
    for number, start in enumerate(starts, 1):
        piece = metadata.icc[start : start + _PROFILE_PIECE_BYTES]
        segments.append(make_segment(_APP2, _ICC + bytes([number, len(starts)]) + piece))
    return segments
