"""The database: connections, transactions, and its clock, on PostgreSQL and SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine, ExceptionContext
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import QueuePool
from sqlalchemy.sql.functions import FunctionElement

from shared.db import sqlstates
from shared.db.models import UtcDateTime
from shared.errors import DatabaseUnavailable

BUSY_TIMEOUT_SECONDS = 30


class clock(FunctionElement[datetime]):
    """SQL: the database's current time plus a number of seconds, as in ``clock(60)``.

    Leases and waits are compared with one clock only, so hosts' clocks may differ.
    """

    type = UtcDateTime()
    inherit_cache = True
    name = "clock"

    def __init__(self, seconds: Any = 0.0) -> None:
        super().__init__(seconds)


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # Not now(): that is the start of the transaction, which may have waited for a lock.
    return f"(statement_timestamp() + {seconds} * interval '1 second')"


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # SQLite compares timestamps as text. SQLAlchemy writes six fractional digits, %f gives three.
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


class Database:
    """A pool of at most ``pool_size`` connections; ``read()`` and ``write()`` are transactions.

    Both raise DatabaseUnavailable if the server does not answer, drops the connection or is
    read-only; see ``shared/db/sqlstates.py``.
    """

    def __init__(self, url: URL, *, pool_size: int = 8) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        if self.is_sqlite and url.database:
            _make_folder(Path(url.database).parent)
        self.engine = _sqlite(url, pool_size) if self.is_sqlite else _postgresql(url, pool_size)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on SQLite it does not wait for writers."""
        with _translate_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end, or rolls back on an exception.

        On SQLite it takes the write lock at once. A transaction that reads first and asks for
        the lock later fails with SQLITE_BUSY if another has written in between.
        """
        with _translate_errors(), self.engine.connect() as connected:
            connection = connected.execution_options(write=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Closes the connections; the next transaction opens a new one."""
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnavailable(
            f"database: {folder}: {error.strerror}; see INPAINT_HOME"
        ) from error


@contextmanager
def _translate_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if _is_unavailable(error):
            raise DatabaseUnavailable(f"database: {_first_line(error)}") from error
        raise
    except PoolTimeout as error:
        raise DatabaseUnavailable("database: every connection of the pool is in use") from error


def _is_unavailable(error: DBAPIError) -> bool:
    """True if the server, the file or its permissions are the cause, not the statement."""
    # psycopg's classes do not decide: read-only is an InternalError, a missing permission a
    # ProgrammingError, as are wrong statements.
    if sqlstate := _sqlstate(error.orig):
        return sqlstates.is_unavailable(sqlstate)
    is_operational = isinstance(error, OperationalError | InterfaceError)
    # sqlite3 raises its base class, DatabaseError, for a file that is not a database.
    is_damaged = type(error) is DatabaseError
    return is_operational or is_damaged or error.connection_invalidated


def _sqlstate(error: BaseException | None) -> str | None:
    """None for SQLite, and for errors that libpq raises itself: it has lost the server."""
    return getattr(error, "sqlstate", None)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__


def _postgresql(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,  # replaces connections that a restart of the server has closed
        connect_args={
            "connect_timeout": 10,
            "application_name": "inpaint",
            # Give up on an unreachable server well before a lease of 60 s expires.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s",
        },
    )

    @event.listens_for(engine, "handle_error")
    def _leave_read_only_server(context: ExceptionContext) -> None:
        # After a failover the demoted server keeps its connections, and the ping succeeds there.
        # A disconnect empties the pool: only new connections reach the new primary.
        if _sqlstate(context.original_exception) == sqlstates.READ_ONLY:
            context.is_disconnect = True

    return engine


def _sqlite(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # Turns off the driver's own BEGIN, which is deferred: it takes no write lock.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
