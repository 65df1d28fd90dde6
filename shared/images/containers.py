"""The headers of the picture formats: what a file is, its size, its metadata as raw bytes.

Nothing is decoded here. Pillow is later given a file without its metadata, so that no
damaged or oversized tag can warn, fail or cost anything; the raw bytes go back on encoding.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shared.errors import ImageError
from shared.images import exif as tags

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
TRUNCATED = "image_truncated"
ALLOWED = "use JPEG, PNG, WebP, TIFF or BMP"

_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_XMP_KEYWORD = b"XML:com.adobe.xmp\0"
_PNG_KEPT = frozenset({b"cHRM", b"gAMA", b"iCCP", b"sRGB", b"cICP", b"mDCV", b"cLLI"})
_PNG_NEEDED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_MAX_PROFILE_BYTES = 16 << 20
_MAX_TILE_PIXELS = 1 << 26
_DEEP = "has 16 bits a colour channel; save it with 8, or as 16-bit grey"


# What Pillow's decoders raise on damaged data, besides OSError.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, ArithmeticError, struct.error, zlib.error),
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself before its pixels are decoded.

    size: (width, height) as stored; orientation 1 to 8 says how it is to be shown.
    refusal: why the pixels cannot be kept exactly, if so, with the remedy. bare: the file
    without its metadata.
    segments: metadata in the format's own framing, upright, ready to be put back.
    """

    format: str
    size: tuple[int, int]
    orientation: int = 1
    frames: int = 1
    refusal: str = ""
    lossless: bool = True
    progressive: bool = False
    bare: bytes = b""
    segments: bytes = b""
    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) once the orientation is applied."""
        return self.size if self.orientation < 5 else (self.size[1], self.size[0])


def read_header(data: bytes) -> Header:
    """Reads as much of the file as there is; raises ImageError where the size is not in it."""
    name = recognise(data)
    try:
        header = _READERS[name](data)
    except (struct.error, IndexError, tags.DirectoryError) as error:
        raise truncated(name) from error
    if min(header.size) < 1:
        raise ImageError(f"the {name} header says {header.size[0]}x{header.size[1]} pixels")
    return header


def truncated(name: str) -> ImageError:
    return ImageError(
        f"the {name} file ends too early or is damaged; upload it again", code=TRUNCATED
    )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def recognise(data: bytes) -> str:
    """One of FORMATS; raises ImageError naming what was found instead."""
    if not data:
        raise ImageError("the file is empty (0 bytes); upload it again")
    for name, pattern in _SIGNATURES:
        if pattern.match(data):
            if name in FORMATS:
                return name
            raise ImageError(f"the file is {name}; {ALLOWED}")
    raise ImageError(f"the file is no picture this program knows (starts {data[:8]!r}); {ALLOWED}")


_SIGNATURES: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        ("JPEG", rb"\xff\xd8\xff"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBP"),
        ("TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("GIF", rb"GIF8"),
        ("a Photoshop document (PSD)", rb"8BPS"),
        ("AVIF", rb"....ftypavi"),
        ("HEIC", rb"....ftyp(hei|hev|mif|msf)"),
        ("a video (MP4)", rb"....ftyp"),
        ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
        ("PDF", rb"%PDF"),
        ("PostScript", rb"%!PS"),
        ("a Windows icon", rb"\0\0[\x01\x02]\0"),
        ("a ZIP archive", rb"PK\x03\x04"),
        ("gzip data", rb"\x1f\x8b"),
        ("a Git LFS pointer, not the picture itself", rb"version https://git-lfs"),
        (
            "an HTML page",
            rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?(?i:<(!doctype html|html|head|body))",
        ),
        ("an SVG drawing", rb"(\xef\xbb\xbf)?\s*(?i:<(svg|.{0,1000}<svg))"),
        ("XML", rb"(\xef\xbb\xbf)?\s*<[?!a-zA-Z]"),
        ("JSON", rb"\s*[{\[]\s*[\"{\[\]}]"),
        ("BMP", rb"BM"),
    )
)


def _read_jpeg(data: bytes) -> Header:
    header, bare, segments = None, [data[:2]], []
    exif = xmp = b""
    profile: dict[int, bytes] = {}
    place = 2
    for marker, start, end in _jpeg_segments(data):
        place, body = end, data[start + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width = struct.unpack_from(">BHH", body)
            header = Header(
                format="JPEG",
                size=(width, height),
                refusal="" if depth == 8 else f"has {depth} bits a channel; save it with 8",
                lossless=False,
                progressive=marker in (0xC2, 0xC6, 0xCA, 0xCE),
            )
        is_metadata = marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE)
        if not is_metadata:
            bare.append(data[start:end])
        if marker == 0xE1 and body.startswith(_EXIF):
            exif = body[len(_EXIF) :]
            segments.append(jpeg_segment(0xE1, _EXIF + tags.upright(exif)))
        elif (is_metadata and not body.startswith(b"MPF\0")) or marker == 0xE0:
            segments.append(data[start:end])
        if marker == 0xE1 and body.startswith(_XMP):
            xmp = body[len(_XMP) :]
        if marker == 0xE2 and body.startswith(_ICC):
            profile[body[len(_ICC)]] = body[len(_ICC) + 2 :]
    if header is None:
        raise truncated("JPEG")
    return replace(
        header,
        orientation=tags.orientation(exif),
        bare=b"".join([*bare, data[place:]]),
        segments=b"".join(segments),
        exif=tags.upright(exif),
        xmp=xmp,
        icc=b"".join(profile[key] for key in sorted(profile)),
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
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


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _read_png(data: bytes) -> Header:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR":
        raise ImageError("the PNG file does not start with its header; upload it again")
    bare, segments, frames = [data[:8]], [], 1
    exif = icc = xmp = b""
    orientation, dpi = 1, None
    for name, start, end in _png_chunks(data):
        body = data[start + 8 : end - 4]
        if name == b"acTL":
            frames = max(int.from_bytes(body[:4]), 2)
        if name in _PNG_NEEDED:
            bare.append(data[start:end])
        elif name == b"eXIf":
            exif = tags.upright(body)
            segments.append(png_chunk(name, exif))
        elif name in _PNG_KEPT or name[3:4].islower():
            segments.append(data[start:end])
        if name == b"eXIf":
            orientation = tags.orientation(body)
        elif name == b"pHYs" and len(body) == 9 and body[8] == 1:
            across, down = struct.unpack_from(">II", body)
            dpi = (across * 0.0254, down * 0.0254)
        elif name == b"iCCP":
            icc = _inflated(body.partition(b"\0")[2][1:])
        elif name == b"iTXt" and body.startswith(_XMP_KEYWORD):
            xmp = body[len(_XMP_KEYWORD) :].split(b"\0", 3)[-1]
    return Header(
        format="PNG",
        size=(width, height),
        orientation=orientation,
        frames=frames,
        refusal=_DEEP if depth == 16 and colour != 0 else "",
        dpi=dpi,
        bare=b"".join(bare),
        segments=b"".join(segments),
        exif=exif,
        icc=icc,
        xmp=xmp,
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk; the last one may reach past the end of the data."""
    start = 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        name = data[start + 4 : start + 8]
        if end > len(data) and name not in _PNG_NEEDED:
            return
        yield name, start, end
        start = end


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _inflated(data: bytes) -> bytes:
    """A colour profile, unless it is damaged or absurdly large: then nothing."""
    try:
        inflater = zlib.decompressobj()
        profile = inflater.decompress(data, _MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if inflater.eof else b""


def _read_webp(data: bytes) -> Header:
    first = data[12:16]
    found = {name: data[start:end] for name, start, end in _webp_chunks(data)}
    exif = found.get(b"EXIF", b"").removeprefix(_EXIF)
    if first == b"VP8X" and data[20] & 0x08 and not exif:
        raise truncated("WEBP")  # the orientation stands after the pixels
    return Header(
        format="WEBP",
        size=_webp_size(data),
        orientation=tags.orientation(exif),
        frames=2 if first == b"VP8X" and data[20] & 0x02 else 1,
        lossless=b"VP8L" in found,
        bare=data,
        exif=tags.upright(exif),
        icc=found.get(b"ICCP", b""),
        xmp=found.get(b"XMP ", b""),
    )


def _webp_size(data: bytes) -> tuple[int, int]:
    """RFC 9649, sections 2.5 to 2.7."""
    first = data[12:16]
    if first == b"VP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if first == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of the body of each chunk that begins within the data."""
    start = 12
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        yield data[start : start + 4], start + 8, start + 8 + size
        start += 8 + size + size % 2


# The tags that say how pixels are stored; every other one is metadata.
TIFF_NEEDED = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324}
    | {325, 338, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532}
)


