"""Opens the folder of a local file beneath an allowed root, whatever is replaced meanwhile.

A path that was resolved and checked may name another file by the time it is opened: a folder on it
was replaced by a symlink. Each component is therefore opened relative to the one before, and none
that is a symlink is followed (as ``openat2`` does with ``RESOLVE_NO_SYMLINKS``, on every system).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.errors import LocationError, StorageUnavailable

# A link that an operator moves is resolved anew; one that moves all the time is an attack.
TRIES = 3
# O_PATH (Linux) needs no permission to list the folder.
_FOLDER_FLAGS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class _Replaced(Exception):
    """A folder of the resolved path is a symlink now."""


def is_under(path: str, roots: Sequence[str]) -> bool:
    return any(_contains(root, path) for root in roots)


def _contains(root: str, path: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def outside_roots(path: str, roots: Sequence[str]) -> LocationError:
    return LocationError(
        f"{path!r} is outside the allowed folders ({', '.join(roots) or 'none'}); "
        "add its folder with inpaint-submit --root, or INPAINT_ROOTS on a worker"
    )


@contextmanager
def containing_folder(
    path: str, roots: Sequence[str], *, follow: bool = True, create: bool = False
) -> Iterator[tuple[int, str]]:
    """A descriptor of the file's folder, and the file's name in it.

    follow: a symlink as the file itself is resolved, like those among its folders. create: make
    the folders that are missing. Raises LocationError for a path that leads out of the roots,
    StorageUnavailable if its folders are replaced all the time, and OSError.
    """
    folder, name = _open(path, roots, follow=follow, create=create)
    try:
        yield folder, name
    finally:
        os.close(folder)


def _open(path: str, roots: Sequence[str], *, follow: bool, create: bool) -> tuple[int, str]:
    for _ in range(TRIES):
        root, steps = _resolve(path, roots, follow=follow)
        with suppress(_Replaced):
            return _walk(root, steps[:-1], create=create), steps[-1]
    raise replaced(path)


def replaced(path: str) -> StorageUnavailable:
    return StorageUnavailable(f"{path!r} was replaced by a link while it was opened")


def _resolve(path: str, roots: Sequence[str], *, follow: bool) -> tuple[str, list[str]]:
    """The root that contains the path, and the steps from there; no step is a symlink now."""
    real = os.path.realpath(path)
    if is_under(real, roots) and not follow:
        folder, _, name = path.rpartition("/")
        real = f"{os.path.realpath(folder or '/').rstrip('/')}/{name}"
    for root in roots:
        if _contains(root, real):
            # A root may be a single file: its folder is then the operator's choice.
            start = os.path.dirname(root) if real == root else root  # noqa: PTH120 - hot
            return start, real[len(start.rstrip("/")) + 1 :].split("/")
    raise outside_roots(path, roots)


def _walk(root: str, steps: Sequence[str], *, create: bool) -> int:
    if create:
        Path(root).mkdir(parents=True, exist_ok=True)
    # The root and what is above it are the operator's: links there are wanted.
    folder = os.open(root, _FOLDER_FLAGS)
    try:
        for step in steps:
            parent, folder = folder, _step(folder, step, create=create)
            os.close(parent)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _step(parent: int, name: str, *, create: bool) -> int:
    if create:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
    try:
        return os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and not _is_file(parent, name):
            raise _Replaced from None
        raise


def _is_file(parent: int, name: str) -> bool:
    """False for a symlink, and for a folder that replaced it again."""
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISLNK(mode) or stat.S_ISDIR(mode))
