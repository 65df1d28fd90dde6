"""Local files. Writes are atomic: a temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from shared.errors import ObjectDenied, OutputConflict, StorageUnavailable
from shared.storage.objects import Object, Stat, check_size


@lru_cache(maxsize=4096)
def _folder_realpath(folder: str) -> str:
    return os.path.realpath(folder)


def cached_realpath(path: str) -> str:
    """``os.path.realpath``, cached by folder: a manifest's many files lie in few folders."""
    if os.path.islink(path):  # noqa: PTH114 - hot
        return os.path.realpath(path)
    folder, _, leaf = path.rpartition("/")
    return f"{_folder_realpath(folder or '/').rstrip('/')}/{leaf}"


def is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def open_regular(path: str) -> IO[bytes]:
    # Opening a pipe or a device would block the worker forever.
    if Path(path).exists() and not Path(path).is_file():
        raise ObjectDenied(f"{path!r} is not a regular file")
    return Path(path).open("rb")


def stat(path: str) -> Stat:
    status = Path(path).stat()
    return Stat(version=f"{status.st_size}-{status.st_mtime_ns}", size=status.st_size)


def get(path: str, max_bytes: int) -> Object:
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        check_size(path, status.st_size, max_bytes)
        data, after = file.read(max_bytes + 1), os.fstat(file.fileno())
    # Another program may be writing the file in place: half of it old, half new.
    if (len(data), after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise StorageUnavailable(f"{path!r} changed while it was read; a retry reads it again")
    return Object(data=data, version=f"{status.st_size}-{status.st_mtime_ns}")


def put(path: str, data: bytes, if_version: str | None, token: str) -> str:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target, token)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # Check and rename are two steps: two attempts of one job can both pass the check. Their
        # results are identical, and only the one that holds the lease can finish the job.
        current = stat(path).version if target.exists() else None
        if current != if_version:
            raise OutputConflict(f"{path!r} was written by another process meanwhile")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return stat(path).version


def temporary_path(target: Path, token: str) -> Path:
    """A hidden file in the target's folder, its name at most 255 bytes long."""
    shortened = os.fsencode(target.name)[:200].decode(errors="ignore")
    return target.with_name(f".{shortened}.{token}.tmp")


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(path: str, tokens: Sequence[str]) -> None:
    """Deletes the temporary files of a job's killed attempts."""
    target = Path(path)
    for token in tokens:
        with suppress(OSError):
            temporary_path(target, token).unlink()
