"""Provenance: a result's XMP packet records that it was edited, by what software, and how.

Other programs read IPTC's digital source type (search engines, photo desks, tools for content
credentials), ``xmp:CreatorTool``, and an event in ``xmpMM:History``. The job, its seed, engine
and parameters are in the product's own namespace; ``exiftool -XMP-inpaint:all`` shows them.
There are no timestamps: the same job always writes the same bytes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from json import detect_encoding

from lxml import etree

log = logging.getLogger(__name__)

NAMESPACE = "http://ns.inpaint-batch.org/1.0/"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"

_SPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stEvt": "http://ns.adobe.com/xap/1.0/sType/ResourceEvent#",
    "inpaint": NAMESPACE,
}
_SOURCE_TYPE = "Iptc4xmpExt:DigitalSourceType"
# Characters that XML 1.0 does not allow.
_UNWRITABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
# Linear: an attempt ends at the next "<", where the next one may start.
_DECLARATION = re.compile(r"<\?xml\s[^<>]*+>")
# Stray bytes, as "surrogateescape" decodes them, to the characters of Windows-1252.
_WINDOWS_1252 = {
    0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)
}
# libxml2 takes time quadratic in an element's attributes to remove them; Lightroom writes 300.
_MAX_ATTRIBUTES = 2_000
# IPTC's terms for media with parts from a trained model: they stay true after any later edit.
_GENERATED = (
    *("trainedAlgorithmicMedia", "compositeSynthetic"),
    "compositeWithTrainedAlgorithmicMedia",
)
_EMPTY = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{_SPACES["rdf"]}">\n</rdf:RDF></x:xmpmeta>'
)
_PACKET = b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n%b\n<?xpacket end="w"?>'


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the packet records about one result. trained: the engine runs a trained model."""

    job: int
    seed: int
    engine: str
    revision: str
    params_json: str
    trained: bool


def add_provenance(xmp: bytes, note: Provenance) -> bytes:
    """Adds the note to the source's XMP packet, which may be empty; returns a packet in UTF-8.

    Everything else in it stays. An earlier note is replaced; ``xmp:CreatorTool`` is only set
    if there is none; a source type that declares generative AI stays, whatever the engine;
    the history gains one event per job, so that adding a note twice changes nothing. A packet
    that is damaged, or has a DOCTYPE, is replaced by a new one, with a warning in the log.
    """
    return _PACKET % _merge(_parse(xmp), note)


def _parse(xmp: bytes) -> etree._Element:
    """The packet's root element, with an rdf:RDF in it."""
    text = _repair(xmp)
    # No entity is expanded, nothing is fetched, and libxml2's limits on depth and size stay on.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, strip_cdata=False)
    try:
        root = etree.fromstring(text or _EMPTY, parser)
    except etree.XMLSyntaxError as error:
        return _new_packet(str(error))
    if root.getroottree().docinfo.doctype:
        return _new_packet("it has a DOCTYPE")
    rdf = next(root.iter(_name("rdf:RDF")), None)
    if rdf is None:
        return _new_packet("it has no rdf:RDF")
    count = max((len(description.attrib) for description in _descriptions(rdf)), default=0)
    if count > _MAX_ATTRIBUTES:
        return _new_packet(f"an element has {count} attributes")
    return root


def _new_packet(reason: str) -> etree._Element:
    log.warning("the source's XMP packet is damaged and replaced: %s", reason)
    return etree.fromstring(_EMPTY)


def _repair(xmp: bytes) -> str:
    """The packet's text without padding; empty if there is none.

    Bytes that are not UTF-8 are read as Windows-1252 and control characters as spaces, as
    Adobe's toolkit does.
    """
    encoding = detect_encoding(xmp)
    text = xmp.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "replace")
    text = _DECLARATION.sub("", _UNWRITABLE.sub(" ", text.translate(_WINDOWS_1252)))
    return text[text.find("<") : text.rfind(">") + 1] if "<" in text else text.strip()


