"""The servers that other tests stand on: they start, they die, they keep what they promise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
import sqlalchemy
from botocore.exceptions import ClientError

from tests import servers
from tests.conftest import Bucket


def test_redis_keeps_acknowledged_writes_through_a_kill(own_redis: servers.Redis) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("key", "value")
        own_redis.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("key")
        own_redis.start()
        assert client.get("key") == b"value"


def test_redis_comes_back_empty_when_asked(own_redis: servers.Redis) -> None:
    with redis.Redis(unix_socket_path=str(own_redis.socket)) as client:
        client.set("key", "value")
        own_redis.kill()
        own_redis.start(keep_data=False)
        assert client.get("key") is None


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_is_empty_for_each_test(redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "over")


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_has_an_empty_database(database_url: str, turn: int) -> None:
    engine = sqlalchemy.create_engine(database_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.execute(sqlalchemy.text("CREATE TABLE left_over (id INTEGER)"))


def test_a_database_can_be_a_copy_of_another(postgres_cluster: str, postgres_url: str) -> None:
    engine = sqlalchemy.create_engine(postgres_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE made (id INTEGER)"))
    template = engine.url.database
    assert template
    copy = servers.create_database(postgres_cluster, template=template)
    engine = sqlalchemy.create_engine(copy, poolclass=sqlalchemy.NullPool)
    assert sqlalchemy.inspect(engine).get_table_names() == ["made"]
    servers.drop_database(copy)


def test_s3_refuses_a_second_creation(s3: Bucket) -> None:
    s3.client.put_object(Bucket=s3.name, Key="k", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.client.put_object(Bucket=s3.name, Key="k", Body=b"second", IfNoneMatch="*")
    assert s3.client.get_object(Bucket=s3.name, Key="k")["Body"].read() == b"first"


def test_s3_refuses_to_replace_another_version(s3: Bucket) -> None:
    seen = s3.client.put_object(Bucket=s3.name, Key="k", Body=b"first")["ETag"]
    s3.client.put_object(Bucket=s3.name, Key="k", Body=b"second", IfMatch=seen)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.client.put_object(Bucket=s3.name, Key="k", Body=b"third", IfMatch=seen)
    assert s3.client.get_object(Bucket=s3.name, Key="k")["Body"].read() == b"second"


def test_s3_lets_one_of_many_racing_creations_win(s3: Bucket) -> None:
    body = bytes(1_000_000)

    def create(key: str) -> bool:
        try:
            s3.client.put_object(Bucket=s3.name, Key=key, Body=body, IfNoneMatch="*")
        except ClientError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        for key in ("first", "second", "third"):
            assert sum(threads.map(create, [key] * 8)) == 1


def test_a_program_that_cannot_start_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers.Redis, "_options", lambda self: ["--no-such-option", "1"])
    with pytest.raises(servers.ServerFailed, match="no-such-option"):
        servers.Redis(tmp_path).start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of the death")
def test_a_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests import servers\n"
        "with servers.redis_server(Path(sys.argv[1])) as server:\n"
        "    print(server.process.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    assert _gone(child, within_seconds=5)


def _gone(pid: int, *, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False
