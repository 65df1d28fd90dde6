"""S3: one client for all threads; conditional writes (If-Match, If-None-Match)."""

from __future__ import annotations

import io
import threading
from contextlib import closing
from http import HTTPStatus
from typing import IO, Any

from shared.errors import OutputConflict, SettingsError
from shared.image_formats import content_type
from shared.storage.error_mapping import http_status
from shared.storage.locations import split_s3
from shared.storage.objects import Object, Stat, check_size

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0


class S3:
    """Objects in S3. The client is created at the first request: importing boto3 takes a while."""

    def __init__(self) -> None:
        self._cached_client: Any = None
        self._lock = threading.Lock()

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._cached_client is None:
                self._cached_client = _new_client()
            return self._cached_client

    def open(self, uri: str) -> IO[bytes]:
        bucket, key = split_s3(uri)
        body = self._client.get_object(Bucket=bucket, Key=key)["Body"]
        return io.BufferedReader(_Readable(body), 1 << 20)

    def check_bucket(self, bucket: str) -> None:
        self._client.list_objects_v2(Bucket=bucket, MaxKeys=1)

    def stat(self, uri: str) -> Stat:
        bucket, key = split_s3(uri)
        response = self._client.head_object(Bucket=bucket, Key=key)
        return Stat(version=response["ETag"], size=response["ContentLength"])

    def head(self, uri: str, max_bytes: int) -> bytes:
        bucket, key = split_s3(uri)
        try:
            response = self._client.get_object(
                Bucket=bucket, Key=key, Range=f"bytes=0-{max_bytes - 1}"
            )
        except self._client.exceptions.ClientError as error:
            if http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""  # an empty object has no first byte to request
            raise
        with closing(response["Body"]) as body:
            return bytes(body.read())

    def get(self, uri: str, max_bytes: int) -> Object:
        bucket, key = split_s3(uri)
        response = self._client.get_object(Bucket=bucket, Key=key)
        # Not `with response["Body"]`: that enters urllib3's raw response, and the length of a
        # truncated body is not verified.
        with closing(response["Body"]) as body:
            check_size(uri, response["ContentLength"], max_bytes)
            return Object(data=body.read(), version=response["ETag"])

    def put(self, uri: str, data: bytes, if_version: str | None) -> str:
        bucket, key = split_s3(uri)
        condition = {"IfNoneMatch": "*"} if if_version is None else {"IfMatch": if_version}
        try:
            response = self._client.put_object(
                Bucket=bucket, Key=key, Body=data, ContentType=content_type(uri), **condition
            )
        except self._client.exceptions.NoSuchKey as error:
            # If-Match on a key that no longer exists.
            raise OutputConflict(f"{uri!r} was deleted by another process meanwhile") from error
        return str(response["ETag"])


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    # Botocore retries short outages; longer ones fail the attempt, and the job is retried.
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


class _Readable(io.RawIOBase):
    """Wraps botocore's body as a raw stream that io.BufferedReader accepts."""

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
