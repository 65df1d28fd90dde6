"""What makes two rows the same work, and the seed of a row that names none."""

from __future__ import annotations

from hashlib import blake2b


def content_key(
    *, image: str, mask: str, output: str, engine: str, params: str, seed: int | None
) -> bytes:
    """16 bytes that are equal for rows asking for the same work. seed: None where not given."""
    parts = (image, mask, output, engine, params, "" if seed is None else str(seed))
    return blake2b("\x00".join(parts).encode(), digest_size=16).digest()


def derive_seed(key: bytes) -> int:
    """The seed of a row that names none: 32 bits of its content key, so reruns agree."""
    return int.from_bytes(key[:4], "big")
