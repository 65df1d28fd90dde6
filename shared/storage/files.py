"""Local files. Writes are atomic: a temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from stat import S_ISLNK, S_ISREG
from typing import IO

from shared.errors import InpaintError, ObjectDenied, OutputConflict, StorageUnavailable
from shared.storage.beneath import containing_folder, replaced
from shared.storage.objects import Object, Stat, check_size

_TEMPORARY_SUFFIX = ".tmp"
_FSYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


@lru_cache(maxsize=4096)
def _folder_realpath(folder: str) -> str:
    return os.path.realpath(folder)


def cached_realpath(path: str) -> str:
    """``os.path.realpath``, cached by folder: a manifest's many files lie in few folders."""
    if os.path.islink(path):  # noqa: PTH114 - hot
        return os.path.realpath(path)
    folder, _, leaf = path.rpartition("/")
    return f"{_folder_realpath(folder or '/').rstrip('/')}/{leaf}"


def open_regular(path: str, roots: Sequence[str]) -> IO[bytes]:
    with containing_folder(path, roots) as (folder, name):
        # Opening a device may have an effect, so it is checked before as well.
        _check_regular(path, os.stat(name, dir_fd=folder, follow_symlinks=False))
        # O_NONBLOCK: opening a pipe that was put there since would block the worker forever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(name, flags, dir_fd=folder), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except InpaintError:
        file.close()
        raise
    return file


def _check_regular(path: str, status: os.stat_result) -> None:
    if S_ISLNK(status.st_mode):
        raise replaced(path)
    if not S_ISREG(status.st_mode):
        raise ObjectDenied(f"{path!r} is not a regular file")


def stat(path: str, roots: Sequence[str]) -> Stat:
    with containing_folder(path, roots) as (folder, name):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    return Stat(version=_version(status), size=status.st_size)


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def get(path: str, roots: Sequence[str], max_bytes: int) -> Object:
    with open_regular(path, roots) as file:
        status = os.fstat(file.fileno())
        check_size(path, status.st_size, max_bytes)
        data, after = file.read(max_bytes + 1), os.fstat(file.fileno())
    # Another program may be writing the file in place: half of it old, half new.
    if (len(data), after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise StorageUnavailable(f"{path!r} changed while it was read; a retry reads it again")
    return Object(data=data, version=_version(status))


def put(path: str, roots: Sequence[str], data: bytes, if_version: str | None, token: str) -> str:
    # A symlink as the output itself is not followed: it could name a file that is not this job's.
    with containing_folder(path, roots, follow=False, create=True) as (folder, name):
        temporary = temporary_name(name, token)
        try:
            _write_new(folder, temporary, data)
            # Check and rename are two steps: two attempts of one job can both pass the check. Their
            # results are identical, and only the one that holds the lease can finish the job.
            if _current_version(folder, name) != if_version:
                raise OutputConflict(f"{path!r} was written by another process meanwhile")
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        _sync_folder(folder)
        return _version(os.stat(name, dir_fd=folder, follow_symlinks=False))


def temporary_name(name: str, token: str) -> str:
    """A hidden file's name of at most 255 bytes that nobody can guess, and plant a file under."""
    return f"{_temporary_prefix(name, token)}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"


def _temporary_prefix(name: str, token: str) -> str:
    shortened = os.fsencode(name)[:200].decode(errors="ignore")
    return f".{shortened}.{token}."


def _write_new(folder: int, name: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o666, dir_fd=folder), "wb") as file:
        file.write(data)
        file.flush()
        _fsync(file.fileno())


def _current_version(folder: int, name: str) -> str | None:
    try:
        return _version(os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _sync_folder(folder: int) -> None:
    """Makes the rename itself durable, where the folder may be opened and synchronized."""
    # The result is in place: a folder that may be written and not read must not fail its job.
    with suppress(PermissionError), _readable(folder) as descriptor:
        _fsync(descriptor)


def _fsync(descriptor: int) -> None:
    """fsync, where the file system has it: some network file systems refuse it for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FSYNC_UNSUPPORTED:
            raise


@contextmanager
def _readable(folder: int) -> Iterator[int]:
    """The folder, opened to be listed or synced: its descriptor only names it."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_temporary_files(path: str, roots: Sequence[str], tokens: Sequence[str]) -> None:
    """Deletes the temporary files of a job's killed attempts.

    Their names begin with the file's name and the attempt's token, so the folder is searched for
    them; without an earlier attempt it is not read.
    """
    if not tokens:
        return
    with (
        suppress(OSError, InpaintError),
        containing_folder(path, roots, follow=False) as (folder, name),
        _readable(folder) as listed,
    ):
        prefixes = tuple(_temporary_prefix(name, token) for token in tokens)
        for entry in os.listdir(listed):  # noqa: PTH208 - by descriptor
            if entry.startswith(prefixes) and entry.endswith(_TEMPORARY_SUFFIX):
                with suppress(OSError):
                    os.unlink(entry, dir_fd=folder)
