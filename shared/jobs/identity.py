"""What makes two rows the same work, and the seed of a row that gives none."""

from __future__ import annotations

from hashlib import blake2b


def content_key(
    *, image: str, mask: str, output: str, engine: str, params: str, seed: int | None
) -> bytes:
    """16 bytes, equal for two rows that ask for the same work: BLAKE2b of the joined parts.

    seed: None if the row gives none.
    """
    parts = (image, mask, output, engine, params, "" if seed is None else str(seed))
    # The separator keeps ("ab", "c") and ("a", "bc") apart.
    return blake2b("\x00".join(parts).encode(), digest_size=16).digest()


def derive_seed(key: bytes) -> int:
    """The seed of a row that gives none, 0 to 2**32 - 1: the same work has the same seed."""
    return int.from_bytes(key[:4], "big")
