"""Metadata made to cost more than its bytes: each shape takes linear time and bounded memory."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from shared import images
from shared.errors import ImageError, MaskError
from shared.images import tiff_ifd, xmp
from shared.images.jpeg_markers import make_segment
from shared.images.png_format import make_chunk
from shared.images.provenance import NAMESPACE, Provenance, add_provenance
from shared.masks.boxes import parse_boxes

NOTE = Provenance(job=1, seed=2, engine="opencv", revision="r", params_json="{}", trained=False)
HEAD = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
)
TAIL = b"</rdf:RDF></x:xmpmeta>"
OWN = f'xmlns:i="{NAMESPACE}"'.encode()

# A packet that repeats a pattern, by its length in bytes.
PACKETS: dict[str, Callable[[int], bytes]] = {
    "declarations": lambda size: b"<?xml " * (size // 6),
    "wrappers": lambda size: b"<?xpacket" * (size // 9),
    "descriptions": lambda size: b"<rdf:RDF" * (size // 8),
    "notes": lambda size: b" xmpNote:HasExtendedXMP " * (size // 24),
    "spaces": lambda size: HEAD + b" " * size + TAIL,
    "spaces before a note": lambda size: b" " * size + b"xmpNote:HasExtendedXMP",
    "elements": lambda size: HEAD + b"<a/>" * (size // 4) + TAIL,
    "open elements": lambda size: b"<a>" * (size // 3),
    "stray bytes": lambda size: HEAD + b"\x80a" * (size // 2) + TAIL,
    "attributes": lambda size: (
        HEAD
        + b"<rdf:Description %b " % OWN
        + b" ".join(b'a%d="1" i:a%d="1"' % (i, i) for i in range(size // 28))
        + b"/>"
        + TAIL
    ),
    "own notes": lambda size: (
        HEAD + b'<rdf:Description rdf:about="" %b i:a="1"/>' % OWN * (size // 85) + TAIL
    ),
}


def cost(work: Callable[[], object]) -> float:
    """CPU seconds of this thread, the least of three runs."""
    costs = []
    for _ in range(3):
        start = time.thread_time()
        work()
        costs.append(time.thread_time() - start)
    return min(costs)


def every_step(packet: bytes) -> None:
    """Each function that scans a packet."""
    add_provenance(packet, NOTE)
    guid = hashlib.md5(packet, usedforsecurity=False).hexdigest().upper().encode()
    piece = xmp.EXTENSION + guid + struct.pack(">II", len(packet), 0) + packet
    standard = HEAD + b' xmpNote:HasExtendedXMP="' + guid + b'"' + TAIL
    xmp.read_jpeg_bodies([xmp.STANDARD + standard, piece])
    xmp.read_jpeg_bodies([xmp.STANDARD + packet])
    xmp.make_jpeg_bodies(packet)


@pytest.mark.parametrize("shape", PACKETS)
def test_a_packet_costs_time_linear_in_its_length(shape: str) -> None:
    short, long = (PACKETS[shape](size) for size in (60_000, 240_000))
    # Quadratic: 16 times as much. The floor hides the clock's noise.
    assert cost(lambda: every_step(long)) < 10 * max(cost(lambda: every_step(short)), 0.03)


def png(*chunks: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 120, 150)).save(buffer, "PNG")
    file = buffer.getvalue()
    return file[:33] + b"".join(chunks) + file[33:]


def packed(packet: bytes) -> bytes:
    return make_chunk(b"iTXt", xmp.PNG_KEYWORD + b"\1\0\0\0" + zlib.compress(packet))


def in_png(packet: bytes) -> bytes:
    return png(packed(packet))


def in_jpeg(packet: bytes) -> bytes:
    """As an extended packet, which its standard packet names."""
    guid = hashlib.md5(packet, usedforsecurity=False).hexdigest().upper().encode()
    bodies = [xmp.STANDARD + HEAD + b' xmpNote:HasExtendedXMP="' + guid + b'"' + TAIL]
    for start in range(0, len(packet), 65_000):
        place = struct.pack(">II", len(packet), start)
        bodies.append(xmp.EXTENSION + guid + place + packet[start : start + 65_000])
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 120, 150)).save(buffer, "JPEG")
    file = buffer.getvalue()
    return file[:2] + b"".join(make_segment(0xE1, body) for body in bodies) + file[2:]


def in_webp(packet: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 120, 150)).save(buffer, "WEBP", xmp=packet)
    return buffer.getvalue()


def in_tiff(packet: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 120, 150)).save(buffer, "TIFF", tiffinfo={700: packet})
    return buffer.getvalue()


def touched(image: images.DecodedImage) -> images.DecodedImage:
    pixels, mask = image.pixels.copy(), np.zeros((48, 64), np.bool_)
    pixels[3, 3] ^= 1
    mask[3, 3] = True
    return image.replace(pixels, touched=mask)


@pytest.mark.parametrize("place", [in_png, in_jpeg, in_webp, in_tiff])
@pytest.mark.parametrize("shape", ["declarations", "descriptions", "spaces"])
def test_a_packet_of_ten_megabytes_is_dropped_and_logged(
    shape: str, place: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    file = place(PACKETS[shape](10_000_000))
    image = images.decode(file, max_pixels=10_000)
    assert image.metadata.xmp == b""
    assert f"the {image.format} file's XMP packet is dropped: it is larger than 1 MB" in caplog.text
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        kept = images.encode(touched(image), format=format)
        marked = images.encode(touched(image), format=format, xmp=add_provenance(b"", NOTE))
        assert len(kept) < len(marked) < 100_000


@pytest.mark.parametrize("place", [in_png, in_jpeg, in_webp, in_tiff])
def test_a_packet_just_below_the_limit_is_kept(place: Callable[[bytes], bytes]) -> None:
    packet = HEAD + b"<a>" + b"x" * 900_000 + b"</a>" + TAIL
    image = images.decode(place(packet), max_pixels=10_000)
    assert b"x" * 900_000 in image.metadata.xmp


def test_entities_of_a_jpeg_packet_are_not_expanded() -> None:
    entities = b'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">%b]>' % b"".join(
        b'<!ENTITY %c "%b">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(6)
    )
    packet = entities + HEAD + b"<rdf:Description>&g;</rdf:Description>" + b" " * 70_000 + TAIL
    first, *rest = xmp.make_jpeg_bodies(packet)
    # What is not parsed is not split by its descriptions: all of it is in the extended packet.
    assert b"&g;" not in first
    assert b"aaaaaaaaaa" not in first
    assert b"&g;" in b"".join(rest)
    assert xmp.read_jpeg_bodies([first, *rest]) == first[len(xmp.STANDARD) :]


def test_many_packed_packets_are_not_all_inflated() -> None:
    damaged = make_chunk(
        b"iTXt", xmp.PNG_KEYWORD + b"\1\0\0\0" + zlib.compress(b"x" * 900_000)[:-5]
    )
    file = png(*[damaged] * 2_000)
    tracemalloc.start()
    images.probe(file, max_pixels=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(file) + 4_000_000


def test_a_file_of_countless_pieces_is_refused() -> None:
    jpeg = in_jpeg(b"")
    many = jpeg[:2] + make_segment(0xFE, b"") * 20_000 + jpeg[2:]
    with pytest.raises(ImageError, match="has over 10,000 segments of metadata; save it again"):
        images.probe(many, max_pixels=10_000)
    with pytest.raises(ImageError, match="has over 200,000 chunks; save it again"):
        images.probe(png(make_chunk(b"teXt", b"") * 200_001), max_pixels=10_000)


def test_fill_bytes_before_a_jpeg_marker_are_skipped_at_once() -> None:
    jpeg = in_jpeg(b"")
    short, long = (jpeg[:2] + b"\xff" * size + jpeg[2:] for size in (10_000, 10_000_000))
    assert images.probe(long, max_pixels=10_000) == (64, 48)
    # Linear would be 1,000 times as much in Python; matched in C, it is next to nothing.
    assert cost(lambda: images.probe(long, max_pixels=10_000)) < 100 * max(
        cost(lambda: images.probe(short, max_pixels=10_000)), 0.002
    )


def test_tags_that_share_their_bytes_do_not_multiply_them() -> None:
    """20,000 tags of an EXIF directory, each of the same 100 kB: 2 GB if they were copied."""
    file = in_tiff(b"")
    directory, start = tiff_ifd.read_directory(file), len(file) + 100_000
    start += start % 2
    tags = [
        tiff_ifd.Tag(
            number=tag, type=entry.type, count=entry.count, body=directory.value(file, tag)
        )
        for tag, entry in directory.entries.items()
    ]
    inner = b"".join(struct.pack("<HHII", i, 7, 100_000, len(file)) for i in range(1_000, 21_000))
    exif = struct.pack("<H", 20_000) + inner + bytes(4)
    padded = file.ljust(start, b"\0") + exif
    pointer = tiff_ifd.Tag(number=34665, type=4, count=1, body=struct.pack("<I", start))
    hostile = tiff_ifd.append_directory(padded, [*tags, pointer], order="<")
    tracemalloc.start()
    with pytest.raises(ImageError, match="damaged"):
        images.probe(hostile, max_pixels=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


def test_more_than_a_thousand_boxes_are_refused() -> None:
    assert len(parse_boxes("box:" + ";".join(["0,0,9,9"] * 1_000))) == 1_000
    with pytest.raises(MaskError, match="50,000 boxes are too many; use at most 1,000, or a mask"):
        parse_boxes("box:" + ";".join(["0,0,9,9"] * 50_000))
