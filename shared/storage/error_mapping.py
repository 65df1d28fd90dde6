"""Maps the errors of the operating system, botocore and urllib3 to those of shared.errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shared.errors import (
    InpaintError,
    LocationError,
    ObjectDenied,
    ObjectMissing,
    OutputConflict,
    OutputRefused,
    StorageUnavailable,
)


@contextmanager
def mapped_errors(uri: str) -> Iterator[None]:
    """Raises the InpaintError for an error inside the block; its message begins with the URI."""
    try:
        yield
    except InpaintError:
        raise
    except FileNotFoundError as error:
        raise ObjectMissing(f"{uri!r} does not exist") from error
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise ObjectDenied(f"{uri!r}: {error.strerror or error}") from error
    except OSError as error:
        # A read-only file system is a plain OSError, not a PermissionError.
        if error.errno == errno.EROFS:
            raise ObjectDenied(f"{uri!r}: {error.strerror}") from error
        is_permanent = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        error_class = LocationError if is_permanent else StorageUnavailable
        raise error_class(f"{uri!r}: {error.strerror or error}") from error
    except Exception as error:
        mapped = _map_botocore(uri, error)
        if mapped is None:
            raise
        raise mapped from error


_NOT_WRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def mapped_write_errors() -> Iterator[None]:
    """Raises OutputRefused for a full disk or a missing permission; goes around ``mapped_errors``.

    A person has to fix those, so the caller keeps the result and retries the write.
    """
    try:
        yield
    except (ObjectDenied, StorageUnavailable) as error:
        cause = error.__cause__
        is_refused = isinstance(cause, OSError) and cause.errno in _NOT_WRITABLE
        if is_refused or _is_refused_by_s3(cause):
            raise OutputRefused(str(error)) from cause
        raise


def _is_refused_by_s3(cause: BaseException | None) -> bool:
    # Self-hosted S3 servers (MinIO) answer 507 when their disks are full.
    response = getattr(cause, "response", None)
    return response is not None and http_status(cause) in (401, 403, 507)


def _map_botocore(uri: str, error: Exception) -> InpaintError | None:
    # Without boto3 no error can be botocore's: local files need neither package.
    try:
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError
    except ImportError:
        return None
    if isinstance(error, boto.ClientError):
        return _map_response(uri, error)
    if isinstance(
        error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound
    ):
        return ObjectDenied(
            f"{uri!r}: no S3 credentials; set them the AWS way (AWS_ACCESS_KEY_ID, ...)"
        )
    if isinstance(error, boto.BotoCoreError | HTTPError):
        return StorageUnavailable(f"{uri!r}: {error}")
    return None


def _map_response(uri: str, error: Any) -> InpaintError:
    status = http_status(error)
    code = error.response.get("Error", {}).get("Code", "")
    # A HEAD has no body, so botocore gives only the status as its code.
    if status == 404:
        return ObjectMissing(f"{uri!r} does not exist ({code})")
    if status in (401, 403):
        return ObjectDenied(f"{uri!r}: access denied ({code}); check the credentials' permissions")
    # 412: the condition is false. 409: another conditional write to the key is under way.
    if status in (409, 412):
        return OutputConflict(f"{uri!r} was written by another process meanwhile")
    return StorageUnavailable(f"{uri!r}: S3 answered {status} {code}")


def http_status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
