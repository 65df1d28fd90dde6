"""What is said of an object, wherever it lies."""

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
    """Raises ObjectTooLarge."""
    if size > max_bytes:
        raise ObjectTooLarge(
            f"{uri!r} is {size:,} bytes; the cap is {max_bytes:,} (INPAINT_MAX_OBJECT_BYTES)"
        )
