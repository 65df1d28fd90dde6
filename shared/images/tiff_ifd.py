"""TIFF image file directories (IFDs), in TIFF files and EXIF blocks: reading, patching, writing."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

ORIENTATION = 0x0112
SUBDIRECTORIES = frozenset({34665, 34853, 40965})  # EXIF, GPS, interoperability
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
# What EXIF shares with TIFF: description, maker, model, resolution, software, date, artist,
# copyright, Windows' own.
_SHARED = (
    SUBDIRECTORIES
    | {X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT}
    | {270, 271, 272, 305, 306, 315, 33432, *range(40091, 40096)}
)
THUMBNAIL_OFFSET = 0x0201
THUMBNAIL_LENGTH = 0x0202

# Bytes of one value, by TIFF type: byte, ascii, short, long, rational, signed ones, floats.
TYPE_SIZES: Mapping[int, int] = {
    **{1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8},
    **{11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8},
}
# Bytes of one number, if values are made of numbers; a rational is two of 4.
_WORDS: Mapping[int, int] = {
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 5, 9, 10, 11, 13), 4),
    12: 8,
}
# Tags that share bytes could make a small file hold far more than its size.
_MAX_ENTRIES, _SHARED_BYTES = 1 << 16, 1 << 16
_INTEGERS: Mapping[int, str] = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
EMPTY = b"II*\0\x08\0\0\0" + bytes(6)


class DirectoryError(ValueError):
    """The directory does not lie within the data, or contradicts itself."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tag. offset: of its value in the data; length: of the value in bytes."""

    tag: int
    type: int
    count: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Directory:
    """One IFD. order: struct's byte order; big: whether it is BigTIFF's.

    next: the offset of the next directory, 0 for none; next_pointer: where that is stored.
    """

    order: Literal["<", ">"]
    big: bool
    entries: Mapping[int, Entry]
    next: int
    next_pointer: int

    def integers(self, data: bytes | bytearray, tag: int) -> tuple[int, ...]:
        """The tag's whole numbers; () if it is absent or of another type."""
        entry = self.entries.get(tag)
        return self._unpack(data, entry, entry.count) if entry else ()

    def _unpack(self, data: bytes | bytearray, entry: Entry, count: int) -> tuple[int, ...]:
        if entry.type not in _INTEGERS:
            return ()
        layout = f"{self.order}{count}{_INTEGERS[entry.type]}"
        return tuple(struct.unpack_from(layout, data, entry.offset))

    def integer(self, data: bytes | bytearray, tag: int, default: int) -> int:
        """The tag's first whole number, or the default."""
        entry = self.entries.get(tag)
        first = self._unpack(data, entry, 1) if entry and entry.count else ()
        return first[0] if first else default

    def value(self, data: bytes | bytearray, tag: int) -> bytes:
        """The tag's bytes as stored; b"" if it is absent."""
        entry = self.entries.get(tag)
        return bytes(data[entry.offset : entry.offset + entry.length]) if entry else b""


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
    if count > _MAX_ENTRIES or first + count * width > len(data):
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
            entries[tag] = Entry(tag=tag, type=kind, count=values, offset=value, length=length)
    end = first + count * width
    following = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, end)[0]
    return Directory(order=order, big=big, entries=entries, next=following, next_pointer=end)


def read_orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 if the block has no valid one."""
    try:
        directory = read_directory(exif)
    except DirectoryError:
        return 1
    value = directory.integer(exif, ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def read_exif_resolution(exif: bytes) -> tuple[float, float] | None:
    """(x, y) dots per inch; None if the block does not say."""
    try:
        return read_resolution(exif, read_directory(exif))
    except DirectoryError:
        return None


def read_resolution(data: bytes, directory: Directory) -> tuple[float, float] | None:
    """(x, y) dots per inch; None if the directory does not say."""
    sides = [directory.value(data, tag) for tag in (X_RESOLUTION, Y_RESOLUTION)]
    # 2: per inch, which is the default; 3: per centimetre.
    unit = {2: 1.0, 3: 2.54}.get(directory.integer(data, RESOLUTION_UNIT, 2))
    if unit is None or any(len(side) != 8 for side in sides):
        return None
    pairs = [struct.unpack(f"{directory.order}II", side) for side in sides]
    if any(0 in pair for pair in pairs):
        return None
    return pairs[0][0] / pairs[0][1] * unit, pairs[1][0] / pairs[1][1] * unit


def reset_orientation(exif: bytes) -> bytes:
    """The block with orientation 1 and without its thumbnail, which shows the old image.

    Everything else keeps its bytes and its offset, so maker notes with absolute offsets survive.
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
    """The block with that orientation, 1 to 8, if it has one; else unchanged."""
    block = bytearray(exif)
    try:
        first = read_directory(block)
    except DirectoryError:
        return exif
    entry = first.entries.get(ORIENTATION)
    if entry and entry.count and entry.type in _INTEGERS:
        struct.pack_into(f"{first.order}{_INTEGERS[entry.type]}", block, entry.offset, orientation)
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
class Tag:
    """A tag to write. body: in the byte order of the file; inner: a directory that it points to."""

    number: int
    type: int
    count: int
    body: bytes = b""
    inner: tuple[Tag, ...] = ()


