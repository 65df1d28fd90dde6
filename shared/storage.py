"""Objects by URI: ``s3://bucket/key`` and absolute local paths.

Local folders and buckets are allow-lists. A written object appears whole or not at all.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from shared.errors import (
    InpaintError,
    LocationError,
    ObjectDenied,
    ObjectMissing,
    ObjectTooLarge,
    OutputConflict,
    OutputRefused,
    SettingsError,
    StorageUnavailable,
)
from shared.locations import is_s3, split_s3

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Stat:
    """``version``: an ETag, or size and modification time of a local file."""

    version: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Object:
    data: bytes
    version: str


class Storage:
    """Reads and writes objects under the allowed roots and buckets; safe for many threads.

    roots: folders, already resolved. buckets: empty allows every bucket the credentials
    reach. Every method raises LocationError for a refused place, ObjectMissing,
    ObjectDenied, or StorageUnavailable.
    """

    def __init__(self, *, roots: Sequence[Path], buckets: Sequence[str]) -> None:
        self._roots = tuple(str(root) for root in roots)
        self._buckets = frozenset(buckets)
        self._client: Any = None
        self._client_lock = threading.Lock()

    def check(self, uri: str) -> str:
        """The place itself, without symlinks; raises LocationError where it is not allowed.

        Quick, for the rows of a manifest: a folder's symlinks are looked at once. Reading
        and writing look again.
        """
        self._allow(uri, _kept_real)
        return uri if is_s3(uri) else _kept_real(uri)

    def _allow(self, uri: str, real: Callable[[str], str]) -> None:
        if is_s3(uri):
            bucket = split_s3(uri)[0]
            if self._buckets and bucket not in self._buckets:
                raise LocationError(
                    f"{uri!r}: bucket {bucket!r} is not allowed; add it to INPAINT_BUCKETS"
                )
        elif not _is_under(real(uri), self._roots):
            raise LocationError(
                f"{uri!r} is outside the allowed folders ({', '.join(self._roots) or 'none'}); "
                "add its folder with inpaint-submit --root, or INPAINT_ROOTS on a worker"
            )

    def stat(self, uri: str) -> Stat | None:
        """None where nothing is there."""
        self._allow(uri, os.path.realpath)
        try:
            with _translated(uri):
                return self._stat_s3(uri) if is_s3(uri) else _stat_file(uri)
        except ObjectMissing:
            return None

    def get(self, uri: str, *, max_bytes: int) -> Object:
        """Raises ObjectTooLarge over ``max_bytes``, before the body is read."""
        self._allow(uri, os.path.realpath)
        with _translated(uri):
            if is_s3(uri):
                return self._get_s3(uri, max_bytes)
            return _get_file(uri, max_bytes)

    def head(self, uri: str, *, max_bytes: int) -> bytes:
        """The first ``max_bytes`` of an object, or all of a smaller one."""
        self._allow(uri, os.path.realpath)
        with _translated(uri):
            if not is_s3(uri):
                with _open_regular(uri) as file:
                    return file.read(max_bytes)
            return self._head_s3(uri, max_bytes)

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        """A stream over the whole object, for reading once."""
        self._allow(uri, os.path.realpath)
        with _translated(uri):
            if is_s3(uri):
                bucket, key = split_s3(uri)
                body = self._s3().get_object(Bucket=bucket, Key=key)["Body"]
                stream: IO[bytes] = io.BufferedReader(_Readable(body), 1 << 20)
            else:
                stream = _open_regular(uri)
            with stream:
                yield stream

    def put(self, uri: str, data: bytes, *, if_version: str | None, token: str) -> str:
        """Writes the object only over the version named (None: only where nothing is).

        token: unique to this attempt; names the temporary file. Returns the new version.
        Raises OutputConflict where another version is there, and OutputRefused where the disk
        is full or the place may not be written to.
        """
        self._allow(uri, os.path.realpath)
        with _refusals(), _translated(uri):
            if is_s3(uri):
                return self._put_s3(uri, data, if_version)
            return _put_file(uri, data, if_version, token)

    def list_one(self, bucket: str) -> None:
        """Asks for one key of a bucket, to see that it answers."""
        with _translated(f"s3://{bucket}"):
            self._s3().list_objects_v2(Bucket=bucket, MaxKeys=1)

    def _s3(self) -> Any:
        with self._client_lock:
            if self._client is None:
                self._client = _new_client()
            return self._client

    def _stat_s3(self, uri: str) -> Stat:
        bucket, key = split_s3(uri)
        answer = self._s3().head_object(Bucket=bucket, Key=key)
        return Stat(version=answer["ETag"], size=answer["ContentLength"])

    def _head_s3(self, uri: str, max_bytes: int) -> bytes:
        bucket, key = split_s3(uri)
        try:
            answer = self._s3().get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{max_bytes - 1}")
        except self._s3().exceptions.ClientError as error:
            if _status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""  # an empty object has no first byte
            raise
        with closing(answer["Body"]) as body:
            return bytes(body.read())

    def _get_s3(self, uri: str, max_bytes: int) -> Object:
        bucket, key = split_s3(uri)
        answer = self._s3().get_object(Bucket=bucket, Key=key)
        # Not "with answer[...]": that gives urllib3's own body, whose length nobody verifies.
        with closing(answer["Body"]) as body:
            _check_size(uri, answer["ContentLength"], max_bytes)
            return Object(data=body.read(), version=answer["ETag"])

    def _put_s3(self, uri: str, data: bytes, if_version: str | None) -> str:
        bucket, key = split_s3(uri)
        condition = {"IfNoneMatch": "*"} if if_version is None else {"IfMatch": if_version}
        try:
            answer = self._s3().put_object(
                Bucket=bucket, Key=key, Body=data, ContentType=_content_type(uri), **condition
            )
        except self._s3().exceptions.NoSuchKey as error:
            # What If-Match names is gone altogether.
            raise OutputConflict(f"{uri!r} was removed by somebody else meanwhile") from error
        return str(answer["ETag"])


# --- local files ---------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _kept_real(path: str) -> str:
    """The path without symlinks; the folder's answer is kept, as a manifest names few folders."""
    if os.path.islink(path):  # noqa: PTH114 - hot
        return os.path.realpath(path)
    folder, _, leaf = path.rpartition("/")
    return f"{_real_folder(folder or '/').rstrip('/')}/{leaf}"


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _open_regular(path: str) -> IO[bytes]:
    # A pipe or a device would block the worker for ever.
    if Path(path).exists() and not Path(path).is_file():
        raise ObjectDenied(f"{path!r} is not a regular file")
    return Path(path).open("rb")


