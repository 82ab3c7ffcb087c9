"""Questions to a `tunery serve`: one that runs somewhere, or one that is started here for as long as it is asked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InfraError, NotFound, TuneryError, Unauthenticated, UserError

if TYPE_CHECKING:
    import httpx2

# A large base may have to be downloaded first.
_READY_S = 4 * 3600.0
_STOP_S = 15.0
# Between two tokens; a whole batch of others may have to be answered first.
_SILENCE_S = 600.0
_KINDS: dict[int, type[TuneryError]] = {401: Unauthenticated, 404: NotFound}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model said, why it ended, and how many tokens that were."""

    text: str
    finish_reason: str
    usage: dict[str, int]


@dataclass(frozen=True)
class Asker:
    """A server that can be asked; `options` are fields of every request."""

    client: httpx2.Client
    options: Mapping[str, Any] = field(default_factory=dict)

    def base(self) -> str:
        """Return the name of the bare base."""
        return str(self._read(self.client.get("/v1/models"))["data"][0]["id"])

    def ask(self, model: str, messages: Messages, on_piece: Callable[[str], None] = lambda text: None) -> Answer:
        """Return the answer of `model`, and hand on each piece of it as it comes.

        Raises:
            UserError: the model or the messages are not such that it can answer.
            InfraError: the server is away, or was while it answered.
        """
        import httpx2

        body = {"model": model, "messages": messages, **self.options}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body, timeout=_SILENCE_S) as response:
                if response.status_code != 200:
                    response.read()
                    self._read(response)
                return _gathered(response.iter_lines(), on_piece)
        except httpx2.TransportError as error:
            raise InfraError(f"{self.client.base_url} does not answer ({type(error).__name__})") from error

    def ask_all(self, models: Sequence[str], messages: Sequence[Messages]) -> list[Answer]:
        """Return the answer of each model to its own messages; asked at once, they are written in one batch."""
        with ThreadPoolExecutor(len(models)) as pool:
            return list(pool.map(self.ask, models, messages))

    @staticmethod
    def _read(response: httpx2.Response) -> Any:
        document = response.json() if "json" in response.headers.get("content-type", "") else {}
        if response.status_code == 200 and "error" not in document:
            return document
        raise _error(response.status_code, document.get("error", {}))


def _error(status: int, error: Mapping[str, Any]) -> TuneryError:
    kind = _KINDS.get(status, UserError if 400 <= status < 500 else InfraError)
    message = error.get("message") or f"the server answered {status}"
    return kind(str(message), code=error.get("code"), param=error.get("param"))


def _gathered(lines: Iterator[str], on_piece: Callable[[str], None]) -> Answer:
    text, reason = "", ""
    usage: dict[str, int] = {}
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        document = json.loads(line.removeprefix("data: "))
        if "error" in document:
            raise _error(503, document["error"])
        usage = document.get("usage") or usage
        for choice in document["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            reason = choice["finish_reason"] or reason
            if piece:
                on_piece(piece)
    if not reason:
        raise InfraError("the answer broke off")
    return Answer(text, reason, usage)


@contextmanager
def remote(url: str, key: str | None) -> Iterator[httpx2.Client]:
    """Yield a client of the server at `url`."""
    import httpx2

    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(base_url=url.rstrip("/"), headers=headers) as client:
        yield client


@contextmanager
def local(
    base: str,
    adapters: Mapping[str, Path],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Iterator[httpx2.Client]:
    """Start a server of `base` and the adapters in folders, yield a client of it, and stop it.

    It listens on a socket in a folder that nobody else may enter.

    Raises:
        InfraError: it did not start; the end of its log is in the message.
    """
    import httpx2

    from common.cli.serve import SERVER
    from common.embedded.children import Child, Children

    with tempfile.TemporaryDirectory(prefix="tunery-") as folder:
        socket = Path(folder) / "s"
        named = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path.absolute()}")]
        argv = (*SERVER, "--base", base, "--uds", str(socket), *named, *arguments)
        children = Children(say)
        transport = httpx2.HTTPTransport(uds=str(socket))
        with httpx2.Client(transport=transport, base_url="http://local") as client:
            try:
                child = Child("the model", argv, environment, Path(folder) / "serve.log", grace_s=_STOP_S)
                children.start(child, lambda: _is_ready(socket, client), _READY_S)
                yield client
            finally:
                children.stop()


def _is_ready(socket: Path, client: httpx2.Client) -> bool:
    import httpx2

    try:
        # httpcore2 2.16 leaves a socket open that it could not connect.
        return socket.exists() and client.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False
