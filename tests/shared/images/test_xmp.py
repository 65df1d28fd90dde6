"""XMP packets: read from every format, replaced as a whole, carried from one to another."""

from __future__ import annotations

import io
import struct
from typing import Any
from xml.parsers import expat

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from skimage import data

from shared import images
from shared.images import xmp
from shared.images.jpeg_markers import make_segment
from shared.images.png_format import make_chunk
from shared.images.provenance import Provenance, add_provenance

CAT = Image.fromarray(data.chelsea()).resize((64, 48))
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def packet(text: str) -> bytes:
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{text}</dc:title>'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


OLD, NEW, LONG = packet("old"), packet("new"), packet("long " * 40_000)


def save(format: str, old: bytes = OLD) -> bytes:
    options: dict[str, Any] = {"xmp": old}
    if format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", old.decode(), zip=True)
        options = {"pnginfo": text}
    if format == "TIFF":
        options = {"tiffinfo": {700: old}}
    buffer = io.BytesIO()
    CAT.save(buffer, format, **options)
    return buffer.getvalue()


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=10**6)


def repainted(file: bytes) -> images.DecodedImage:
    image = decode(file)
    pixels, touched = image.pixels.copy(), np.zeros((48, 64), np.bool_)
    pixels[3, 3] ^= 1
    touched[3, 3] = True
    return image.replace(pixels, touched=touched)


@pytest.mark.parametrize("format", FORMATS)
def test_the_sources_packet_is_read_and_kept(format: str) -> None:
    file = save(format)
    assert decode(file).metadata.xmp == OLD
    assert decode(images.encode(repainted(file))).metadata.xmp == OLD


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_a_packet_replaces_the_sources_in_every_format(source: str, format: str) -> None:
    after = images.encode(repainted(save(source)), format=format, xmp=NEW)
    assert decode(after).metadata.xmp == NEW
    assert b">old<" not in after


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_file_without_a_packet_gets_one(format: str) -> None:
    buffer = io.BytesIO()
    CAT.save(buffer, format, dpi=(300, 300))
    after = images.encode(repainted(buffer.getvalue()), xmp=NEW)
    assert decode(after).metadata.xmp == NEW
    assert Image.open(io.BytesIO(after)).info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_bmp_has_no_packet() -> None:
    assert NEW not in images.encode(repainted(save("PNG")), format="BMP", xmp=NEW)


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_that_nothing_touched_is_not_marked(format: str) -> None:
    file = save(format)
    assert images.encode(decode(file), xmp=NEW) is file


def test_jpeg_splits_a_long_packet_over_segments_and_joins_them_again() -> None:
    after = images.encode(repainted(save("JPEG")), xmp=LONG)
    assert after.count(xmp.STANDARD) == 1
    assert after.count(xmp.EXTENSION) == 4
    merged = decode(after).metadata.xmp
    assert b"long " * 40_000 in merged
    assert b"HasExtendedXMP" not in merged
    expat.ParserCreate().Parse(merged, True)
    again = images.encode(repainted(after), xmp=NEW)
    assert again.count(xmp.EXTENSION) == 0
    assert decode(again).metadata.xmp == NEW


@pytest.mark.parametrize("damage", ["missing", "other", "not XML"])
def test_an_extended_packet_that_is_damaged_is_ignored(damage: str) -> None:
    standard, *pieces = xmp.make_jpeg_bodies(LONG)
    if damage == "missing":
        pieces = pieces[:-1]
    elif damage == "other":
        pieces = [piece.replace(piece[35:67], b"0" * 32) for piece in pieces]
    else:
        pieces = [piece.replace(b"</dc:title>", b"<dc:title/>") for piece in pieces]
    assert xmp.read_jpeg_bodies([standard, *pieces]) == standard[len(xmp.STANDARD) :]


def test_padding_alone_does_not_split_a_packet() -> None:
    padded = NEW.replace(b"<?xpacket end", b" " * 70_000 + b"<?xpacket end")
    assert len(xmp.make_jpeg_bodies(padded)) == 1


def test_a_new_packet_follows_exif() -> None:
    head = save("JPEG")
    exif = make_segment(0xE1, b"Exif\0\0" + struct.pack("<2sHIHI", b"II", 42, 8, 0, 0))
    after = images.encode(repainted(head[:20] + exif + head[20:]), xmp=NEW)
    assert after.index(b"JFIF") < after.index(b"Exif") < after.index(NEW)


def test_a_damaged_text_chunk_is_ignored() -> None:
    file = save("PNG")
    whole = file[:33] + make_chunk(b"iTXt", xmp.PNG_KEYWORD + b"\1\0\0\0zip?") + file[33:]
    assert decode(whole).metadata.xmp == OLD


def test_a_long_packet_keeps_its_small_descriptions_in_the_first_segment() -> None:
    depth = b'<rdf:Description rdf:about="" xmlns:g="http://g/"><g:map>%b</g:map></rdf:Description>'
    both = OLD.replace(b"</rdf:RDF>", depth % (b"0%" * 60_000) + b"</rdf:RDF>")
    first, *rest = xmp.make_jpeg_bodies(both)
    assert b"<dc:title>old</dc:title>" in first
    assert b"HasExtendedXMP" in first
    assert len(rest) == 2
    expat.ParserCreate(namespace_separator=" ").Parse(first[len(xmp.STANDARD) :], True)
    again = xmp.read_jpeg_bodies([first, *rest])
    assert b"<dc:title>old</dc:title>" in again
    assert b"0%" * 60_000 in again


def test_a_long_packet_that_is_not_xml_becomes_an_extended_packet_as_a_whole() -> None:
    first, *rest = xmp.make_jpeg_bodies(b"<broken " + b"x" * 70_000)
    assert b"HasExtendedXMP" in first
    assert b"".join(body[len(xmp.EXTENSION) + 40 :] for body in rest).startswith(b"<broken x")


def test_the_note_of_how_a_result_was_made_is_in_the_first_segment() -> None:
    note = Provenance(job=7, seed=1, engine="sd2", revision="r", params_json="{}", trained=True)
    first = xmp.make_jpeg_bodies(add_provenance(LONG, note))[0]
    assert b"compositeWithTrainedAlgorithmicMedia" in first
