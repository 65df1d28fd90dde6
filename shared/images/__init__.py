"""Images: bytes enter in ``decode`` and leave in ``encode``, with depth, alpha and metadata."""

from shared.image_formats import format_of
from shared.images.decoding import decode, probe
from shared.images.encoding import check, encode
from shared.images.image import (
    Array,
    DecodedImage,
    Metadata,
    Pixels,
    SourceEncoding,
    as_rgb,
    from_rgb,
    full_scale,
    has_alpha,
)

__all__ = [
    "Array",
    "SourceEncoding",
    "Metadata",
    "DecodedImage",
    "Pixels",
    "as_rgb",
    "check",
    "decode",
    "encode",
    "format_of",
    "from_rgb",
    "full_scale",
    "has_alpha",
    "probe",
]
