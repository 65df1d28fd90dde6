"""Object storage: ``s3://bucket/key`` and absolute local paths behind one interface.

Folders and buckets are allow-lists. Writes are atomic: readers see an object whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from shared.errors import LocationError, ObjectMissing
from shared.storage import files
from shared.storage.beneath import is_under, outside_roots
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
        if is_s3(uri):
            self._check_bucket_allowed(uri)
            return uri
        # The cache can be stale (a folder replaced by a symlink): get and put resolve again.
        real = files.cached_realpath(uri)
        if not is_under(real, self._roots):
            raise outside_roots(uri, self._roots)
        return real

    def _check_bucket_allowed(self, uri: str) -> None:
        bucket = split_s3(uri)[0]
        # With an empty list only the credentials' permissions decide.
        if self._buckets and bucket not in self._buckets:
            raise LocationError(
                f"{uri!r}: bucket {bucket!r} is not allowed; add it to INPAINT_BUCKETS"
            )

    def stat(self, uri: str) -> Stat | None:
        """Version and size; None if the object does not exist."""
        try:
            with mapped_errors(uri):
                if not is_s3(uri):
                    return files.stat(uri, self._roots)
                self._check_bucket_allowed(uri)
                return self._s3.stat(uri)
        except ObjectMissing:
            return None

    def get(self, uri: str, *, max_bytes: int) -> Object:
        """Reads an object. Raises ObjectTooLarge above ``max_bytes`` before it reads the body."""
        with mapped_errors(uri):
            if not is_s3(uri):
                return files.get(uri, self._roots, max_bytes)
            self._check_bucket_allowed(uri)
            return self._s3.get(uri, max_bytes)

    def head(self, uri: str, *, max_bytes: int) -> bytes:
        """The first ``max_bytes`` of an object; all of a smaller one."""
        with mapped_errors(uri):
            if not is_s3(uri):
                with files.open_regular(uri, self._roots) as file:
                    return file.read(max_bytes)
            self._check_bucket_allowed(uri)
            return self._s3.head(uri, max_bytes)

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """A stream over the whole object that can be read once."""
        with mapped_errors(uri), self._open(uri) as stream:
            yield stream

    def _open(self, uri: str) -> AbstractContextManager[IO[bytes]]:
        if not is_s3(uri):
            return files.open_regular(uri, self._roots)
        self._check_bucket_allowed(uri)
        return self._s3.open(uri)

    def put(self, uri: str, data: bytes, *, if_version: str | None, token: str) -> str:
        """Writes the object if its current version is ``if_version`` (None: if it does not exist).

        token: unique to this attempt; part of the temporary file's name. Returns the new version.
        Raises OutputConflict if the current version is another one, OutputRefused if the disk is
        full or the location is not writable.
        """
        with mapped_write_errors(), mapped_errors(uri):
            if not is_s3(uri):
                return files.put(uri, self._roots, data, if_version, token)
            self._check_bucket_allowed(uri)
            return self._s3.put(uri, data, if_version)

    def check_bucket(self, bucket: str) -> None:
        """Lists one key; raises if the bucket does not exist, does not answer or denies access."""
        with mapped_errors(f"s3://{bucket}"):
            self._s3.check_bucket(bucket)

    def remove_temporary_files(self, uri: str, tokens: Sequence[str]) -> None:
        """Deletes the temporary files of a job's killed attempts, named by their tokens."""
        # An S3 PUT that was cut off leaves nothing behind.
        if not is_s3(uri):
            files.remove_temporary_files(uri, self._roots, tokens)
