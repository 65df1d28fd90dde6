"""JPEG's marker segments, by ITU-T T.81, annex B: finding, counting and writing them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # start and end of image
START_OF_SCAN = 0xDA
QUANTISATION = 0xDB
APP0, APP1, APP2, APP13, APP14, APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
COMMENT = 0xFE
PROGRESSIVE = 0xC2
# 0xC4, 0xC8 and 0xCC are Huffman tables, reserved, and arithmetic conditioning.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# A marker that ends entropy-coded data: FF00 is an escaped FF there, FFD0 to FFD7 are restarts.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_FILL = re.compile(rb"\xff*+")  # bytes that may precede any marker


class MarkerError(ValueError):
    """There is something between two segments that is not a marker."""


@dataclass(frozen=True, slots=True)
class Segment:
    """start: offset of the marker; end: of what follows the segment.

    A scan's segment includes its entropy-coded data.
    """

    marker: int
    start: int
    end: int


def walk_segments(data: bytes, *, until: int | None = None) -> Iterator[Segment]:
    """Each segment from SOI to EOI, or to the first marker ``until``; raises MarkerError.

    The last segment of a file that is cut short ends past the data.
    """
    start = len(SOI)
    while start + 4 <= len(data) and data[start : start + 2] != EOI:
        if data[start] != 0xFF:
            raise MarkerError(f"no marker at offset {start}")
        marker = data[start + 1]
        if marker == 0xFF:
            # In one step: a file may hold millions of them.
            fill = _FILL.match(data, start)
            start = fill.end() - 1 if fill else start
            if start + 1 == len(data):
                return
            continue
        if marker == until:
            return
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        if marker == START_OF_SCAN:
            match = _MARKER.search(data, end)
            end = match.start() if match else len(data)
        yield Segment(marker, start, end)
        start = end


def count_scans(data: bytes, start: int) -> int:
    """The scans from that offset on, as a decoder finds them: it skips what is not a marker."""
    count, match = 0, _MARKER.search(data, start)
    while match and data[match.start() : match.end()] != EOI:
        count += data[match.start() + 1] == START_OF_SCAN
        length = int.from_bytes(data[match.end() : match.end() + 2])
        match = _MARKER.search(data, match.end() + length)
    return count


def make_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
