"""TIFF directories, as TIFF files and EXIF blocks hold them: read, and patched in place."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ORIENTATION = 0x0112
SUBDIRECTORIES = frozenset({34665, 34853, 40965})  # EXIF, GPS, interoperability
# Description, maker, model, resolution, software, date, artist, copyright, Windows' own.
_SHARED = SUBDIRECTORIES | {
    270,
    271,
    272,
    282,
    283,
    296,
    305,
    306,
    315,
    33432,
    *range(40091, 40096),
}
THUMBNAIL_OFFSET = 0x0201
THUMBNAIL_LENGTH = 0x0202

# Bytes of one value, by TIFF type: byte, ascii, short, long, rational, signed ones, floats.
TYPE_SIZES: Mapping[int, int] = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8},
    **{11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8},
}
# Bytes of one number, where values are made of numbers; a rational is two of 4.
_WORDS: Mapping[int, int] = {
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 5, 9, 10, 11, 13), 4),
    12: 8,
}
_INTEGERS: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
EMPTY = b"II*\0\x08\0\0\0" + bytes(6)


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
    next_pointer: int

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
    except (struct.error, OverflowError) as error:
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
        # Readers take the first of two tags of a number; tifffile writes two descriptions.
        if tag not in entries and kind in TYPE_SIZES and value + length <= len(data):
            entries[tag] = Entry(tag=tag, type=kind, count=values, place=value, length=length)
    end = first + count * width
    following = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, end)[0]
    return Directory(order=order, big=big, entries=entries, next=following, next_pointer=end)


def orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 where the block says nothing sensible."""
    try:
        directory = read_directory(exif)
    except DirectoryError:
        return 1
    value = directory.integer(exif, ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def reset_orientation(exif: bytes) -> bytes:
    """The block with orientation 1 and without its thumbnail, which shows the old picture.

    Everything else keeps its bytes and its place, so maker notes with absolute offsets survive.
    """
    block = bytearray(set_orientation(exif, 1))
    try:
        first = read_directory(block)
    except DirectoryError:
        return exif
    if first.next:
        _drop_thumbnail(block, first)
    return bytes(block)


def set_orientation(exif: bytes, orientation: int) -> bytes:
    """The block with that orientation, 1 to 8, where it names one; otherwise as it is."""
    block = bytearray(exif)
    try:
        first = read_directory(block)
    except DirectoryError:
        return exif
    entry = first.entries.get(ORIENTATION)
    if entry and entry.count and entry.type in _INTEGERS:
        struct.pack_into(f"{first.order}{_INTEGERS[entry.type]}", block, entry.place, orientation)
    return bytes(block)


def _drop_thumbnail(block: bytearray, first: Directory) -> None:
    struct.pack_into(f"{first.order}I", block, first.next_pointer, 0)
    try:
        second = read_directory(block, first.next)
    except DirectoryError:
        return
    start = second.integer(block, THUMBNAIL_OFFSET, 0)
    end = start + second.integer(block, THUMBNAIL_LENGTH, 0)
    if 0 < start < end <= len(block):
        block[start:end] = bytes(end - start)


@dataclass(frozen=True, kw_only=True)
class _Value:
    """One tag on its way into another file: little-endian bytes, or a directory of its own."""

    tag: int
    type: int
    count: int
    body: bytes = b""
    inner: tuple[_Value, ...] = ()


def copy_tags(
    file: bytes,
    source: bytes,
    *,
    but: frozenset[int],
    added: Mapping[int, tuple[int, bytes]],
    dropped: frozenset[int] = frozenset(),
) -> bytes:
    """A little-endian TIFF file with the source's tags except ``but``, which stand before its own.

    added: further tags, the type and the bytes of each. dropped: of the file's own. The new
    directory goes to the end and nothing else moves. Raises DirectoryError where one of the two
    is no TIFF.
    """
    ours, theirs = read_directory(file), read_directory(source)
    values = {one.tag: one for one in _values(file, ours, but=dropped)}
    values |= {one.tag: one for one in _values(source, theirs, but=but)}
    for tag, (kind, body) in added.items():
        values[tag] = _Value(tag=tag, type=kind, count=len(body) // TYPE_SIZES[kind], body=body)
    start = len(file) + len(file) % 2
    head = file[:4] + struct.pack("<I", start) + file[8:]
    return head.ljust(start, b"\0") + _packed(tuple(values.values()), start)


def block(source: bytes) -> bytes:
    """An EXIF block of the tags that EXIF shares with a TIFF file; b"" where it has none."""
    directory = read_directory(source)
    values = _values(source, directory, but=frozenset(directory.entries) - _SHARED)
    return struct.pack("<2sHI", b"II", 42, 8) + _packed(values, 8) if values else b""


def set_values(file: bytes, values: Mapping[int, int]) -> bytes:
    """A TIFF file with other whole numbers in tags that it has, each of a single value."""
    patched, directory = bytearray(file), read_directory(file)
    for tag, value in values.items():
        entry = directory.entries[tag]
        struct.pack_into(f"{directory.order}{_INTEGERS[entry.type]}", patched, entry.place, value)
    return bytes(patched)


def _values(data: bytes, directory: Directory, *, but: frozenset[int]) -> tuple[_Value, ...]:
    found = []
    for tag, entry in directory.entries.items():
        body = data[entry.place : entry.place + entry.length]
        if tag in SUBDIRECTORIES and tag not in but:
            found += _subdirectory(data, directory, tag)
        elif tag not in but and entry.type < 16:
            body = body if directory.order == "<" else _swapped(body, _WORDS.get(entry.type, 1))
            found.append(_Value(tag=tag, type=entry.type, count=entry.count, body=body))
    return tuple(found)


def _subdirectory(data: bytes, directory: Directory, tag: int) -> list[_Value]:
    """The directory that a tag points to; nothing where it is damaged."""
    try:
        offset = directory.integer(data, tag, 0)
        found = _read(data, offset, directory.order, big=directory.big)
    except (DirectoryError, struct.error):
        return []
    # A directory that points at itself would never end.
    inner = _values(data, found, but=SUBDIRECTORIES)
    return [_Value(tag=tag, type=4, count=1, inner=inner)] if inner else []


def _swapped(body: bytes, size: int) -> bytes:
    return b"".join(body[at : at + size][::-1] for at in range(0, len(body), size))


def _packed(values: tuple[_Value, ...], start: int) -> bytes:
    """A directory that is to lie at the offset, with what it points to behind it."""
    behind = start + 2 + 12 * len(values) + 4
    lines, tail = [struct.pack("<H", len(values))], b""
    for value in sorted(values, key=lambda one: one.tag):
        place = behind + len(tail)
        body = _packed(value.inner, place) if value.inner else value.body
        inline = len(body) <= 4 and not value.inner
        lines.append(struct.pack("<HHI", value.tag, value.type, value.count))
        lines.append(body.ljust(4, b"\0") if inline else struct.pack("<I", place))
        tail += b"" if inline else body + bytes(len(body) % 2)
    return b"".join([*lines, bytes(4), tail])
