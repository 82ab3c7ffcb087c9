"""The proxy breaks connections as it says: otherwise the fault runs would prove nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.embedded.ports import free_ports
from tests.faults.proxy import Proxy
from tests.processes import wait_until


class Echo:
    """A server that sends back what it gets."""

    def __init__(self, path: Path):
        self.got = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1000):
                self.got += data
                connection.sendall(data)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()


@pytest.fixture
def echo(server_dir: Path, request: pytest.FixtureRequest) -> Iterator[Echo]:
    made = Echo(server_dir / f"{request.node.name}.e")
    yield made
    made.close()


@pytest.fixture
def proxy(echo: Echo, server_dir: Path, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    made = Proxy(("127.0.0.1", free_ports(1)[0]), server_dir / f"{request.node.name}.e")
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as made:
        assert say(made, b"hello") == b"hello"
        yield made


def connect(proxy: Proxy) -> socket.socket:
    assert isinstance(proxy.listen, tuple)
    return socket.create_connection(proxy.listen, timeout=5)


def say(client: socket.socket, words: bytes) -> bytes:
    client.sendall(words)
    return client.recv(1000)


def test_a_reset_ends_open_connections_only(proxy: Proxy, client: socket.socket):
    proxy.reset()
    with pytest.raises(ConnectionError):
        say(client, b"x")
        say(client, b"x")
    with connect(proxy) as other:
        assert say(other, b"again") == b"again"


def test_refused(proxy: Proxy, client: socket.socket):
    proxy.refuse()
    with pytest.raises(ConnectionError):
        connect(proxy)
    with pytest.raises(ConnectionError):
        say(client, b"x")
        say(client, b"x")
    proxy.heal()
    with connect(proxy) as other:
        assert say(other, b"again") == b"again"


def test_half_open_swallows_and_heals_with_a_reset(proxy: Proxy, client: socket.socket, echo: Echo):
    proxy.half_open()
    with connect(proxy) as other:
        for one in (client, other):
            one.settimeout(0.3)
            with pytest.raises(TimeoutError):
                say(one, b"lost")
        proxy.heal()
        for one in (client, other):
            one.settimeout(5)
            with pytest.raises(ConnectionError):
                one.recv(1)
    assert b"lost" not in echo.got
    with connect(proxy) as third:
        assert say(third, b"back") == b"back"


def test_a_stall_delivers_late(proxy: Proxy, client: socket.socket, echo: Echo):
    proxy.stall()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        say(client, b"late")
    assert b"late" not in echo.got
    proxy.heal()
    client.settimeout(5)
    assert client.recv(1000) == b"late"


def test_a_delay(proxy: Proxy, client: socket.socket):
    proxy.delay(0.2)
    begun = time.monotonic()
    assert say(client, b"slow") == b"slow"
    assert time.monotonic() - begun >= 0.4
    proxy.heal()


def test_a_dead_server_is_a_reset(proxy: Proxy, echo: Echo):
    echo.close()
    Path(str(proxy.upstream)).unlink()
    with pytest.raises(ConnectionError), connect(proxy) as client:
        client.sendall(b"x")
        assert client.recv(1) != b"", "closed without a reset"


def test_connections_are_forgotten(proxy: Proxy, client: socket.socket):
    client.close()
    wait_until(lambda: proxy.num_links == 0, 5, "the proxy to notice")


def test_a_unix_socket_can_be_fronted(echo: Echo, server_dir: Path, request: pytest.FixtureRequest):
    front = Proxy(server_dir / "front.s", server_dir / f"{request.node.name}.e")
    front.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(front.listen))
        assert say(client, b"through") == b"through"
    front.close()