# Pillow warns where one of these has several values.
_TIFF_SINGLE = (256, 257, 259, 262, 266, 277, 278, 284, 292, 293, 317, 322, 323, 332, 512, 513)


def _read_tiff(data: bytes) -> Header:
    directory = tags.read_directory(data)
    entries = [entry for tag, entry in directory.entries.items() if tag in _TIFF_SINGLE]
    if any(entry.count != 1 for entry in entries):
        raise truncated("TIFF")
    width, height = directory.integer(data, 256, 0), directory.integer(data, 257, 0)
    orientation = directory.integer(data, tags.ORIENTATION, 1)
    return Header(
        format="TIFF",
        size=(width, height),
        orientation=orientation if orientation in range(1, 9) else 1,
        frames=2 if directory.next else 1,
        refusal=_tiff_refusal(data, directory),
        dpi=_tiff_dpi(data, directory),
        bare=_bare_tiff(data, directory),
        icc=_tiff_bytes(data, directory, 34675),
        xmp=_tiff_bytes(data, directory, 700),
    )


def _tiff_refusal(data: bytes, directory: tags.Directory) -> str:
    """Why Pillow would not keep what the file holds, or nothing."""
    depths = directory.integers(data, 258)
    if len(depths) > 1 and max(depths) > 8:
        return _DEEP
    if 0 in directory.integers(data, 338):
        return "has an unnamed extra channel; save it as RGB, or RGBA with alpha"
    if depths[:1] == (12,) or (depths[:1] == (16,) and directory.integer(data, 262, 1) == 0):
        return "holds an unusual kind of deep grey; save it as plain 16-bit grey"
    if directory.integer(data, 322, 0) * directory.integer(data, 323, 0) > _MAX_TILE_PIXELS:
        return "is one huge tile; save it in strips"
    return ""


