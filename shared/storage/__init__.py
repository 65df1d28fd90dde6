"""Objects by URI: ``s3://bucket/key`` and absolute local paths.

Local folders and buckets are allow-lists. A written object appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shared.errors import LocationError, ObjectMissing
from shared.storage import files
from shared.storage.error_mapping import mapped_errors, mapped_write_errors
from shared.storage.locations import is_s3, split_s3
from shared.storage.objects import Object, Stat
from shared.storage.s3 import S3

__all__ = ["Object", "Stat", "Storage"]


class Storage:
    """Reads and writes objects under the allowed roots and buckets; safe for many threads.

    roots: folders, already resolved. buckets: empty allows every bucket the credentials
    reach. Every method raises LocationError for a refused place, ObjectMissing,
    ObjectDenied, or StorageUnavailable.
    """

    def __init__(self, *, roots: Sequence[Path], buckets: Sequence[str]) -> None:
        self._roots = tuple(str(root) for root in roots)
        self._buckets = frozenset(buckets)
        self._s3 = S3()

    def check(self, uri: str) -> str:
        """The place itself, without symlinks; raises LocationError where it is not allowed.

        Quick, for the rows of a manifest: a folder's symlinks are looked at once. Reading
        and writing look again.
        """
        self._check_allowed(uri, files.cached_realpath)
        return uri if is_s3(uri) else files.cached_realpath(uri)

    def _check_allowed(self, uri: str, real: Callable[[str], str]) -> None:
        if is_s3(uri):
            bucket = split_s3(uri)[0]
            if self._buckets and bucket not in self._buckets:
                raise LocationError(
                    f"{uri!r}: bucket {bucket!r} is not allowed; add it to INPAINT_BUCKETS"
                )
        elif not files.is_under(real(uri), self._roots):
            raise LocationError(
                f"{uri!r} is outside the allowed folders ({', '.join(self._roots) or 'none'}); "
                "add its folder with inpaint-submit --root, or INPAINT_ROOTS on a worker"
            )

    def stat(self, uri: str) -> Stat | None:
        """None where nothing is there."""
        self._check_allowed(uri, os.path.realpath)
        try:
            with mapped_errors(uri):
                return self._s3.stat(uri) if is_s3(uri) else files.stat(uri)
        except ObjectMissing:
            return None

    def get(self, uri: str, *, max_bytes: int) -> Object:
        """Raises ObjectTooLarge over ``max_bytes``, before the body is read."""
        self._check_allowed(uri, os.path.realpath)
        with mapped_errors(uri):
            if is_s3(uri):
                return self._s3.get(uri, max_bytes)
            return files.get(uri, max_bytes)

    def head(self, uri: str, *, max_bytes: int) -> bytes:
        """The first ``max_bytes`` of an object, or all of a smaller one."""
        self._check_allowed(uri, os.path.realpath)
        with mapped_errors(uri):
            if not is_s3(uri):
                with files.open_regular(uri) as file:
                    return file.read(max_bytes)
            return self._s3.head(uri, max_bytes)

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """A stream over the whole object, for reading once."""
        self._check_allowed(uri, os.path.realpath)
        source = self._s3.open if is_s3(uri) else files.open_regular
        with mapped_errors(uri), source(uri) as stream:
            yield stream

    def put(self, uri: str, data: bytes, *, if_version: str | None, token: str) -> str:
        """Writes the object only over the version named (None: only where nothing is).

        token: unique to this attempt; names the temporary file. Returns the new version.
        Raises OutputConflict where another version is there, and OutputRefused where the disk
        is full or the place may not be written to.
        """
        self._check_allowed(uri, os.path.realpath)
        with mapped_write_errors(), mapped_errors(uri):
            if is_s3(uri):
                return self._s3.put(uri, data, if_version)
            return files.put(uri, data, if_version, token)

    def check_bucket(self, bucket: str) -> None:
        """Asks for one key of a bucket, to see that it answers."""
        with mapped_errors(f"s3://{bucket}"):
            self._s3.check_bucket(bucket)

    def remove_temporary_files(self, uri: str, tokens: Sequence[str]) -> None:
        """Deletes what earlier attempts of a job left when they were killed; S3 keeps nothing."""
        if not is_s3(uri):
            files.remove_temporary_files(uri, tokens)
