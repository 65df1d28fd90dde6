from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyexiv2
import pytest
from lxml import etree
from PIL import Image

from shared import images
from shared.images.provenance import NAMESPACE, SOURCE_TYPES, Provenance, add_provenance

NOTE = Provenance(
    job=17,
    seed=2**63 - 1,
    engine="sd2",
    revision="5f2a91c",
    params_json='{"prompt":"a <red> \\"door\\" & шкаф"}',
    trained=True,
)
OPENCV = replace(NOTE, engine="opencv", revision="4.12", trained=False)
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
XMP = "http://ns.adobe.com/xap/1.0/"
EVENT = "http://ns.adobe.com/xap/1.0/sType/ResourceEvent#"
EDITED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"

PHOTOSHOP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 9.1"><r:RDF xmlns:r="{RDF}">
<r:Description r:about="uuid:9" xmlns:xap="{XMP}" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:MM="http://ns.adobe.com/xap/1.0/mm/" xmlns:e="{EVENT}" xap:CreatorTool="X-T5 Ver1.10"
 xap:Rating="4"><!-- kept --><dc:title><r:Alt><r:li xml:lang="x-default">Łódź &amp; fog</r:li>
</r:Alt></dc:title><MM:History><r:Seq><r:li e:action="saved" e:softwareAgent="Photoshop"/>
</r:Seq></MM:History></r:Description></r:RDF></x:xmpmeta>{" " * 2000}<?xpacket end="w"?>""".encode()
# The same with the prefixes that Exiv2 wants.
LIGHTROOM = PHOTOSHOP
for old, new in ((b"r", b"rdf"), (b"xap", b"xmp"), (b"MM", b"xmpMM"), (b"e", b"stEvt")):
    LIGHTROOM = re.sub(rb"(?<=[ </:])%b(?=[:=])" % old, new, LIGHTROOM)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def rdf(packet: bytes) -> Any:
    body = re.sub(rb"<\?xpacket.*?\?>", b"", packet).strip()
    return next(etree.fromstring(body).iter(f"{{{RDF}}}RDF"))


def values(packet: bytes, space: str, name: str) -> list[str]:
    elements = [element.text for element in rdf(packet).iter(f"{{{space}}}{name}")]
    return elements + rdf(packet).xpath(
        f"//@*[local-name()='{name}' and namespace-uri()='{space}']"
    )


def packet(inside: str) -> bytes:
    return f'<rdf:RDF xmlns:rdf="{RDF}">{inside}</rdf:RDF>'.encode()


def source_type(term: str) -> bytes:
    return packet(f'<rdf:Description rdf:about="" xmlns:i="{IPTC}" i:DigitalSourceType="{term}"/>')


# Contents of the note


def test_an_image_without_a_packet_gets_one() -> None:
    marked = add_provenance(b"", NOTE)
    assert values(marked, IPTC, "DigitalSourceType") == [EDITED]
    assert values(marked, NAMESPACE, "job") == ["17"]
    assert values(marked, NAMESPACE, "seed") == [str(2**63 - 1)]
    assert values(marked, NAMESPACE, "engine") == ["sd2"]
    assert values(marked, NAMESPACE, "revision") == ["5f2a91c"]
    assert values(marked, NAMESPACE, "parameters") == [NOTE.params_json]
    assert values(marked, EVENT, "action") == ["edited"]
    assert values(marked, XMP, "CreatorTool") == values(marked, EVENT, "softwareAgent")
    assert marked.startswith(b'<?xpacket begin="\xef\xbb\xbf"')
    assert marked.endswith(b'<?xpacket end="w"?>')


def test_an_engine_without_a_trained_model_is_not_declared_as_generative_ai() -> None:
    types = values(add_provenance(b"", OPENCV), IPTC, "DigitalSourceType")
    assert types == [SOURCE_TYPES + "algorithmicallyEnhanced"]


@pytest.mark.parametrize("note", [NOTE, OPENCV])
@pytest.mark.parametrize("prefix", [SOURCE_TYPES, "digsrctype:", ""])
def test_a_generated_image_stays_declared_as_generated(note: Provenance, prefix: str) -> None:
    marked = add_provenance(source_type(prefix + "trainedAlgorithmicMedia"), note)
    assert values(marked, IPTC, "DigitalSourceType") == [SOURCE_TYPES + "trainedAlgorithmicMedia"]


def test_a_photograph_is_no_longer_an_untouched_capture() -> None:
    marked = add_provenance(source_type(SOURCE_TYPES + "digitalCapture"), NOTE)
    assert values(marked, IPTC, "DigitalSourceType") == [EDITED]


def test_the_source_type_is_also_found_as_a_resource() -> None:
    inside = f'<i:DigitalSourceType rdf:resource="{SOURCE_TYPES}compositeSynthetic"/>'
    source = packet(f'<rdf:Description xmlns:i="{IPTC}">{inside}</rdf:Description>')
    types = values(add_provenance(source, NOTE), IPTC, "DigitalSourceType")
    assert types == [SOURCE_TYPES + "compositeSynthetic"]


# Contents of the source's packet


def test_everything_in_the_sources_packet_stays() -> None:
    marked = add_provenance(PHOTOSHOP, NOTE)
    start = PHOTOSHOP.index(b"<dc:title>")
    assert PHOTOSHOP[start : PHOTOSHOP.index(b"</MM:History>")].split(b"</r:Seq>")[0] in marked
    assert values(marked, XMP, "CreatorTool") == ["X-T5 Ver1.10"]
    assert values(marked, XMP, "Rating") == ["4"]
    assert b"<!-- kept -->" in marked
    assert b'xmptk="Adobe XMP Core 9.1"' in marked
    abouts = {element.get(f"{{{RDF}}}about") for element in rdf(marked)}
    assert abouts == {"uuid:9"}


def test_the_new_event_follows_the_others() -> None:
    marked = add_provenance(PHOTOSHOP, NOTE)
    (events,) = rdf(marked).iter(f"{{{RDF}}}Seq")
    first, second = events
    assert first.get(f"{{{EVENT}}}softwareAgent") == "Photoshop"
    assert second.findtext(f"{{{EVENT}}}action") == "edited"
    text = second.findtext(f"{{{EVENT}}}parameters")
    assert text == f"inpainted by job 17, engine sd2, seed {2**63 - 1}"


@pytest.mark.parametrize("source", [b"", PHOTOSHOP, source_type("digitalCapture")])
def test_adding_the_note_of_a_job_twice_changes_nothing(source: bytes) -> None:
    marked = add_provenance(source, NOTE)
    assert add_provenance(marked, NOTE) == marked
    assert add_provenance(source, NOTE) == marked


def test_the_next_job_replaces_the_note_and_adds_an_event() -> None:
    second = add_provenance(add_provenance(PHOTOSHOP, NOTE), replace(NOTE, job=18))
    assert values(second, NAMESPACE, "job") == ["18"]
    assert len(values(second, NAMESPACE, "parameters")) == 1
    events = values(second, EVENT, "parameters")
    assert [event.split(",")[0] for event in events] == [
        "inpainted by job 17",
        "inpainted by job 18",
    ]


def test_a_note_that_another_program_rewrote_as_attributes_is_replaced() -> None:
    source = packet(f'<rdf:Description xmlns:p="{NAMESPACE}" p:job="3" p:parameters="{{}}"/>')
    assert values(add_provenance(source, NOTE), NAMESPACE, "job") == ["17"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_packets_in_other_encodings_are_read(encoding: str) -> None:
    marked = add_provenance(PHOTOSHOP.decode().encode(encoding), NOTE)
    assert "Łódź &amp; fog" in marked.decode()


def test_only_a_stray_byte_and_a_control_character_are_replaced() -> None:
    marked = add_provenance(PHOTOSHOP.replace("Łódź".encode(), b"Caf\xe9\0"), NOTE)
    assert "Café  &amp; fog" in marked.decode()


# Damaged packets


@pytest.mark.parametrize(
    "damaged",
    [
        PHOTOSHOP[:500],
        b"no packet at all",
        b"\xff\xfe\0",
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>' + packet("<a>&b;</a>"),
        b"<a>" * 100_000,
    ],
)
def test_a_damaged_packet_is_replaced_and_logged(
    damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert add_provenance(damaged, NOTE) == add_provenance(b"", NOTE)
    assert "damaged" in caplog.text


def test_characters_that_xml_does_not_allow_become_spaces() -> None:
    marked = add_provenance(b"", replace(NOTE, params_json="a\uffffb\x01c"))
    assert values(marked, NAMESPACE, "parameters") == ["a b c"]


def test_an_xml_declaration_inside_the_packet_is_not_damage() -> None:
    declared = PHOTOSHOP.replace(b"<x:xmpmeta", b'<?xml version="1.0"?><x:xmpmeta')
    assert add_provenance(declared, NOTE) == add_provenance(PHOTOSHOP, NOTE)


# Files, read by other programs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A result with a note per format, and a JPEG whose packet is longer than a segment."""
    folder = tmp_path_factory.mktemp("marked")
    paths = {}
    for name in (*FORMATS, "long JPEG"):
        filler = "long " * 20_000 if name == "long JPEG" else ""
        source = LIGHTROOM.replace(b"</dc:title>", filler.encode() + b"</dc:title>")
        format = name.split()[-1]
        paths[name] = folder / f"{name}.{format.lower()}"
        paths[name].write_bytes(encoded(format, add_provenance(source, NOTE)))
    return paths