def _tiff_dpi(data: bytes, directory: tags.Directory) -> tuple[float, float] | None:
    sides = [_tiff_bytes(data, directory, tag) for tag in (282, 283)]
    unit = {2: 1.0, 3: 2.54}.get(directory.integer(data, 296, 2))
    if unit is None or any(len(side) != 8 for side in sides):
        return None
    pairs = [struct.unpack(f"{directory.order}II", side) for side in sides]
    if any(0 in pair for pair in pairs):
        return None
    return pairs[0][0] / pairs[0][1] * unit, pairs[1][0] / pairs[1][1] * unit


def _tiff_bytes(data: bytes, directory: tags.Directory, tag: int) -> bytes:
    entry = directory.entries.get(tag)
    return data[entry.place : entry.place + entry.length] if entry else b""


def _bare_tiff(data: bytes, directory: tags.Directory) -> bytes:
    """The file with a new directory at its end that holds only what the pixels need."""
    entries = [entry for tag, entry in sorted(directory.entries.items()) if tag in TIFF_NEEDED]
    word, inline = ("Q", 8) if directory.big else ("I", 4)
    lines = []
    for entry in entries:
        head = struct.pack(f"{directory.order}HH{word}", entry.tag, entry.type, entry.count)
        if entry.length > inline:
            lines.append(head + struct.pack(f"{directory.order}{word}", entry.place))
        else:
            value = data[entry.place : entry.place + entry.length]
            lines.append(head + value.ljust(inline, b"\0"))
    count = struct.pack(f"{directory.order}{'Q' if directory.big else 'H'}", len(lines))
    start = len(data) + len(data) % 2
    place = 8 if directory.big else 4
    offset = struct.pack(f"{directory.order}{word}", start)
    patched = data[:place] + offset + data[place + len(offset) :]
    return patched.ljust(start, b"\0") + count + b"".join(lines) + bytes(inline)


def _read_bmp(data: bytes) -> Header:
    if int.from_bytes(data[14:18], "little") == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return Header(format="BMP", size=(width, abs(height)), bare=data)


_READERS = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
    "TIFF": _read_tiff,
    "BMP": _read_bmp,
}
