"""SSRF protection: which network addresses an image may be fetched from.

An inventory is untrusted input: `http://169.254.169.254/` in it would make a worker ask its cloud for
credentials (server-side request forgery). Only globally routable unicast addresses pass, also when they are
embedded in IPv6.
"""

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

CLOUD_ENDPOINTS = frozenset({"168.63.129.16"})
"""Public addresses that serve a cloud's secrets to its machines (Azure's WireServer)."""

NAT64 = (ip_network("64:ff9b::/96"),)
"""The IPv6 prefix whose last 32 bits are an IPv4 address of the public internet (RFC 6052)."""

SPECIAL = (ip_network("192.0.0.0/24"), ip_network("fec0::/10"), ip_network("64:ff9b:1::/48"))
"""Ranges that Python 3.11 calls global: protocol assignments (with one cloud's metadata), IPv6 site-local,
and a network's own NAT64, whose IPv4 address may be anywhere in it (RFC 8215)."""

BLOCKED_ERRNO = 700_001
"""Tells a blocked address from other connection errors; no operating system uses it."""


class BlockedAddress(OSError):
    """The address may not be connected to."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(BLOCKED_ERRNO, f"{address} is {reason}")


def block_reason(address: str) -> str | None:
    """Why an address is blocked, or None if it is not.

    Args:
        address: numeric IPv4 or IPv6, with or without a zone.
    """
    ip = ip_address(address.partition("%")[0])
    checked: Sequence[IPv4Address | IPv6Address] = embedded_ipv4(ip) or [ip]
    for inner in checked:
        if str(inner) in CLOUD_ENDPOINTS:
            return "a cloud's metadata endpoint"
        if not inner.is_global or inner.is_multicast or inner.is_reserved or _in(inner, SPECIAL):
            return _range(inner)
    return None


def embedded_ipv4(ip: IPv4Address | IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses embedded in an IPv6 address: mapped, 6to4, Teredo, NAT64."""
    if isinstance(ip, IPv4Address):
        return []
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if _in(ip, NAT64):
        found.append(IPv4Address(int(ip) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]


def _in(ip: IPv4Address | IPv6Address, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    return any(ip in network for network in networks)


def _range(ip: IPv4Address | IPv6Address) -> str:
    names = ("unspecified", "loopback", "link_local", "multicast", "private", "reserved")
    found = next((name for name in names if getattr(ip, f"is_{name}")), "not_globally_routable")
    return f"{found.replace('_', '-')} (pass --fetch.allow-private-addresses to fetch from such addresses)"


def ssrf_safe_socket(allowed_networks: Sequence[str]) -> Callable[[Any], socket.socket]:
    """A socket factory for aiohttp that checks the very address about to be connected to.

    So it covers names, redirects, decimal and hexadecimal notations and DNS rebinding. It raises
    BlockedAddress before a socket exists.
    """
    networks = [ip_network(network) for network in allowed_networks]

    def open_socket(address_info: Any) -> socket.socket:
        family, kind, protocol, _, socket_address = address_info
        address = socket_address[0]
        allowed = _in(ip_address(address.partition("%")[0]), networks)
        reason = None if allowed else block_reason(address)
        if reason:
            raise BlockedAddress(address, reason)
        return socket.socket(family=family, type=kind, proto=protocol)

    return open_socket
