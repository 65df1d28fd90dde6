"""XMP packets: how each format frames one, and the pieces that JPEG cuts a long one into.

JPEG's framing is the XMP specification's, part 3, section 1.1.3: what does not fit into one
segment follows in others, which the first one names by the MD5 of what they hold together.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from xml.parsers import expat

STANDARD = b"http://ns.adobe.com/xap/1.0/\0"
EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
PNG_KEYWORD = b"XML:com.adobe.xmp\0"

_MOST_BYTES = 65533  # in the body of a JPEG segment
_PIECE_BYTES = 65400
_MAX_BYTES = 64 << 20
_NOTE = re.compile(
    rb"\s+xmpNote:HasExtendedXMP\s*=\s*[\"']([0-9A-Fa-f]{32})[\"']"
    rb"|<xmpNote:HasExtendedXMP>\s*([0-9A-Fa-f]{32})\s*</xmpNote:HasExtendedXMP>"
)
_INNER = re.compile(rb"<rdf:RDF[^>]*>(.*)</rdf:RDF>", re.DOTALL)
_WRAPPER = re.compile(rb"<\?xpacket[^>]*\?>")
_PADDING = re.compile(rb"\s+(?=<\?xpacket end)")
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_POINTER = (
    b'<rdf:Description xmlns:rdf="%b" rdf:about="" '
    b'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="%%b"/>'
) % _RDF.encode()
_EMPTY = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="%b">' % _RDF.encode(),
    b"</rdf:RDF></x:xmpmeta>",
)


def is_jpeg_body(body: bytes) -> bool:
    """Whether the body of an APP1 segment holds a packet or a piece of one."""
    return body.startswith((STANDARD, EXTENSION))


def read_jpeg_bodies(bodies: Sequence[bytes]) -> bytes:
    """The packet of a JPEG file, with its extension put back in; b"" where there is none."""
    packets = [body[len(STANDARD) :] for body in bodies if body.startswith(STANDARD)]
    if not packets:
        return b""
    note = _NOTE.search(packets[0])
    if note is None:
        return packets[0]
    extension = _assembled(bodies, (note[1] or note[2]).upper())
    return _merged(packets[0], extension) if extension else packets[0]


def _assembled(bodies: Sequence[bytes], guid: bytes) -> bytes:
    """The extension of that name; nothing where a piece is missing."""
    start = len(EXTENSION)
    pieces = []
    for body in bodies:
        if body.startswith(EXTENSION) and body[start : start + 32].upper() == guid:
            total, offset = struct.unpack_from(">II", body, start + 32)
            pieces.append((offset, body[start + 40 :], total))
    whole = b"".join(piece for _, piece, _ in sorted(pieces))
    return whole if pieces and len(whole) == pieces[0][2] else b""


def _merged(packet: bytes, extension: bytes) -> bytes:
    """Both in one packet; the packet alone where the two do not make well-formed XML."""
    inner, end = _INNER.search(extension), packet.rfind(b"</rdf:RDF>")
    if inner is None or end < 0:
        return packet
    merged = _NOTE.sub(b"", packet[:end]) + inner[1] + packet[end:]
    try:
        expat.ParserCreate().Parse(merged.strip(b"\0"), True)
    except expat.ExpatError:
        return packet
    return merged


def make_jpeg_bodies(packet: bytes) -> list[bytes]:
    """The bodies of the APP1 segments that hold the packet."""
    packet = _PADDING.sub(b"\n", packet)
    if len(STANDARD) + len(packet) <= _MOST_BYTES:
        return [STANDARD + packet]
    first, extension = _split(_WRAPPER.sub(b"", packet).strip())
    guid = hashlib.md5(extension, usedforsecurity=False).hexdigest().upper().encode()
    bodies = [STANDARD + first % guid]
    for offset in range(0, len(extension), _PIECE_BYTES):
        place = struct.pack(">II", len(extension), offset)
        bodies.append(EXTENSION + guid + place + extension[offset : offset + _PIECE_BYTES])
    return bodies


def _split(packet: bytes) -> tuple[bytes, bytes]:
    """What readers of the first segment alone shall see, and the rest.

    The descriptions stay in the first as long as they fit, the small ones first: a long one
    holds a picture or a depth map. The first is a template for the extension's name.
    """
    spans = sorted(_descriptions(packet), key=lambda span: span[1] - span[0])
    if not spans:
        return _EMPTY[0] + _POINTER + _EMPTY[1], packet
    head, tail = packet[: min(spans)[0]], packet[max(spans)[1] :]
    room = _MOST_BYTES - len(STANDARD) - len(head) - len(_POINTER) - 32 - len(tail)
    kept: list[tuple[int, int]] = []
    moved: list[tuple[int, int]] = []
    for start, end in spans:
        fits = end - start <= room
        room -= end - start if fits else 0
        (kept if fits else moved).append((start, end))

    def joined(chosen: list[tuple[int, int]]) -> bytes:
        return b"".join(packet[start:end] for start, end in sorted(chosen))

    first = (head + joined(kept)).replace(b"%", b"%%") + _POINTER + tail.replace(b"%", b"%%")
    return first, head + joined(moved) + tail


def _descriptions(packet: bytes) -> list[tuple[int, int]]:
    """Where each child of rdf:RDF starts and ends; nothing where the XML is not well-formed."""
    parser = expat.ParserCreate(namespace_separator=" ")
    open_tags: list[str] = []
    starts: list[int] = []
    spans: list[tuple[int, int]] = []

    def opens(name: str, _attributes: object) -> None:
        if open_tags and open_tags[-1] == f"{_RDF} RDF":
            starts.append(parser.CurrentByteIndex)
        open_tags.append(name)

    def closes(_name: str) -> None:
        open_tags.pop()
        if open_tags and open_tags[-1] == f"{_RDF} RDF":
            end = packet.index(b">", parser.CurrentByteIndex) + 1
            spans.append((starts[-1], end))

    parser.StartElementHandler, parser.EndElementHandler = opens, closes
    try:
        parser.Parse(packet, True)
    except expat.ExpatError:
        return []
    return spans


def read_png_text(body: bytes) -> bytes:
    """The packet in an iTXt chunk with XMP's keyword; b"" where it is damaged."""
    start = len(PNG_KEYWORD)
    text = body[start + 2 :].split(b"\0", 2)[-1]
    return inflate(text, _MAX_BYTES) if body[start : start + 1] == b"\1" else text


def make_png_text(packet: bytes) -> bytes:
    """The body of an uncompressed iTXt chunk that holds the packet."""
    return PNG_KEYWORD + b"\0\0\0\0" + packet


def inflate(data: bytes, most_bytes: int) -> bytes:
    """What zlib packed, unless it is damaged or larger than that: then nothing."""
    try:
        inflater = zlib.decompressobj()
        found = inflater.decompress(data, most_bytes)
    except zlib.error:
        return b""
    return found if inflater.eof else b""
