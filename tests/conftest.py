"""Fixtures: a real and empty Redis, database or bucket for each test.

The servers start at the first test that needs them and run until the session ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
import redis
from hypothesis import settings
from sqlalchemy.engine import make_url

from shared.db import Database, schema
from tests import servers

# ``pytest --hypothesis-profile=soak``: tests that look for this profile run for minutes.
settings.register_profile("soak")


@contextmanager
def _short_folder() -> Iterator[Path]:
    """A folder directly under the temporary folder: Unix socket paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[servers.Redis]:
    with _short_folder() as folder, servers.redis_server(folder) as server:
        yield server


@pytest.fixture
def redis_url(shared_redis: servers.Redis) -> str:
    """URL of the session's Redis, emptied before the test."""
    with redis.Redis.from_url(shared_redis.url) as client:
        client.flushall()
    return shared_redis.url


@pytest.fixture
def own_redis() -> Iterator[servers.Redis]:
    """A Redis of its own, which the test may kill and restart."""
    with _short_folder() as folder, servers.redis_server(folder) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[str]:
    """URL of the cluster's ``postgres`` database, for ``servers.create_database``."""
    with _short_folder() as folder, servers.postgres_server(folder) as cluster:
        yield cluster.url


@pytest.fixture
def postgres_url(postgres_cluster: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database, dropped after the test."""
    url = servers.create_database(postgres_cluster)
    yield url
    servers.drop_database(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLAlchemy URL of an empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'inpaint.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our empty tables. Tests copy it: faster than running the migrations."""
    path = tmp_path_factory.mktemp("migrated") / "inpaint.db"
    _upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_url(postgres_cluster: str) -> Iterator[str]:
    """A PostgreSQL database with our tables, truncated for each test: faster than a new one."""
    url = servers.create_database(postgres_cluster)
    _upgrade(url)
    yield url
    servers.drop_database(url)


def _upgrade(url: str) -> None:
    database = Database(make_url(url))
    schema.upgrade(database)
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database with our empty tables; the test runs once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        migrated = request.getfixturevalue("migrated_file")
        database = Database(make_url(f"sqlite:///{shutil.copy(migrated, tmp_path)}"))
    else:
        database = Database(make_url(request.getfixturevalue("migrated_url")))
        with database.write() as connection:
            connection.exec_driver_sql("TRUNCATE submissions, jobs, attempts RESTART IDENTITY")
    yield database
    database.close()


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """An empty bucket and a boto3 client to inspect it."""

    name: str
    client: Any

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    with _short_folder() as folder, servers.s3_server(folder) as environment:
        yield environment


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket; the environment points every boto3 client of the test to its server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    bucket = Bucket(name=f"test-{uuid4().hex[:12]}", client=client)
    client.create_bucket(Bucket=bucket.name)
    yield bucket
    client.close()