def _merge(root: etree._Element, note: Provenance) -> bytes:
    rdf = next(root.iter(_name("rdf:RDF")))
    abouts = (element.get(_name("rdf:about"), "") for element in _descriptions(rdf))
    about = next(abouts, "")
    source_type = (
        "compositeWithTrainedAlgorithmicMedia" if note.trained else "algorithmicallyEnhanced"
    )
    for value in _values(rdf, _SOURCE_TYPE):
        term = value.strip().rpartition("/")[2].rpartition(":")[2]
        source_type = term if term in _GENERATED else source_type
    _remove_note(rdf)
    _add_event(rdf, about, note)
    if not any(_values(rdf, "xmp:CreatorTool")):
        _add(_describe(rdf, about, "xmp"), "xmp:CreatorTool", _software())
    own = _describe(rdf, about, "Iptc4xmpExt", "inpaint")
    _add(own, _SOURCE_TYPE, SOURCE_TYPES + source_type)
    for name in ("job", "seed", "engine", "revision"):
        _add(own, f"inpaint:{name}", str(getattr(note, name)))
    _add(own, "inpaint:parameters", note.params_json)
    packet: bytes = etree.tostring(root, encoding="utf-8", xml_declaration=False)
    return packet


def _remove_note(rdf: etree._Element) -> None:
    for description in _descriptions(rdf):
        names = [name for name in description.attrib if _is_own(name)]
        for name in names:
            del description.attrib[name]
        elements = [child for child in description.iterchildren("*") if _is_own(child.tag)]
        for element in elements:
            description.remove(element)
        is_used = len(description) or set(description.attrib) - {_name("rdf:about")}
        if (names or elements) and not is_used:
            rdf.remove(description)


def _is_own(name: str) -> bool:
    return name == _name(_SOURCE_TYPE) or name.startswith(f"{{{NAMESPACE}}}")


def _add_event(rdf: etree._Element, about: str, note: Provenance) -> None:
    """One event per job, at the end of the list, in the form that Photoshop writes."""
    history = rdf.find(f"{_name('rdf:Description')}/{_name('xmpMM:History')}")
    if history is None:
        history = etree.SubElement(_describe(rdf, about, "xmpMM"), _name("xmpMM:History"))
    events = next(history.iterchildren("*"), None)
    if events is None:
        events = etree.SubElement(history, _name("rdf:Seq"))
    text = f"inpainted by job {note.job}, engine {note.engine}, seed {note.seed}"
    text = _UNWRITABLE.sub(" ", text)
    if any(text in (element.text, *element.attrib.values()) for element in events.iter("*")):
        return
    event = etree.SubElement(events, _name("rdf:li"), nsmap={"stEvt": _SPACES["stEvt"]})
    event.set(_name("rdf:parseType"), "Resource")
    _add(event, "stEvt:action", "edited")
    _add(event, "stEvt:softwareAgent", _software())
    _add(event, "stEvt:parameters", text)
    _add(event, "stEvt:changed", "/")


def _values(rdf: etree._Element, name: str) -> Iterator[str]:
    """The property's values: RDF writes one as an attribute, an element or a resource."""
    for description in _descriptions(rdf):
        yield description.get(_name(name), "")
        for element in description.iterchildren(_name(name)):
            yield element.get(_name("rdf:resource")) or element.text or ""


def _descriptions(rdf: etree._Element) -> list[etree._Element]:
    return list(rdf.iterchildren(_name("rdf:Description")))


def _describe(rdf: etree._Element, about: str, *prefixes: str) -> etree._Element:
    """Appends a description of the image that declares these namespaces."""
    spaces = {prefix: _SPACES[prefix] for prefix in ("rdf", *prefixes)}
    description = etree.SubElement(rdf, _name("rdf:Description"), nsmap=spaces)
    description.set(_name("rdf:about"), about)
    description.tail = "\n"
    return description


def _add(parent: etree._Element, name: str, text: str) -> None:
    etree.SubElement(parent, _name(name)).text = _UNWRITABLE.sub(" ", text)


def _name(name: str) -> str:
    """``{namespace}local``, lxml's notation, from ``prefix:local``."""
    prefix, _, local = name.partition(":")
    return f"{{{_SPACES[prefix]}}}{local}"


@cache
def _software() -> str:
    return f"inpaint-batch {version('inpaint-batch')}"
