"""XMP packets: how JPEG and PNG frame them, and how JPEG splits a long one over segments.

JPEG's framing is the XMP specification's, part 3, section 1.1.3: the standard packet fits into
one segment. The rest, the extended packet, follows in more segments; the standard packet names
the MD5 of the extended one.

Packets come from strangers. A regular expression holds the interpreter lock, so every search
here takes time linear in the packet, and a packet above ``MAX_PACKET_BYTES`` is dropped.
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

_MAX_SEGMENT_BYTES = 65533  # in the body of a JPEG segment
_PIECE_BYTES = 65400
MAX_PACKET_BYTES = 1_000_000
# The two ways in which RDF may write the property that names the extended packet. Linear: each
# attempt starts at a name, and the possessive \s*+ does not backtrack.
_NOTE = re.compile(
    rb"\sxmpNote:HasExtendedXMP\s*+=\s*+[\"']([0-9A-Fa-f]{32})[\"']"
    rb"|<xmpNote:HasExtendedXMP>\s*+([0-9A-Fa-f]{32})\s*+</xmpNote:HasExtendedXMP>"
)
_RDF_START, _RDF_END = b"<rdf:RDF", b"</rdf:RDF>"
_WRAPPER_START, _WRAPPER_END = b"<?xpacket", b"?>"
_LAST_WRAPPER = b"<?xpacket end"
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
    """The packet of a JPEG file, merged with its extended packet; b"" if there is none.

    An extended packet above ``MAX_PACKET_BYTES`` is returned as it is, for the caller to drop.
    """
    packets = [body[len(STANDARD) :] for body in bodies if body.startswith(STANDARD)]
    if not packets:
        return b""
    note = _NOTE.search(packets[0])
    if note is None:
        return packets[0]
    extended = _join_pieces(bodies, (note[1] or note[2]).upper())
    if len(extended) > MAX_PACKET_BYTES:
        return extended
    return _merge(packets[0], extended) if extended else packets[0]


def _join_pieces(bodies: Sequence[bytes], guid: bytes) -> bytes:
    """The extended packet with that MD5; b"" if a piece is missing."""
    start = len(EXTENSION)
    pieces = []
    for body in bodies:
        if body.startswith(EXTENSION) and body[start : start + 32].upper() == guid:
            total, offset = struct.unpack_from(">II", body, start + 32)
            pieces.append((offset, body[start + 40 :], total))
    whole = b"".join(piece for _, piece, _ in sorted(pieces))
    return whole if pieces and len(whole) == pieces[0][2] else b""


def _merge(packet: bytes, extended: bytes) -> bytes:
    """Both in one packet; the packet alone if the two do not make well-formed XML."""
    inner, end = _inside_rdf(extended), packet.rfind(_RDF_END)
    if inner is None or end < 0:
        return packet
    merged = _NOTE.sub(b"", packet[:end]) + inner + packet[end:]
    try:
        _refuse_doctype(expat.ParserCreate()).Parse(merged.strip(b"\0"), True)
    except (expat.ExpatError, _DoctypeError):
        return packet
    return merged


def _inside_rdf(packet: bytes) -> bytes | None:
    """What the packet's rdf:RDF element holds; None if it has no such element."""
    start = packet.find(_RDF_START)
    start = packet.find(b">", start) + 1 if start >= 0 else 0
    end = packet.rfind(_RDF_END)
    return packet[start:end] if 0 < start <= end else None


class _DoctypeError(ValueError):
    """The XML has a DOCTYPE, whose entities could expand to far more than the packet."""


def _refuse_doctype(parser: expat.XMLParserType) -> expat.XMLParserType:
    def refuse(*_: object) -> None:
        raise _DoctypeError

    parser.StartDoctypeDeclHandler = refuse
    return parser


def make_jpeg_bodies(packet: bytes) -> list[bytes]:
    """The bodies of the APP1 segments that hold the packet."""
    # Kilobytes of padding, for editing in place, would force a packet into the extended form.
    packet = _without_padding(packet)
    if len(STANDARD) + len(packet) <= _MAX_SEGMENT_BYTES:
        return [STANDARD + packet]
    template, extended = _split(_without_wrapper(packet).strip())
    guid = hashlib.md5(extended, usedforsecurity=False).hexdigest().upper().encode()
    bodies = [STANDARD + template % guid]
    for offset in range(0, len(extended), _PIECE_BYTES):
        place = struct.pack(">II", len(extended), offset)
        bodies.append(EXTENSION + guid + place + extended[offset : offset + _PIECE_BYTES])
    return bodies


