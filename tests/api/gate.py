"""The way of clients to the object store: it counts the parts that pass, holds them back, and refuses some."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def do_PUT(self) -> None:
        number = int(parse_qs(urlsplit(self.path).query)["partNumber"][0])
        body = self.rfile.read(int(self.headers["content-length"]))
        gate = self.server
        with gate.lock:
            gate.seen[number] += 1
            refusal = gate.refusals.get(number, [None]).pop(0) if gate.refusals.get(number) else None
        if number >= gate.holds_from:
            gate.released.wait(120)
            self.close_connection = True
            return
        if refusal == "late":
            self._await_end_of_link()
        if refusal == "hang up":
            self.close_connection = True
            return
        if refusal is not None and refusal != "late":
            self._answer(int(refusal), b"<Error><Code>SlowDown</Code><Signature>very-secret</Signature></Error>")
            return
        # The Host is signed, and stays what the client saw.
        connection = http.client.HTTPConnection(gate.store, timeout=60)
        try:
            connection.request("PUT", self.path, body, dict(self.headers.items()))
            found = connection.getresponse()
            content = found.read()
        finally:
            connection.close()
        if found.status == 200:
            with gate.lock:
                gate.passed[number] += 1
        self._answer(found.status, content)

    def _await_end_of_link(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        signed_at = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        end = signed_at + timedelta(seconds=int(query["X-Amz-Expires"][0]) + 1)
        while datetime.now(UTC) < end:
            time.sleep(0.1)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Gate(ThreadingHTTPServer):
    """A server in front of the store at `endpoint`. `refusals` of a part, one each time: a status, `hang up`,
    or `late`, which hands it on when its link is over."""

    daemon_threads = True

    def __init__(self, endpoint: str):
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.store = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.seen: Counter[int] = Counter()
        self.passed: Counter[int] = Counter()
        self.refusals: dict[int, list[str]] = {}
        self.holds_from = 10_001
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def opens(self) -> None:
        """Let everything pass from now on, and forget what passed."""
        self.released.set()
        with self.lock:
            self.holds_from = 10_001
            self.seen.clear()
            self.passed.clear()

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet: clients that are killed are what the tests are about."""

    def __enter__(self) -> Gate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()
