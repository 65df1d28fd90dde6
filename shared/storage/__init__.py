"""Object storage: ``s3://bucket/key`` and absolute local paths behind one interface.

Folders and buckets are allow-lists. Writes are atomic: readers see an object whole or not at all.
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
    """Reads and writes objects under the allowed roots and buckets. Thread-safe.

    roots: folders, symlinks resolved. buckets: empty allows every bucket that the credentials
    can reach. Every method raises LocationError for a location that is not allowed,
    ObjectMissing, ObjectDenied or StorageUnavailable.
    """

    def __init__(self, *, roots: Sequence[Path], buckets: Sequence[str]) -> None:
        self._roots = tuple(str(root) for root in roots)
        self._buckets = frozenset(buckets)
        self._s3 = S3()

    def check(self, uri: str) -> str:
        """Returns the location with symlinks resolved; raises LocationError if it is not allowed.

        Fast enough for every row of a manifest: each folder is resolved once and cached.
        """
        # The cache can be stale (a folder replaced by a symlink): get and put resolve again.
        self._check_allowed(uri, files.cached_realpath)
        return uri if is_s3(uri) else files.cached_realpath(uri)

    def _check_allowed(self, uri: str, real: Callable[[str], str]) -> None:
        if is_s3(uri):
            bucket = split_s3(uri)[0]
            # With an empty list only the credentials' permissions decide.
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
        """Version and size; None if the object does not exist."""
        self._check_allowed(uri, os.path.realpath)
        try:
            with mapped_errors(uri):
                return self._s3.stat(uri) if is_s3(uri) else files.stat(uri)
        except ObjectMissing:
            return None

    def get(self, uri: str, *, max_bytes: int) -> Object:
        """Reads an object. Raises ObjectTooLarge above ``max_bytes`` before it reads the body."""
        self._check_allowed(uri, os.path.realpath)
        with mapped_errors(uri):
            if is_s3(uri):
                return self._s3.get(uri, max_bytes)
            return files.get(uri, max_bytes)

    def head(self, uri: str, *, max_bytes: int) -> bytes:
        """The first ``max_bytes`` of an object; all of a smaller one."""
        self._check_allowed(uri, os.path.realpath)
        with mapped_errors(uri):
            if not is_s3(uri):
                with files.open_regular(uri) as file:
                    return file.read(max_bytes)
            return self._s3.head(uri, max_bytes)

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """A stream over the whole object that can be read once."""
        self._check_allowed(uri, os.path.realpath)
        source = self._s3.open if is_s3(uri) else files.open_regular
        with mapped_errors(uri), source(uri) as stream:
            yield stream

    def put(self, uri: str, data: bytes, *, if_version: str | None, token: str) -> str:
        """Writes the object if its current version is ``if_version`` (None: if it does not exist).

        token: unique to this attempt; part of the temporary file's name. Returns the new version.
        Raises OutputConflict if the current version is another one, OutputRefused if the disk is
        full or the location is not writable.
        """
        self._check_allowed(uri, os.path.realpath)
        with mapped_write_errors(), mapped_errors(uri):
            if is_s3(uri):
                return self._s3.put(uri, data, if_version)
            return files.put(uri, data, if_version, token)

    def check_bucket(self, bucket: str) -> None:
        """Lists one key; raises if the bucket does not exist, does not answer or denies access."""
        with mapped_errors(f"s3://{bucket}"):
            self._s3.check_bucket(bucket)

    def remove_temporary_files(self, uri: str, tokens: Sequence[str]) -> None:
        """Deletes the temporary files of a job's killed attempts, named by their tokens."""
        # An S3 PUT that was cut off leaves nothing behind.
        if not is_s3(uri):
            files.remove_temporary_files(uri, tokens)
