"""Free TCP ports on loopback, for servers that cannot be told to choose one themselves."""

from __future__ import annotations

import errno
import random
import socket

# Below the range that kernels hand out to outgoing connections, so that no connection takes a port between our look
# and the server's start, or while the server is being restarted.
_FIRST, _LAST = 10_000, 32_000
_TRIES = 2_000


def free_ports(count: int) -> list[int]:
    """Return `count` different ports that nobody listens on at the moment.

    Raises:
        OSError: so few ports are free that a random search finds none.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), _TRIES):
        if len(found) == count:
            break
        if is_free("127.0.0.1", port):
            found.append(port)
    if len(found) < count:
        raise OSError(f"no {count} free TCP ports between {_FIRST} and {_LAST}")
    return found


def is_free(host: str, port: int) -> bool:
    """Return whether a server could listen on `host`:`port` now; port 0 always can.

    Raises:
        OSError: `host` is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True