def copy_tags(
    file: bytes,
    source: bytes,
    *,
    skipped: frozenset[int],
    added: Mapping[int, tuple[int, bytes]],
    dropped: frozenset[int] = frozenset(),
) -> bytes:
    """A little-endian TIFF file with the source's tags, which replace its own.

    skipped: tags of the source that are not copied. added: further tags, the type and the bytes
    of each. dropped: tags of the file that are removed. The new directory goes to the end and
    nothing else moves. Raises DirectoryError if one of the two is not a TIFF.
    """
    own = _tags_of(file, read_directory(file), skipped=dropped)
    copied = _tags_of(source, read_directory(source), skipped=skipped)
    tags = {tag.number: tag for tag in (*own, *copied)}
    for number, (kind, body) in added.items():
        count = len(body) // TYPE_SIZES[kind]
        tags[number] = Tag(number=number, type=kind, count=count, body=body)
    return append_directory(file, tuple(tags.values()), order="<")


def append_directory(file: bytes, tags: Sequence[Tag], *, order: Literal["<", ">"]) -> bytes:
    """The TIFF file with another directory at its end, as a classic TIFF; nothing else moves."""
    start = len(file) + len(file) % 2
    head = file[:2] + struct.pack(f"{order}HI", 42, start) + file[8:]
    return head.ljust(start, b"\0") + _pack_directory(tags, start, order)


def make_exif(source: bytes) -> bytes:
    """An EXIF block of the tags that EXIF shares with a TIFF file; b"" if it has none."""
    directory = read_directory(source)
    tags = _tags_of(source, directory, skipped=frozenset(directory.entries) - _SHARED)
    return struct.pack("<2sHI", b"II", 42, 8) + _pack_directory(tags, 8, "<") if tags else b""


def set_values(file: bytes, values: Mapping[int, int]) -> bytes:
    """The TIFF file with other whole numbers in tags that it has, each of a single value."""
    patched, directory = bytearray(file), read_directory(file)
    for number, value in values.items():
        entry = directory.entries[number]
        layout = f"{directory.order}{_INTEGERS[entry.type]}"
        struct.pack_into(layout, patched, entry.offset, value)
    return bytes(patched)


def _tags_of(data: bytes, directory: Directory, *, skipped: frozenset[int]) -> tuple[Tag, ...]:
    """The directory's tags in little-endian order, without BigTIFF's types.

    Raises DirectoryError if they hold more bytes than the data has.
    """
    tags: list[Tag] = []
    copied = (entry.length for tag, entry in directory.entries.items() if tag not in skipped)
    if sum(copied) > len(data) + _SHARED_BYTES:
        raise DirectoryError("the tags hold more bytes than the file")
    for number, entry in directory.entries.items():
        if number in skipped:
            continue
        if number in SUBDIRECTORIES:
            tags += _subdirectory_tags(data, directory, number)
        elif entry.type < 16:
            body = directory.value(data, number)
            if directory.order == ">":
                body = _swap_bytes(body, _WORDS.get(entry.type, 1))
            tags.append(Tag(number=number, type=entry.type, count=entry.count, body=body))
    return tuple(tags)


def _subdirectory_tags(data: bytes, directory: Directory, number: int) -> list[Tag]:
    """The tag with the directory that it points to; empty if that is damaged."""
    try:
        offset = directory.integer(data, number, 0)
        subdirectory = _read(data, offset, directory.order, big=directory.big)
    except (DirectoryError, struct.error):
        return []
    # Without SUBDIRECTORIES, because a directory that points at itself would never end.
    inner = _tags_of(data, subdirectory, skipped=SUBDIRECTORIES)
    return [Tag(number=number, type=4, count=1, inner=inner)] if inner else []


def _swap_bytes(body: bytes, size: int) -> bytes:
    return b"".join(body[at : at + size][::-1] for at in range(0, len(body), size))


def _pack_directory(tags: Sequence[Tag], start: int, order: Literal["<", ">"]) -> bytes:
    """A classic directory for that offset, followed by what it points to."""
    end = start + 2 + 12 * len(tags) + 4
    lines, tail = [struct.pack(f"{order}H", len(tags))], bytearray()
    for tag in sorted(tags, key=lambda tag: tag.number):
        offset = end + len(tail)
        body = _pack_directory(tag.inner, offset, order) if tag.inner else tag.body
        lines.append(struct.pack(f"{order}HHI", tag.number, tag.type, tag.count))
        if len(body) <= 4 and not tag.inner:
            lines.append(body.ljust(4, b"\0"))
        else:
            lines.append(struct.pack(f"{order}I", offset))
            tail += body + bytes(len(body) % 2)  # values start at even offsets
    return b"".join([*lines, bytes(4), tail])
