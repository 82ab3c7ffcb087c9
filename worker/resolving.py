"""A host's address, found once and checked: whoever connects to it is sure that it is the one that was checked.

A second look-up at connect time could answer another address than the one that was found harmless (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket

from common import addresses
from common.addresses import Address
from common.errors import InfraError, InvalidInput
from common.settings import Settings

_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


class NotPublic(InvalidInput):
    """One of the host's addresses is private, loopback, link-local, multicast or reserved."""

    code = "private_address"


class Unresolved(InfraError):
    """The name cannot be resolved now."""

    code = "host_unknown"


class NoSuchName(Unresolved):
    """Nor later, as far as one can tell: there is no such name."""


def public_address(host: str, port: int, settings: Settings) -> Address:
    """Resolve `host` and return an address of it that may be connected to; every address that it has must be one.

    Raises:
        NotPublic: one is not public, nor in a network that the operator lists.
        Unresolved: the name cannot be resolved now.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        unknown = not isinstance(error, socket.gaierror) or error.errno in _NO_SUCH_NAME
        raise (NoSuchName if unknown else Unresolved)(f"the host {host!r} cannot be resolved") from error
    known = [ipaddress.ip_address(str(item[4][0]).split("%")[0]) for item in found]
    for address in known:
        if not addresses.allowed(address, settings):
            raise NotPublic(f"the host {host!r} leads to {address}, which is not a public address")
    return known[0]
