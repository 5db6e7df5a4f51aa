"""The addresses that are this node's own, as the kernel's tables say. Read where it is needed, never remembered."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

from kube_proxy_lite.model import Address

_IPV4 = Path("/proc/net/fib_trie")
_IPV6 = Path("/proc/net/if_inet6")


def own_addresses() -> frozenset[Address]:
    """Every address of both families that is local here, loopback's and link-local ones among them."""
    return frozenset((*_ipv4(_IPV4.read_text()), *_ipv6(_IPV6.read_text() if _IPV6.exists() else "")))


def _ipv4(text: str) -> Iterator[Address]:
    """An address stands on a line of its own, what it is on the next: `|-- 10.0.0.7`, `/32 host LOCAL`."""
    address = ""
    for line in text.splitlines():
        _, leaf, found = line.partition("|-- ")
        if leaf:
            address = found
        elif line.endswith("/32 host LOCAL"):
            yield ipaddress.IPv4Address(address)


def _ipv6(text: str) -> Iterator[Address]:
    for line in text.splitlines():
        yield ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))
