"""Parse and resolve locations: ``s3://bucket/key`` and absolute local paths. No I/O."""

from __future__ import annotations

import os
import re

from shared.errors import LocationError

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
# A secret may contain "/", an S3 key may contain "@". A ":" before the first "/" means credentials.
_CREDENTIALS = re.compile(r"^([a-zA-Z0-9+.-]+://)([^/@:]*:[^@]*|[^/@]*)@")


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key. The key is not URL-decoded: ``+`` and ``%2F`` stay as they are."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def absolute(reference: str, *, base: str) -> str:
    """Resolves a reference against ``base``, a folder or an S3 prefix.

    Raises LocationError for other schemes, credentials in the URI, ``..``, an S3 URI without a
    key, and NUL.
    """
    scheme = _SCHEME.match(reference)
    if scheme and scheme[1] not in ("s3", "file"):
        raise LocationError(
            f"{redacted(reference)!r}: {scheme[1]}:// is not supported; use s3:// or a path"
        )
    if scheme and _CREDENTIALS.search(reference):
        raise LocationError(f"{redacted(reference)!r}: credentials do not belong in a URI")
    if "\x00" in reference:
        raise LocationError(f"{reference!r}: a name cannot contain NUL")
    if ".." in reference.split("/"):
        raise LocationError(f"{reference!r}: '..' is refused; name the folder itself")
    if scheme and scheme[1] == "s3":
        return _checked_s3(reference)
    path = reference.removeprefix("file://")
    if is_s3(base) and not scheme and not path.startswith("/"):
        steps = (step for step in path.split("/") if step != ".")
        return _checked_s3(f"{base.rstrip('/')}/{'/'.join(steps)}")
    return os.path.normpath(os.path.join("" if is_s3(base) else base, path))  # noqa: PTH118 - hot


def _checked_s3(uri: str) -> str:
    bucket, key = split_s3(uri)
    if not _BUCKET.match(bucket):
        raise LocationError(f"{uri!r}: {bucket!r} is not a bucket name")
    if not key:
        raise LocationError(f"{uri!r}: the key is missing; use s3://bucket/key")
    return uri


def redacted(uri: str) -> str:
    """The URI with its credentials replaced by ``***``."""
    return _CREDENTIALS.sub(r"\1***@", uri)


def parent(uri: str) -> str:
    """The folder or S3 prefix that contains ``uri``."""
    return uri.rpartition("/")[0] or "/"


def name(uri: str) -> str:
    return uri.rpartition("/")[2]
