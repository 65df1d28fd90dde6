"""Local files: read whole, written beside their place and renamed, so that none is half there."""

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
    """The path without symlinks; the folder's answer is kept, as a manifest names few folders."""
    if os.path.islink(path):  # noqa: PTH114 - hot
        return os.path.realpath(path)
    folder, _, leaf = path.rpartition("/")
    return f"{_folder_realpath(folder or '/').rstrip('/')}/{leaf}"


def is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def open_regular(path: str) -> IO[bytes]:
    # A pipe or a device would block the worker for ever.
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
    if (len(data), after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise StorageUnavailable(f"{path!r} changed while it was read; it is read again")
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
        found = stat(path).version if target.exists() else None
        if found != if_version:
            raise OutputConflict(f"{path!r} was written by somebody else meanwhile")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return stat(path).version


def temporary_path(target: Path, token: str) -> Path:
    """Beside the target; a name holds 255 bytes, and a character up to four."""
    kept = os.fsencode(target.name)[:200].decode(errors="ignore")
    return target.with_name(f".{kept}.{token}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(path: str, tokens: Sequence[str]) -> None:
    """Deletes temporary files that earlier attempts of a job left when they were killed."""
    target = Path(path)
    for token in tokens:
        with suppress(OSError):
            temporary_path(target, token).unlink()