def encoded(format: str, packet: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "teal").save(buffer, format, dpi=(72, 72))
    image = images.decode(buffer.getvalue(), max_pixels=10_000)
    pixels, touched = image.pixels.copy(), np.zeros((24, 32), np.bool_)
    pixels[3, 3] = 0
    touched[3, 3] = True
    return images.encode(image.replace(pixels, touched=touched), xmp=packet)


@pytest.mark.parametrize("name", FORMATS)
def test_exiv2_reads_the_note(files: dict[str, Path], name: str) -> None:
    with pyexiv2.Image(str(files[name])) as image:
        tags = image.read_xmp()
    assert tags["Xmp.iptcExt.DigitalSourceType"] == EDITED
    assert tags["Xmp.inpaint.parameters"] == NOTE.params_json
    assert tags["Xmp.inpaint.seed"] == str(NOTE.seed)
    assert tags["Xmp.xmp.CreatorTool"] == "X-T5 Ver1.10"
    assert tags["Xmp.xmpMM.History[2]/stEvt:action"] == "edited"


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
def test_exiftool_reads_the_note_without_a_warning(files: dict[str, Path]) -> None:
    command = ["exiftool", "-json", "-G1", "-struct", "-validate", "-warning", "-XMP:all"]
    output = subprocess.run([*command, *files.values()], capture_output=True, check=True).stdout
    for tags in json.loads(output):
        assert tags["XMP-iptcExt:DigitalSourceType"] == EDITED, tags["SourceFile"]
        assert tags["XMP-inpaint:Job"] == NOTE.job
        assert tags["XMP-inpaint:Engine"] == "sd2"
        assert json.loads(NOTE.params_json) in (
            tags["XMP-inpaint:Parameters"],
            json.loads(tags["XMP-inpaint:Parameters"]),
        )
        assert tags["XMP-xmp:CreatorTool"] == "X-T5 Ver1.10"
        assert [event["Action"] for event in tags["XMP-xmpMM:History"]] == ["saved", "edited"]
        assert tags["XMP-dc:Title"].startswith("Łódź & fog")
        assert tags.get("ExifTool:Warning", "[minor]").startswith("[minor]")