def _stat_file(path: str) -> Stat:
    status = Path(path).stat()
    return Stat(version=f"{status.st_size}-{status.st_mtime_ns}", size=status.st_size)


def _get_file(path: str, max_bytes: int) -> Object:
    with _open_regular(path) as file:
        status = os.fstat(file.fileno())
        _check_size(path, status.st_size, max_bytes)
        data, after = file.read(max_bytes + 1), os.fstat(file.fileno())
    if (len(data), after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise StorageUnavailable(f"{path!r} changed while it was read; it is read again")
    return Object(data=data, version=f"{status.st_size}-{status.st_mtime_ns}")


def _put_file(path: str, data: bytes, if_version: str | None, token: str) -> str:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target, token)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        found = _stat_file(path).version if target.exists() else None
        if found != if_version:
            raise OutputConflict(f"{path!r} was written by somebody else meanwhile")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return _stat_file(path).version


def _temporary(target: Path, token: str) -> Path:
    """Beside the target; a name holds 255 bytes, and a character up to four."""
    kept = os.fsencode(target.name)[:200].decode(errors="ignore")
    return target.with_name(f".{kept}.{token}.tmp")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(uri: str, tokens: Sequence[str]) -> None:
    """Deletes temporary files that earlier attempts of a job left when they were killed."""
    if is_s3(uri):
        return
    target = Path(uri)
    for token in tokens:
        with suppress(OSError):
            _temporary(target, token).unlink()


def _check_size(uri: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ObjectTooLarge(
            f"{uri!r} is {size:,} bytes; the cap is {max_bytes:,} (INPAINT_MAX_OBJECT_BYTES)"
        )


# --- S3 ------------------------------------------------------------------------------------


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    # Botocore's own retries cover short hiccups; longer ones are the job's retry.
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        retries={"mode": "standard", "max_attempts": 4},
        user_agent_extra="inpaint-batch",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise SettingsError(f"S3: {error}; see AWS_ENDPOINT_URL") from error


_CONTENT_TYPES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "bmp": "image/bmp",
}


def _content_type(uri: str) -> str:
    return _CONTENT_TYPES.get(uri.rpartition(".")[2].lower(), "application/octet-stream")


class _Readable(io.RawIOBase):
    """Makes botocore's body readable by the io stack."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._body.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._body.close()
        super().close()


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Library errors become ours once, here."""
    try:
        yield
    except InpaintError:
        raise
    except FileNotFoundError as error:
        raise ObjectMissing(f"{uri!r} does not exist") from error
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectDenied(f"{uri!r}: {error.strerror or error}") from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise ObjectDenied(f"{uri!r}: {error.strerror}") from error
        hopeless = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        found = LocationError if hopeless else StorageUnavailable
        raise found(f"{uri!r}: {error.strerror or error}") from error
    except Exception as error:
        translated = _translate_botocore(uri, error)
        if translated is None:
            raise
        raise translated from error


_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def _refusals() -> Iterator[None]:
    """What a person has to mend before anything more can be written."""
    try:
        yield
    except (ObjectDenied, StorageUnavailable) as error:
        cause = error.__cause__
        refused = isinstance(cause, OSError) and cause.errno in _NO_ROOM
        if refused or _is_refusal_of_s3(cause):
            raise OutputRefused(str(error)) from cause
        raise


def _is_refusal_of_s3(cause: BaseException | None) -> bool:
    # An S3 on somebody's own disks says 507 where those are full.
    response = getattr(cause, "response", None)
    return response is not None and _status(cause) in (401, 403, 507)


def _translate_botocore(uri: str, error: Exception) -> InpaintError | None:
    try:
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError
    except ImportError:
        return None
    if isinstance(error, boto.ClientError):
        return _translate_response(uri, error)
    if isinstance(
        error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound
    ):
        return ObjectDenied(
            f"{uri!r}: no S3 credentials; set them the AWS way (AWS_ACCESS_KEY_ID, ...)"
        )
    if isinstance(error, boto.BotoCoreError | HTTPError):
        return StorageUnavailable(f"{uri!r}: {error}")
    return None


def _translate_response(uri: str, error: Any) -> InpaintError:
    status = _status(error)
    code = error.response.get("Error", {}).get("Code", "")
    if status == 404:
        return ObjectMissing(f"{uri!r} does not exist ({code})")
    if status in (401, 403):
        return ObjectDenied(f"{uri!r}: access denied ({code}); check the credentials' permissions")
    if status in (409, 412):
        return OutputConflict(f"{uri!r} was written by somebody else meanwhile")
    return StorageUnavailable(f"{uri!r}: S3 answered {status} {code}")


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
