"""Peers of the network for tests, on loopback: a model hub and an HTTPS server with a certificate of its own."""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme

REVISION = "a" * 40


@dataclass
class Answer:
    """What a peer answers for a path."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Callable[[str, dict[str, str]], Answer]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that breaks off is what some tests want."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        answer = self.server.answer(self.path, {name.lower(): value for name, value in self.headers.items()})
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body))}.items() | answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve(answer: Callable[[str, dict[str, str]], Answer], context: ssl.SSLContext | None = None) -> Iterator[_Server]:
    """Serve `answer` on a free loopback port while the block runs."""
    server = _Server(answer)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def certificate(folder: Path, *names: str) -> tuple[ssl.SSLContext, Path]:
    """Return a server's TLS context for `names` and the file of the authority that vouches for it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return context, folder / "ca.pem"


class Hub:
    """Answers as the Hugging Face hub does for the calls that Tunery makes: repositories of files at one revision."""

    def __init__(self, models: dict[str, dict[str, bytes]], datasets: dict[str, dict[str, bytes]], token: str | None):
        self._repositories = {"models": models, "datasets": datasets}
        self._token = token

    def __call__(self, path: str, headers: dict[str, str]) -> Answer:
        if self._token and headers.get("authorization") != f"Bearer {self._token}":
            return Answer(b"{}", 401, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            return self._listing(path.removeprefix("/api/"))
        return self._file(path)

    def _listing(self, path: str) -> Answer:
        kind, owner, name, *rest = path.partition("?")[0].split("/")
        files = self._repositories[kind].get(f"{owner}/{name}")
        if files is None:
            return Answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", REVISION):
            return Answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for file, body in files.items()
            ]
            return Answer(json.dumps(entries).encode(), headers={"Content-Type": "application/json"})
        siblings = [{"rfilename": file, "size": len(body)} for file, body in files.items()]
        info = {"id": f"{owner}/{name}", "_id": "1", "sha": REVISION, "siblings": siblings}
        return Answer(json.dumps(info).encode(), headers={"Content-Type": "application/json"})

    def _file(self, path: str) -> Answer:
        parts = path.partition("?")[0].lstrip("/").split("/")
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, _, _, *file = parts[1:] if kind == "datasets" else parts
        if f"{owner}/{name}" not in self._repositories[kind]:
            return Answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        body = self._repositories[kind][f"{owner}/{name}"].get("/".join(file))
        if body is None:
            return Answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        return Answer(body, headers={"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
