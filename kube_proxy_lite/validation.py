"""What a Kubernetes object may say, and what is refused: names, ports, protocols, addresses, networks.

The API server validates all of this, but a folder of manifests is not the API server, old objects were let in by older
rules, and what is read here ends up in the rules of a node's firewall. So nothing is taken that could mean something
else there: a name is a DNS name, a number is in its range, an address is one that packets can be sent to. A refusal is
a `Refused` for the caller to turn into a `Problem`; it costs the object that one field and nothing else.

An address with leading zeros is read as decimal, as the API server and the kubelet do, and not as octal: what all
others of a cluster agree about is no place for another opinion. An IPv4 address written as an IPv6 one is
refused, and so is an address with a zone (`%eth0`): Python takes any text at all for the zone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Any, TypeVar

from kube_proxy_lite.model import Address, Network, Problem, Protocol, printable
from podwire.errors import PodwireError

T = TypeVar("T")

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""An RFC 1123 subdomain, as loose as names of Services, namespaces and ports ever were."""
LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
MAX_PROBLEMS = 20
"""How many problems of one object are told one by one."""

_FAMILIES: dict[int, Callable[[str], Address]] = {4: ipaddress.IPv4Address, 6: ipaddress.IPv6Address}


def _ranges(**networks: str) -> tuple[tuple[int, int, str], ...]:
    parsed = ((ipaddress.ip_network(cidr), why.replace("_", " ")) for why, cidr in networks.items())
    return tuple((int(network[0]), int(network[-1]), f"is {why}") for network, why in parsed)


UNUSABLE = {
    4: _ranges(
        unspecified="0.0.0.0/32",
        a_loopback_address="127.0.0.0/8",
        a_link_local_address="169.254.0.0/16",
        a_multicast_address="224.0.0.0/4",
        the_broadcast_address="255.255.255.255/32",
    ),
    6: _ranges(
        unspecified="::/128",
        a_loopback_address="::1/128",
        an_IPv4_address_in_disguise="::ffff:0:0/96",
        a_link_local_address="fe80::/10",
        a_multicast_address="ff00::/8",
    ),
}
"""Addresses that a connection cannot be sent to: first, last, why."""


class Refused(PodwireError):
    """A value cannot be what it stands for; the message says why, and follows the value."""


class Findings:
    """Collects the problems of one object."""

    def __init__(self, kind: str, key: tuple[str, str]) -> None:
        self._kind = kind
        self._key = key
        self._problems: list[Problem] = []
        self._untold = 0

    def add(self, field: str, value: object, why: str) -> None:
        """Note that `field` holds `value`, and why that cannot be."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(Problem(self._kind, self._key, field, printable(str(value)), why))
        else:
            self._untold += 1

    def read(self, field: str, value: Any, reader: Callable[[Any], T]) -> T | None:
        """`reader(value)`, or None and a problem."""
        try:
            return reader(value)
        except Refused as refused:
            self.add(field, value, str(refused))
            return None

    def problems(self) -> tuple[Problem, ...]:
        """All of them, in order."""
        if self._untold:
            rest = Problem(self._kind, self._key, "", "", f"and {self._untold} more problems of this object")
            return (*self._problems, rest)
        return tuple(self._problems)


def read_name(text: str) -> str:
    """A name of a Service or namespace."""
    if not NAME.fullmatch(text):
        raise Refused("is not a DNS name")
    return text


def read_port_name(text: str) -> str:
    """A name of a port; the empty one is that of a Service's only port."""
    return read_name(text) if text else text


def read_port(number: int) -> int:
    """A port that can be connected to."""
    if not 1 <= number <= 65535:
        raise Refused("is not in 1–65535")
    return number


def read_protocol(text: str) -> Protocol:
    """TCP, UDP or SCTP; TCP when it says nothing."""
    try:
        return Protocol(text or "TCP")
    except ValueError:
        raise Refused("is none of TCP, UDP and SCTP") from None


def read_address(text: str, version: int = 0) -> Address:
    """An address that packets can be sent to, of family `version` if that is not 0."""
    try:
        address = _FAMILIES[version](text) if version else ipaddress.ip_address(text)
    except ValueError:
        address = _read_again(text, version)
    number = int(address)
    for low, high, why in UNUSABLE[address.version]:
        if low <= number <= high:
            raise Refused(why)
    if address.version == 6 and getattr(address, "scope_id", None) is not None:
        raise Refused("has a zone")
    return address


def _read_again(text: str, version: int) -> Address:
    """With leading zeros as decimals, and with the reason for what is none the less no address."""
    try:
        address = ipaddress.ip_address(LEADING_ZEROS.sub("", text) if ":" not in text else text)
    except ValueError:
        raise Refused("is not an IP address") from None
    if version and address.version != version:
        raise Refused(f"is not an IPv{version} address")
    return address


def read_network(text: str) -> Network:
    """A network in CIDR notation; white space around it and host bits are let pass, as kube-proxy does."""
    host, _, length = text.strip().partition("/")
    if (
        length.isascii() and length.isdigit() and "%" not in host
    ):  # Python knows netmasks and zones, Kubernetes does not
        host = host if ":" in host else LEADING_ZEROS.sub("", host)
        try:
            return ipaddress.ip_network(f"{host}/{length}", strict=False)
        except ValueError:
            pass
    raise Refused("is not a network in CIDR notation")
