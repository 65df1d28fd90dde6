"""A proxy on PostgreSQL's Unix socket that closes the connection at a chosen round trip."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

NAME = ".s.PGSQL.5432"


class PostgresProxy:
    """``cut_at(n, when)`` closes the connection once, at the n-th round trip from now.

    "before": the request does not reach the server. "after": the server executes the request, but
    its answer is lost; for a COMMIT that is the hard case: the client cannot know the outcome.
    """

    def __init__(self, server: Path, folder: Path) -> None:
        self._server = str(server / NAME)
        self.folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / NAME))
        self._listener.listen(50)
        self._lock = threading.Lock()
        self._left: int | None = None
        self._when: Literal["before", "after"] = "before"
        self.cuts = 0

    def redirect(self, server: Path) -> None:
        """Sends new connections to another server; those that are open stay where they are."""
        self._server = str(server / NAME)

    def cut_at(self, number: int, when: Literal["before", "after"]) -> None:
        with self._lock:
            self._left, self._when, self.cuts = number, when, 0

    @contextmanager
    def serving(self) -> Iterator[PostgresProxy]:
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                _Link(self, client, server).start()

    def count(self) -> Literal["before", "after"] | None:
        """Counts one round trip; returns how to cut it, None to forward it."""
        with self._lock:
            if self._left is None:
                return None
            self._left -= 1
            if self._left > 0:
                return None
            self._left = None
            self.cuts += 1
            return self._when


class _Link:
    """One connection: a thread for each direction."""

    def __init__(self, proxy: PostgresProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._answer_is_lost = False
        self._ending, self._ended = threading.Lock(), 0

    def start(self) -> None:
        for action in (self._forward_requests, self._forward_answers):
            threading.Thread(target=self._run, args=(action,), daemon=True).start()

    def _run(self, action: object) -> None:
        with suppress(OSError, EOFError):
            action()  # type: ignore[operator]
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._ending:
            self._ended += 1
            if self._ended == 2:
                self._client.close()
                self._server.close()

    def _forward_requests(self) -> None:
        self._server.sendall(self._receive_message(kind_bytes=0))  # startup: no type byte
        while True:
            message = self._receive_message(kind_bytes=1)
            # Q is a simple query, S ends a group of messages (Sync): each is one round trip.
            cut = self._proxy.count() if message[:1] in (b"Q", b"S") else None
            if cut == "before":
                return
            self._answer_is_lost = self._answer_is_lost or cut == "after"
            self._server.sendall(message)

    def _receive_message(self, *, kind_bytes: int) -> bytes:
        head = self._receive_exactly(kind_bytes + 4)
        size = int.from_bytes(head[kind_bytes:], "big")
        return head + self._receive_exactly(size - 4)

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._client.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def _forward_answers(self) -> None:
        while data := self._server.recv(65536):
            if self._answer_is_lost:
                return
            self._client.sendall(data)
