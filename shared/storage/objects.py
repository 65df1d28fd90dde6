"""The types that local and S3 storage share."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import ObjectTooLarge


@dataclass(frozen=True, kw_only=True)
class Stat:
    """``version``: an ETag, or size and modification time of a local file."""

    version: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Object:
    data: bytes
    version: str


def check_size(uri: str, size: int, max_bytes: int) -> None:
    """Raises ObjectTooLarge above ``max_bytes``."""
    if size > max_bytes:
        raise ObjectTooLarge(
            f"{uri!r} is {size:,} bytes; the cap is {max_bytes:,} (INPAINT_MAX_OBJECT_BYTES)"
        )
