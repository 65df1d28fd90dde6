"""TIFF directories, as TIFF files and EXIF blocks hold them: read, and patched in place."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ORIENTATION = 0x0112
THUMBNAIL_OFFSET = 0x0201
THUMBNAIL_LENGTH = 0x0202

# Bytes of one value, by TIFF type: byte, ascii, short, long, rational, signed ones, floats.
TYPE_SIZES: Mapping[int, int] = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8},
    **{11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8},
}
_INTEGERS: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}


class DirectoryError(ValueError):
    """The directory does not lie within the data, or contradicts itself."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tag. place: the offset of its value in the data; length: the value's bytes."""

    tag: int
    type: int
    count: int
    place: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Directory:
    """One IFD. next: the offset of the directory that follows, 0 for none; next_place: of that."""

    order: Literal["<", ">"]
    big: bool
    entries: Mapping[int, Entry]
    next: int
    next_place: int

    def integers(self, data: bytes | bytearray, tag: int) -> tuple[int, ...]:
        """The tag's whole numbers; () where it is absent or of another type."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _INTEGERS:
            return ()
        form = f"{self.order}{entry.count}{_INTEGERS[entry.type]}"
        return tuple(struct.unpack_from(form, data, entry.place))

    def integer(self, data: bytes | bytearray, tag: int, default: int) -> int:
        return next(iter(self.integers(data, tag)), default)


def read_directory(data: bytes | bytearray, offset: int | None = None) -> Directory:
    """The first directory of TIFF data, or the one at the offset; raises DirectoryError."""
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    try:
        if offset is None:
            (offset,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        return _read(data, offset, order, big=big)
    except struct.error as error:
        raise DirectoryError("the directory lies past the end of the data") from error


def _read(
    data: bytes | bytearray, offset: int, order: Literal["<", ">"], *, big: bool
) -> Directory:
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, offset)
    first, width, inline = offset + (8 if big else 2), 20 if big else 12, 8 if big else 4
    if first + count * width > len(data):
        raise DirectoryError("the directory lies past the end of the data")
    entries = {}
    for place in range(first, first + count * width, width):
        tag, kind, values = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, place)
        length = TYPE_SIZES.get(kind, 0) * values
        value = place + width - inline
        if length > inline:
            (value,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, value)
        if kind in TYPE_SIZES and value + length <= len(data):
            entries[tag] = Entry(tag=tag, type=kind, count=values, place=value, length=length)
    end = first + count * width
    following = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, end)[0]
    return Directory(order=order, big=big, entries=entries, next=following, next_place=end)


def orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 where the block says nothing sensible."""
    try:
        directory = read_directory(exif)
    except DirectoryError:
        return 1
    value = directory.integer(exif, ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def upright(exif: bytes) -> bytes:
    """The block with orientation 1 and without its thumbnail, which shows the old picture.

    Everything else keeps its bytes and its place, so maker notes with absolute offsets survive.
    """
    block = bytearray(exif)
    try:
        first = read_directory(block)
        if entry := first.entries.get(ORIENTATION):
            struct.pack_into(
                f"{first.order}{_INTEGERS.get(entry.type, 'H')}", block, entry.place, 1
            )
        if first.next:
            _drop_thumbnail(block, first)
    except DirectoryError:
        return exif
    return bytes(block)


def _drop_thumbnail(block: bytearray, first: Directory) -> None:
    second = read_directory(block, first.next)
    start = second.integer(block, THUMBNAIL_OFFSET, 0)
    end = start + second.integer(block, THUMBNAIL_LENGTH, 0)
    if 0 < start < end <= len(block):
        block[start:end] = bytes(end - start)
    struct.pack_into(f"{first.order}I", block, first.next_place, 0)
