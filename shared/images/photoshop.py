"""Photoshop's image resources, in JPEG's APP13 and in a TIFF tag: kept without their thumbnail."""

from __future__ import annotations

_THUMBNAILS = (1033, 1036)  # resource numbers of Photoshop 4 and of later versions


def without_thumbnail(resources: bytes) -> bytes:
    """The resources without the thumbnail of the old image; unchanged if they are damaged."""
    kept, start = [], 0
    while start < len(resources):
        if resources[start : start + 4] != b"8BIM" or start + 12 > len(resources):
            return resources
        name_bytes = 1 + resources[start + 6]
        length = start + 6 + name_bytes + name_bytes % 2
        size = int.from_bytes(resources[length : length + 4])
        end = length + 4 + size + size % 2
        if int.from_bytes(resources[start + 4 : start + 6]) not in _THUMBNAILS:
            kept.append(resources[start:end])
        start = end
    return b"".join(kept)
