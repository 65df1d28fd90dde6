"""Recognises a file's format by its first bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shared.errors import ImageError
from shared.image_formats import FORMATS, ImageFormat, join_with_or

_SIGNATURE_BYTES = 1 << 16  # the longest comment before an HTML page that is recognised

_REMEDY = f"use {join_with_or(FORMATS)}"


def recognise(data: bytes) -> ImageFormat:
    """The file's format; raises ImageError that names what the file is instead."""
    if not data:
        raise ImageError("the file is empty (0 bytes); upload it again")
    head = data[:_SIGNATURE_BYTES]
    for name, signature in _SIGNATURES.items():
        if signature.match(head):
            return FORMATS[name]
    for name, signature in _FOREIGN_SIGNATURES.items():
        if signature.match(head):
            raise ImageError(f"the file is {name}; {_REMEDY}")
    raise ImageError(f"the file is in no known image format (starts {data[:8]!r}); {_REMEDY}")


def _compiled(patterns: Mapping[str, bytes]) -> Mapping[str, re.Pattern[bytes]]:
    return {name: re.compile(pattern, re.DOTALL) for name, pattern in patterns.items()}


_SIGNATURES = _compiled({name: format.signature for name, format in FORMATS.items()})

# What people submit by mistake. The order matters: XML matches SVG, MP4 matches HEIC.
_FOREIGN_SIGNATURES = _compiled(
    {
        "JPEG-LS": rb"\xff\xd8\xff\xf7",
        "GIF": rb"GIF8",
        "a Photoshop document (PSD)": rb"8BPS",
        "AVIF": rb"....ftypavi",
        "HEIC": rb"....ftyp(hei|hev|mif|msf)",
        "a video (MP4)": rb"....ftyp",
        "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
        "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
        "PDF": rb"%PDF",
        "PostScript": rb"%!PS",
        "a Windows icon": rb"\0\0[\x01\x02]\0",
        "a ZIP archive": rb"PK\x03\x04",
        "gzip data": rb"\x1f\x8b",
        "a Git LFS pointer, not the image itself": rb"version https://git-lfs",
        "an HTML page": (
            rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?(?i:<(!doctype html|html|head|body))"
        ),
        "an SVG drawing": rb"(\xef\xbb\xbf)?\s*(?i:<(svg|.{0,1000}<svg))",
        "XML": rb"(\xef\xbb\xbf)?\s*<[?!a-zA-Z]",
        "JSON": rb"\s*[{\[]\s*[\"{\[\]}]",
    }
)
