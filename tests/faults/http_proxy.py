"""An HTTP proxy in front of an S3 server that fails, delays or cuts requests on demand."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.servers import free_port


@dataclass(frozen=True, kw_only=True)
class Request:
    """number: of the request since the fault was set, from 0."""

    method: str
    path: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What happens to one request.

    status: the proxy answers itself with this status and S3 error code. part: the share of the
    response body that arrives, 0 to 1, before the connection is closed or reset.
    seconds_per_kib: delay of a slow link. silent_seconds: no response for this time, then the
    connection is closed.
    """

    status: int | None = None
    code: str = ""
    part: float = 1.0
    reset: bool = False
    seconds_per_kib: float = 0.0
    silent_seconds: float = 0.0


Fault = Callable[[Request], Answer | None]


class FaultProxy:
    """Forwards every request for which the fault returns None. ``url`` is the proxy's address."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.fault_count = 0
        self._fault: Fault | None = None
        self._number = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def set(self, fault: Fault | None) -> None:
        with self._lock:
            self._fault, self._number, self.fault_count = fault, 0, 0

    def answer(self, method: str, path: str) -> Answer | None:
        with self._lock:
            if self._fault is None:
                return None
            answer = self._fault(Request(method=method, path=path, number=self._number))
            self._number += 1
            self.fault_count += answer is not None
        return answer

    @contextmanager
    def serving(self) -> Iterator[FaultProxy]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with suppress(ConnectionError):  # a client that was killed
                    super().handle()

            def log_message(self, *_: Any) -> None: ...

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = proxy.answer(self.command, self.path) or Answer()
                if answer.silent_seconds:
                    time.sleep(answer.silent_seconds)
                    self.close_connection = True
                elif answer.status:
                    self._refuse(answer)
                else:
                    self._forward(body, answer)

            def _refuse(self, answer: Answer) -> None:
                code = answer.code or "ServiceUnavailable"
                text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                text = b"" if self.command == "HEAD" else text
                self.send_response(answer.status or 503)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Content-Type", "application/xml")
                self.end_headers()
                self.wfile.write(text)

            def _forward(self, body: bytes, answer: Answer) -> None:
                upstream = HTTPConnection(proxy.target, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                data = response.read()
                upstream.close()
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = response.getheader("Content-Length") or str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                self._send(data[: int(len(data) * answer.part)], answer)
                if answer.part < 1 or answer.reset:
                    self._cut(reset=answer.reset)

            def _send(self, data: bytes, answer: Answer) -> None:
                for start in range(0, len(data), 1024):
                    self.wfile.write(data[start : start + 1024])
                    time.sleep(answer.seconds_per_kib)

            def _cut(self, *, reset: bool) -> None:
                self.wfile.flush()
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

        return Handler