def _without_padding(packet: bytes) -> bytes:
    body, wrapper, rest = packet.rpartition(_LAST_WRAPPER)
    short = body.rstrip()
    return short + b"\n" + wrapper + rest if len(short) < len(body) else packet


def _without_wrapper(packet: bytes) -> bytes:
    """The packet without the processing instructions that begin and end it."""
    kept, place = [], 0
    while (start := packet.find(_WRAPPER_START, place)) >= 0:
        end = packet.find(_WRAPPER_END, start)
        if end < 0:
            break
        kept.append(packet[place:start])
        place = end + len(_WRAPPER_END)
    return b"".join([*kept, packet[place:]])


def _split(packet: bytes) -> tuple[bytes, bytes]:
    """The standard packet, as a template for the MD5 of the extended one; and the extended packet.

    Many programs read only the standard packet. It gets as many descriptions as fit, short ones
    first, because long ones hold thumbnails or depth maps.
    """
    spans = sorted(_descriptions(packet), key=lambda span: span[1] - span[0])
    if not spans:
        return _EMPTY[0] + _POINTER + _EMPTY[1], packet
    head, tail = packet[: min(spans)[0]], packet[max(spans)[1] :]
    room = _MAX_SEGMENT_BYTES - len(STANDARD) - len(head) - len(_POINTER) - 32 - len(tail)
    kept: list[tuple[int, int]] = []
    moved: list[tuple[int, int]] = []
    for start, end in spans:
        fits = end - start <= room
        room -= end - start if fits else 0
        (kept if fits else moved).append((start, end))

    def join(chosen: list[tuple[int, int]]) -> bytes:
        return b"".join(packet[start:end] for start, end in sorted(chosen))

    template = (head + join(kept)).replace(b"%", b"%%") + _POINTER + tail.replace(b"%", b"%%")
    return template, head + join(moved) + tail


def _descriptions(packet: bytes) -> list[tuple[int, int]]:
    """(start, end) of each child of rdf:RDF; empty if the XML is not well-formed."""
    parser = _refuse_doctype(expat.ParserCreate(namespace_separator=" "))
    open_tags: list[str] = []
    starts: list[int] = []
    spans: list[tuple[int, int]] = []

    def open_tag(name: str, _attributes: object) -> None:
        if open_tags and open_tags[-1] == f"{_RDF} RDF":
            starts.append(parser.CurrentByteIndex)
        open_tags.append(name)

    def close_tag(_name: str) -> None:
        open_tags.pop()
        if open_tags and open_tags[-1] == f"{_RDF} RDF":
            # Expat reports where the end tag starts.
            end = packet.index(b">", parser.CurrentByteIndex) + 1
            spans.append((starts[-1], end))

    parser.StartElementHandler, parser.EndElementHandler = open_tag, close_tag
    try:
        parser.Parse(packet, True)
    except (expat.ExpatError, _DoctypeError):
        return []
    return spans


def read_png_text(body: bytes) -> bytes:
    """The packet in an iTXt chunk with XMP's keyword; b"" if it is damaged.

    Of a compressed packet above ``MAX_PACKET_BYTES`` no more than the first byte beyond is read.
    """
    start = len(PNG_KEYWORD)
    # Compression flag and method, language and translated keyword, then the text.
    text = body[start + 2 :].split(b"\0", 2)[-1]
    return inflate(text, MAX_PACKET_BYTES) if body[start : start + 1] == b"\1" else text


def make_png_text(packet: bytes) -> bytes:
    """The body of an uncompressed iTXt chunk that holds the packet."""
    return PNG_KEYWORD + b"\0\0\0\0" + packet


def inflate(data: bytes, max_bytes: int) -> bytes:
    """Decompresses zlib data; of more than max_bytes, the first max_bytes + 1; b"" for damage."""
    try:
        inflater = zlib.decompressobj()
        inflated = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        return b""
    return inflated if inflater.eof or len(inflated) > max_bytes else b""
