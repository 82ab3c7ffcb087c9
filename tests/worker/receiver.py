"""A receiver of webhooks on loopback, which verifies what it gets with the specification's own package."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from standardwebhooks import Webhook


@dataclass(frozen=True)
class Message:
    """What arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> dict:
        """Return the payload; raises unless `secret` signed it."""
        return Webhook(secret).verify(self.body.decode(), self.headers)


@dataclass
class Receiver:
    """Answers each message with what `answer` returns: a status and headers."""

    port: int
    answer: Callable[[Message], tuple[int, dict[str, str]]] = lambda _: (204, {})
    messages: list[Message] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    receiver: Receiver

    def handle_error(self, request: object, client_address: object) -> None:
        """A sender that breaks off is what some tests want."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        message = Message(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.server.receiver.messages.append(message)
        status, headers = self.server.receiver.answer(message)
        self.send_response(status)
        for name, value in (headers | {"content-length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def receiving(tls: ssl.SSLContext | None = None, port: int = 0) -> Iterator[Receiver]:
    """Receive on a loopback port while the block runs."""
    server = _Server(("127.0.0.1", port), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.receiver = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
