"""Damage that keeps a file's framing: chunks, segments, tags and headers, with valid checksums."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from random import Random

from shared.images.png_format import make_chunk
from tests.fuzz.seeds import seeds

INTEGERS = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 1000, 20_000, 32_767, 32_768, 65_535,
            65_536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)  # fmt: skip
SIDES = (0, 1, 2, 7, 8, 9, 16, 43, 61, 64, 113, 999, 20_000, 32_767, 65_500, 65_535, 1 << 20)
MOST_BYTES = 2 << 20
BOMB = zlib.compress(bytes(24 << 20), 9)
Mutation = Callable[[bytes, Random], bytes]


def mutated(random: Random) -> bytes:
    """A seed file with one to four damages; one in fifty is noise after a signature."""
    format, data = random.choice(seeds())
    if random.random() < 0.02:
        return data[:16] + random.randbytes(random.randrange(2000))
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        chosen = _STRUCTURED.get(format, _anywhere) if random.random() < 0.75 else _anywhere
        try:
            data = chosen(data, random)
        except (struct.error, IndexError, ValueError, OverflowError, zlib.error):
            data = _anywhere(data, random)  # earlier damage left no structure to change
        data = data[:MOST_BYTES]
    return data


# --- any file -------------------------------------------------------------------------------


def _anywhere(data: bytes, random: Random) -> bytes:
    return random.choice((_flip, _flip, _set, _truncate, _cut, _insert, _repeat, _splice, _number))(
        data, random
    )


def _flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 2, 8, 40))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _set(data: bytes, random: Random) -> bytes:
    place, count = _place(data, random), random.choice((1, 2, 4, 16, 200))
    return data[:place] + bytes([random.choice((0, 1, 127, 255))]) * count + data[place + count :]


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: _place(data, random)]


def _cut(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + data[place + random.choice((1, 2, 7, 100)) :]


def _insert(data: bytes, random: Random) -> bytes:
    place = _place(data, random)
    return data[:place] + random.randbytes(random.choice((1, 2, 9, 300))) + data[place:]


def _repeat(data: bytes, random: Random) -> bytes:
    start = _place(data, random)
    end = start + random.choice((4, 30, 500))
    return data[:end] + data[start:end] * random.choice((1, 3, 50)) + data[end:]


def _splice(data: bytes, random: Random) -> bytes:
    other = random.choice(seeds())[1]
    return data[: _place(data, random)] + other[_place(other, random) :]


def _number(data: bytes, random: Random) -> bytes:
    form = random.choice(("<H", ">H", "<I", ">I", "B"))
    value = random.choice(INTEGERS) % (1 << 8 * struct.calcsize(form))
    place = min(_place(data, random), len(data) - struct.calcsize(form))
    return data[:place] + struct.pack(form, value) + data[place + struct.calcsize(form) :]


def _place(data: bytes, random: Random) -> int:
    """An offset, mostly near the front, where the headers are."""
    end = len(data) if random.random() < 0.4 else min(len(data), 200)
    return random.randrange(end + 1)


# --- lists of (name, body), as PNG, WebP and JPEG have them -----------------------------------


_Parts = list[tuple[bytes, bytes]]


def _shuffle(parts: _Parts, random: Random) -> None:
    place, other = random.randrange(len(parts)), random.randrange(len(parts))
    name, body = parts[place]
    match random.randrange(6):
        case 0:
            del parts[place]
        case 1:
            parts[place:place] = [(name, body)] * random.choice((1, 1, 2, 300))
        case 2:
            parts[place], parts[other] = parts[other], parts[place]
        case 3:
            parts[place] = (parts[other][0], body)
        case _:
            parts[place] = (name, _anywhere(body, random))


# --- PNG ------------------------------------------------------------------------------------

_PNG_BODIES: Mapping[bytes, tuple[bytes, ...]] = {
    b"iCCP": (b"p\0\0" + BOMB, b"p\0\0junk", b"", b"n" * 90),
    b"zTXt": (b"k\0\0" + BOMB, b"k\0\7", b"k"),
    b"iTXt": (b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB, b"XML:com.adobe.xmp\0", b"k\0\0\0"),
    b"tEXt": (b"k\0" + b"x" * 500_000, b"\0\0", b""),
    b"eXIf": (b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\0\0\0\0\x08", b"Exif"),
    b"pHYs": (b"\xff" * 8 + b"\1", b"\0" * 9, b"\1"),
    b"acTL": (b"\0\0\0\2\0\0\0\0", b"\0\0\0\1\0\0\0\0", b"\xff" * 8),
    b"fcTL": (b"\0\0\0\0" + b"\xff" * 22,),
    b"tRNS": (b"", b"\0\1", b"\0\1\0\2\0\3", b"\xff" * 300),
    b"PLTE": (b"", b"\0\0\0", b"\xff" * 7, b"\xff" * 900),
    b"gAMA": (b"\0\0\0\0", b"\xff" * 4),
    b"IDAT": (b"", BOMB, zlib.compress(b"\xff" * 60_000)),
    b"IEND": (b"", b"more"),
    b"caNv": (b"junk",),
}


def _png(data: bytes, random: Random) -> bytes:
    parts, start = [], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        parts.append((data[start + 4 : start + 8], data[start + 8 : end - 4]))
        start = end
    match random.randrange(5):
        case 0:
            parts[0] = (b"IHDR", _png_header(parts[0][1], random))
        case 1:
            name = random.choice(list(_PNG_BODIES))
            parts.insert(random.randint(0, len(parts)), (name, random.choice(_PNG_BODIES[name])))
        case 2:
            _repack_pixels(parts, random)
        case _:
            _shuffle(parts, random)
    return data[:8] + b"".join(make_chunk(name[:4], body) for name, body in parts)


def _png_header(body: bytes, random: Random) -> bytes:
    fields = list(struct.unpack(">IIBBBBB", body))
    number = random.randrange(7)
    values = (SIDES, SIDES, (0, 1, 2, 4, 8, 16, 32), (0, 1, 2, 3, 4, 5, 6, 7), (0, 1), (0, 1))
    fields[number] = random.choice((*values, (0, 1, 2))[number])
    return struct.pack(">IIBBBBB", *fields)


def _repack_pixels(parts: _Parts, random: Random) -> None:
    packed = b"".join(body for name, body in parts if name == b"IDAT")
    pixels = _anywhere(zlib.decompress(packed), random)
    place = [name for name, _ in parts].index(b"IDAT")
    parts[:] = [part for part in parts if part[0] != b"IDAT"]
    parts.insert(place, (b"IDAT", zlib.compress(pixels)))


# --- JPEG -----------------------------------------------------------------------------------

_SEGMENTS: tuple[tuple[int, bytes], ...] = (
    (0xE0, b"JFIF\0\1\1\1\0\0\0\0\xff\xff"),
    (0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x06\0\0\0\x08\0\0\0"),
    (0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<" * 5000),
    (0xE2, b"ICC_PROFILE\0\x07\2" + b"p" * 65_000),
    (0xE2, b"ICC_PROFILE\0"),
    (0xE2, b"MPF\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    (0xEE, b"Adobe\0\x64\0\0\0\0\2"),
    (0xEE, b"Adobe\0\x64\0\0\0\0\0"),
    (0xEE, b"Adobe"),
    (0xDD, b"\0\1"),
    (0xDD, b"\0\0"),
    (0xDB, b"\0" + b"\0" * 64),
    (0xDB, b"\x10" + b"\xff" * 128),
    (0xC4, b"\0" + b"\1" * 16 + bytes(16)),
    (0xCC, b"\0\1"),
    (0xFE, b"c" * 60_000),
    (0xDC, b"\0\x40"),
)


def _jpeg(data: bytes, random: Random) -> bytes:
    parts, rest = _jpeg_parts(data)
    match random.randrange(6):
        case 0:
            marker, body = random.choice(_SEGMENTS)
            parts.insert(random.randint(0, len(parts)), (bytes([marker]), body))
        case 1:
            _change_frame(parts, random)
        case 2:
            rest = _anywhere(rest, random)
        case 3:
            rest = _more_scans(parts, rest, random)
        case _:
            _shuffle(parts, random)
    packed = (b"\xff" + m + struct.pack(">H", min(len(b) + 2, 65_535)) + b[:65_533]
              for m, b in parts)  # fmt: skip
    return b"\xff\xd8" + b"".join(packed) + rest


def _jpeg_parts(data: bytes) -> tuple[_Parts, bytes]:
    """The segments before the first scan, and all the rest."""
    parts, start = [], 2
    while data[start + 1] != 0xDA:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
        parts.append((data[start + 1 : start + 2], data[start + 4 : end]))
        start = end
    return parts, data[start:]


def _change_frame(parts: _Parts, random: Random) -> None:
    place = [0xC0 <= m[0] <= 0xCF and m[0] != 0xC4 for m, _ in parts].index(True)
    marker, body = parts[place][0], bytearray(parts[place][1])
    match random.randrange(6):
        case 0:
            struct.pack_into(">H", body, 1 + 2 * random.randrange(2), random.choice(SIDES) & 0xFFFF)
        case 1:
            body[0] = random.choice((0, 1, 8, 12, 16))
        case 2:
            body[5] = random.randrange(6)
        case 3:
            body[7 + 3 * random.randrange(body[5])] = random.choice(
                (0, 0x11, 0x22, 0x41, 0x14, 0x44)
            )
        case 4:
            body[6 + random.randrange(len(body) - 6)] = random.randrange(256)
        case _:
            marker = bytes([random.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCF))])
    parts[place] = (marker, bytes(body))


def _more_scans(parts: _Parts, rest: bytes, random: Random) -> bytes:
    """Repeats the scans: each makes the decoder walk over the whole image."""
    scan = rest.removesuffix(b"\xff\xd9")
    if random.random() < 0.5:
        side = random.choice((256, 999))
        for n, (marker, body) in enumerate(parts):
            if 0xC0 <= marker[0] <= 0xC2:
                parts[n] = (marker, body[:1] + struct.pack(">HH", side, side) + body[5:])
    times = min(random.choice((2, 10, 400)), 1 + MOST_BYTES // (len(scan) + 1))
    return scan * times + b"\xff\xd9"


# --- WebP -----------------------------------------------------------------------------------

_WEBP_PARTS: tuple[tuple[bytes, bytes], ...] = (
    (b"VP8X", b"\0\0\0\0\x3c\0\0\x2a\0\0"),
    (b"VP8X", b"\x3e\0\0\0\xff\xff\xff\xff\xff\xff"),
    (b"VP8X", b"\x08\0\0\0\x3c\0\0\x2a\0\0"),
    (b"EXIF", b"Exif\0\0II*\0\xff\xff\xff\xff"),
    (b"ICCP", b"p" * 100_000),
    (b"XMP ", b"<" * 100_000),
    (b"ANIM", b"\0" * 6),
    (b"ANMF", b"\0" * 24),
    (b"ALPH", b"\1" + b"\0" * 20),
    (b"JUNK", b"x"),
)


def _webp(data: bytes, random: Random) -> bytes:
    parts, start = [], 12
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        parts.append((data[start : start + 4], data[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2
    if random.random() < 0.3:
        parts.insert(random.randint(0, len(parts)), random.choice(_WEBP_PARTS))
    elif random.random() < 0.3:
        name, body = parts[0]
        place = random.randrange(min(len(body), 12))
        parts[0] = (name, body[:place] + random.randbytes(1) + body[place + 1 :])
    else:
        _shuffle(parts, random)
    packed = b"".join(
        name[:4] + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for name, body in parts
    )
    return b"RIFF" + struct.pack("<I", len(packed) + 4) + b"WEBP" + packed


# --- TIFF and BMP -----------------------------------------------------------------------------

_TAGS = (
    *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 292, 296, 317, 320, 322),
    *(323, 324, 325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 532, 700, 34665, 34675, 34853),
)
_COMPRESSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34712, 34925, 50000, 50001, 65535)


def _tiff(data: bytes, random: Random) -> bytes:
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    word, width = ("Q", 20) if big else ("I", 12)
    (offset,) = struct.unpack_from(f"{order}{word}", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, offset)
    first = offset + (8 if big else 2)
    changed = bytearray(data)
    place = first + width * random.randrange(count)
    (tag,) = struct.unpack_from(f"{order}H", data, place)
    value = random.choice(_COMPRESSIONS) if tag == 259 else random.choice((*INTEGERS, *SIDES))
    match random.randrange(7):
        case 0:
            struct.pack_into(f"{order}H", changed, place, random.choice(_TAGS))
        case 1:
            struct.pack_into(f"{order}H", changed, place + 2, random.randrange(20))
        case 2:
            struct.pack_into(f"{order}{word}", changed, place + 4, value)
        case 3:
            end = first + width * count
            struct.pack_into(f"{order}{word}", changed, end, random.choice((offset, 8, 1 << 20)))
        case _:
            form = f"{order}H" if random.random() < 0.5 else f"{order}{word}"
            limit = 1 << 8 * struct.calcsize(form)
            struct.pack_into(form, changed, place + width - (8 if big else 4), value % limit)
    return bytes(changed)


def _bmp(data: bytes, random: Random) -> bytes:
    """A field of the BITMAPINFOHEADER, or the offset of the pixels."""
    place, form, values = random.choice(
        (
            (10, "<I", INTEGERS),
            (14, "<I", (12, 16, 40, 52, 56, 64, 108, 124, 0, 255)),
            (18, "<i", (*SIDES, -1, -43, -(1 << 31))),
            (22, "<i", (*SIDES, -1, -43, -(1 << 31))),
            (26, "<H", (0, 1, 2, 65_535)),
            (28, "<H", (0, 1, 2, 4, 8, 16, 24, 32, 64)),
            (30, "<I", (0, 1, 2, 3, 4, 5, 6, 11)),
            (46, "<I", INTEGERS),
        )
    )
    changed = bytearray(data)
    struct.pack_into(form, changed, place, random.choice(values))
    return bytes(changed)


_STRUCTURED: Mapping[str, Mutation] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "WEBP": _webp,
    "TIFF": _tiff,
    "BMP": _bmp,
}
