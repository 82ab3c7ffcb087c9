"""A real HTTP server that plays the other side of the network from a script: it refuses, and breaks off half-way."""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = Callable[["Exchange"], None]


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = field(repr=False)


class Exchange(BaseHTTPRequestHandler):
    """One request and what the script says to it."""

    protocol_version = "HTTP/1.1"
    server: Peer
    seen: Seen

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0)) or self._chunks()
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Seen(self.command, url.path, parse_qs(url.query), headers, body)
        self.server.requests.append(self.seen)
        answers = self.server.script[(self.command, url.path)]
        # The last answer of a script is repeated.
        answer = (answers.popleft() if len(answers) > 1 else answers[0]) if answers else problem(404, "not_found")
        answer(self)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _chunks(self) -> bytes:
        found = b""
        while self.headers.get("transfer-encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Peer(ThreadingHTTPServer):
    """Answers each (method, path) by its script and remembers every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.requests: list[Seen] = []
        self.script: dict[tuple[str, str], deque[Answer]] = defaultdict(deque)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def on(self, method: str, path: str, *answers: Answer) -> None:
        self.script[(method, path)].extend(answers)

    def asked(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.requests if (seen.method, seen.path) == (method, path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet: clients that hang up are what the tests are about."""

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def says(document: Any, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(document).encode()
    return lambda exchange: exchange.reply(status, body, content_type="application/json", **headers)


def raw(body: bytes, status: int = 200, **headers: str) -> Answer:
    return lambda exchange: exchange.reply(status, body, **headers)


def problem(status: int, code: str, detail: str = "it is wrong", **more: Any) -> Answer:
    headers = {"retry_after": more.pop("retry_after")} if "retry_after" in more else {}
    document = {"title": code, "status": status, "code": code, "detail": detail, "request_id": "req_1", **more}
    return says(document, status, **headers)


def hangs_up(exchange: Exchange) -> None:
    """Close the connection without an answer."""
    exchange.hang_up()


def file(content: bytes, breaks_after: int | None = None, ranges: bool = True) -> Answer:
    """Serve `content` as an object store does, from the range asked for; break off after some bytes."""

    def answer(exchange: Exchange) -> None:
        start = int(exchange.headers.get("range", "bytes=0-")[6:].rstrip("-")) if ranges else 0
        exchange.send_response(206 if start else 200)
        exchange.send_header("content-length", str(len(content) - start))
        if start:
            exchange.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        exchange.end_headers()
        exchange.wfile.write(content[start:] if breaks_after is None else content[start : start + breaks_after])
        if breaks_after is not None:
            exchange.hang_up()

    return answer


def stream(*messages: tuple[str, int | None, Any]) -> Answer:
    """Send server-sent events (kind, id, data) and close the connection."""
    text = "".join(
        f"event: {kind}\n{'' if number is None else f'id: {number}' + chr(10)}data: {json.dumps(data)}\n\n"
        for kind, number, data in messages
    )

    def answer(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("content-type", "text/event-stream")
        exchange.send_header("connection", "close")
        exchange.end_headers()
        exchange.wfile.write(b": ping\n\n" + text.encode())
        exchange.hang_up()

    return answer
