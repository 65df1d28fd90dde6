"""Provenance: a result says in its XMP packet that it was edited, by what, and how.

What others read: IPTC's digital source type (search engines, picture desks, tools for content
credentials), ``xmp:CreatorTool``, and an event in ``xmpMM:History``. What is only ours: the
job, its seed, engine and parameters, in a namespace of its own; ``exiftool -XMP-inpaint:all``
shows them. There are no time stamps: the same job always writes the same bytes.
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
# What XML 1.0 cannot hold.
_UNWRITABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
# IPTC's terms for media with parts from a trained model: no later edit makes them untrue.
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
    """What is said about one result. trained: the engine runs a trained model."""

    job: int
    seed: int
    engine: str
    revision: str
    params_json: str
    trained: bool


def add_provenance(xmp: bytes, note: Provenance) -> bytes:
    """The source's XMP packet, which may be empty, with the note in it: a whole packet, UTF-8.

    Everything else in it stays. An earlier note is replaced; ``xmp:CreatorTool`` is only set
    where there is none; a source type that already tells of generative AI stays, whatever the
    engine; the history gains one event a job, so marking twice changes nothing. A packet that
    is damaged, or has a DOCTYPE, is replaced by a new one, with a warning in the log.
    """
    return _PACKET % _merged(_parsed(xmp), note)


def _parsed(xmp: bytes) -> etree._Element:
    """The packet's root element, with an rdf:RDF in it."""
    text = _repaired(xmp)
    # No entity is expanded, nothing is fetched, and libxml2's limits on depth and size stay on.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, strip_cdata=False)
    try:
        root = etree.fromstring(text or _EMPTY, parser)
    except etree.XMLSyntaxError as error:
        return _replaced(str(error))
    if root.getroottree().docinfo.doctype:
        return _replaced("it has a DOCTYPE")
    if next(root.iter(_name("rdf:RDF")), None) is None:
        return _replaced("it has no rdf:RDF")
    return root


def _replaced(reason: str) -> etree._Element:
    log.warning("the source's XMP packet is damaged and replaced: %s", reason)
    return etree.fromstring(_EMPTY)


def _repaired(xmp: bytes) -> str:
    """The packet's text without padding; empty where there is none.

    Bytes that are no UTF-8 are read as Windows-1252 and control characters as spaces, which is
    what Adobe's toolkit makes of them.
    """
    encoding = detect_encoding(xmp)
    text = xmp.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "replace")
    text = re.sub("[\udc80-\udcff]+", _from_windows, text)
    text = re.sub(r"<\?xml\s[^>]*>", "", _UNWRITABLE.sub(" ", text))
    return text[text.find("<") : text.rfind(">") + 1] if "<" in text else text.strip()


def _from_windows(match: re.Match[str]) -> str:
    return match[0].encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def _merged(root: etree._Element, note: Provenance) -> bytes:
    rdf = next(root.iter(_name("rdf:RDF")))
    about = next((one.get(_name("rdf:about"), "") for one in _descriptions(rdf)), "")
    kind = "compositeWithTrainedAlgorithmicMedia" if note.trained else "algorithmicallyEnhanced"
    for value in _values(rdf, _SOURCE_TYPE):
        term = re.split("[/:]", value.strip())[-1]
        kind = term if term in _GENERATED else kind
    _remove_note(rdf)
    _add_event(rdf, about, note)
    if not any(_values(rdf, "xmp:CreatorTool")):
        _add(_describe(rdf, about, "xmp"), "xmp:CreatorTool", _software())
    ours = _describe(rdf, about, "Iptc4xmpExt", "inpaint")
    _add(ours, _SOURCE_TYPE, SOURCE_TYPES + kind)
    for name in ("job", "seed", "engine", "revision"):
        _add(ours, f"inpaint:{name}", str(getattr(note, name)))
    _add(ours, "inpaint:parameters", note.params_json)
    merged: bytes = etree.tostring(root, encoding="utf-8", xml_declaration=False)
    return merged


def _remove_note(rdf: etree._Element) -> None:
    for description in _descriptions(rdf):
        names = [name for name in description.attrib if _is_ours(name)]
        for name in names:
            del description.attrib[name]
        elements = [one for one in description.iterchildren("*") if _is_ours(one.tag)]
        for element in elements:
            description.remove(element)
        is_left = len(description) or set(description.attrib) - {_name("rdf:about")}
        if (names or elements) and not is_left:
            rdf.remove(description)


def _is_ours(name: str) -> bool:
    return name == _name(_SOURCE_TYPE) or name.startswith(f"{{{NAMESPACE}}}")


def _add_event(rdf: etree._Element, about: str, note: Provenance) -> None:
    """One event a job, at the end of the list, in the shape Photoshop gives its own."""
    history = rdf.find(f"{_name('rdf:Description')}/{_name('xmpMM:History')}")
    if history is None:
        history = etree.SubElement(_describe(rdf, about, "xmpMM"), _name("xmpMM:History"))
    events = next(history.iterchildren("*"), None)
    if events is None:
        events = etree.SubElement(history, _name("rdf:Seq"))
    what = f"inpainted by job {note.job}, engine {note.engine}, seed {note.seed}"
    what = _UNWRITABLE.sub(" ", what)
    if any(what in (one.text, *one.attrib.values()) for one in events.iter("*")):
        return
    event = etree.SubElement(events, _name("rdf:li"), nsmap={"stEvt": _SPACES["stEvt"]})
    event.set(_name("rdf:parseType"), "Resource")
    _add(event, "stEvt:action", "edited")
    _add(event, "stEvt:softwareAgent", _software())
    _add(event, "stEvt:parameters", what)
    _add(event, "stEvt:changed", "/")


def _values(rdf: etree._Element, name: str) -> Iterator[str]:
    """The property's values, in whichever of RDF's three ways they are written."""
    for description in _descriptions(rdf):
        yield description.get(_name(name), "")
        for element in description.iterchildren(_name(name)):
            yield element.get(_name("rdf:resource")) or element.text or ""


def _descriptions(rdf: etree._Element) -> list[etree._Element]:
    return list(rdf.iterchildren(_name("rdf:Description")))


def _describe(rdf: etree._Element, about: str, *prefixes: str) -> etree._Element:
    """A new description of the picture at the end, that knows these namespaces."""
    spaces = {prefix: _SPACES[prefix] for prefix in ("rdf", *prefixes)}
    description = etree.SubElement(rdf, _name("rdf:Description"), nsmap=spaces)
    description.set(_name("rdf:about"), about)
    description.tail = "\n"
    return description


def _add(parent: etree._Element, name: str, text: str) -> None:
    etree.SubElement(parent, _name(name)).text = _UNWRITABLE.sub(" ", text)


def _name(name: str) -> str:
    """``prefix:local`` as lxml writes it."""
    prefix, _, local = name.partition(":")
    return f"{{{_SPACES[prefix]}}}{local}"


@cache
def _software() -> str:
    return f"inpaint-batch {version('inpaint-batch')}"
