"""Which addresses on the net this installation may call for its users: public ones, and those of the operator's list.

Datasets and webhooks are named by strangers, who must not reach the operator's own network through them.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from common.settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# What inet_aton reads as an IPv4 address, and resolvers with it: 127.1, 2130706433, 0x7f.0.0.1.
_NUMERIC_HOST = re.compile(r"(0x[0-9a-f]+|[0-9]+)(\.(0x[0-9a-f]+|[0-9]+)){0,3}", re.IGNORECASE)
_NAT64, _COMPATIBLE = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")
# The anycast address of 6to4 relays (RFC 7526 withdrew it): whose machine answers there, nobody knows.
_RELAYS = ipaddress.ip_network("192.88.99.0/24")


def allowed(address: Address, settings: Settings) -> bool:
    """Return whether `address` may be called: it is public, or in a network that the operator lists."""
    embedded = _embedded_v4(address)
    if embedded is not None:
        return allowed(embedded, settings)
    if listed(address, settings):
        return True
    return address.is_global and not address.is_multicast and address not in _RELAYS


def listed(address: Address, settings: Settings) -> bool:
    """Return whether `address` is in a network that the operator lists."""
    networks = [ipaddress.ip_network(network) for network in settings.fetch_networks]
    return any(address in network for network in networks if network.version == address.version)


def spelled_allowed(host: str, settings: Settings) -> bool:
    """Return whether `host` may be called as far as its spelling tells: a name is resolved when it is called.

    Raises:
        ValueError: it looks like an address and is none.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return False
    address = spelled(host)
    return address is None or allowed(address, settings)


def spelled(host: str) -> Address | None:
    """Return the address that `host` spells, in any of the ways that a resolver would accept; None for a name.

    Raises:
        ValueError: it looks like an address and is none.
    """
    if _NUMERIC_HOST.fullmatch(host):
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError as error:
            raise ValueError(f"{host} is no address") from error
    return ipaddress.IPv6Address(host.partition("%")[0]) if ":" in host else None


def _embedded_v4(address: Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for: mapped, compatible, 6to4, Teredo or NAT64."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
