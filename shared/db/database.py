"""The database: connections, transactions, and its clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.functions import FunctionElement

from shared.db.models import UtcDateTime
from shared.errors import DatabaseUnavailable

BUSY_TIMEOUT_SECONDS = 30
_INSUFFICIENT_PRIVILEGE = "42501"


class clock(FunctionElement[datetime]):
    """The database's time now plus a number of seconds: ``clock(60)``."""

    type = UtcDateTime()
    inherit_cache = True
    name = "clock"

    def __init__(self, seconds: Any = 0.0) -> None:
        super().__init__(seconds)


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + {seconds} * interval '1 second')"


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # Six digits, as SQLAlchemy writes its own timestamps, so that text comparison is right.
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


class Database:
    """One engine; ``read()`` and ``write()`` are its transactions.

    Both raise DatabaseUnavailable where the server does not answer or drops the connection.
    """

    def __init__(self, url: URL, *, pool_size: int = 8) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        if self.is_sqlite and url.database:
            _make_folder(Path(url.database).parent)
        self.engine = _sqlite(url, pool_size) if self.is_sqlite else _postgresql(url, pool_size)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with _translated(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """On SQLite the write lock is taken at the start, so two writers queue, not deadlock."""
        with _translated(), self.engine.connect() as connected:
            connection = connected.execution_options(write=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnavailable(
            f"database: {folder}: {error.strerror}; see INPAINT_HOME"
        ) from error


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if _is_no_fault_of_ours(error):
            raise DatabaseUnavailable(f"database: {_first_line(error)}") from error
        raise


def _is_no_fault_of_ours(error: DBAPIError) -> bool:
    """The server, the file or its permissions, and not a statement or a value."""
    # SQLite says plain DatabaseError of a file that is no database.
    is_trouble = isinstance(error, OperationalError | InterfaceError) or (
        type(error) is DatabaseError
    )
    is_denied = getattr(error.orig, "sqlstate", None) == _INSUFFICIENT_PRIVILEGE
    return is_trouble or is_denied or error.connection_invalidated


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__


def _postgresql(url: URL, pool_size: int) -> Engine:
    return create_engine(
        url,
        pool_size=pool_size,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 10,
            "application_name": "inpaint",
            # A server whose packets get lost is given up well before a lease ends.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s",
        },
    )


def _sqlite(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=pool_size,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # The driver's own BEGIN is deferred and cannot be told to take the write lock.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
