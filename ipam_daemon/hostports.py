"""Ports of the node that lead to pods (the capability `portMappings`), pure: what is asked for, who has which port, and
which elements of our nft table say so. The table's rules are in ipam_daemon/hostport_rules.py, and what applies both in
ipam_daemon/hostport_table.py.

    runtimeConfig ─▶ parse() ─▶ PortMapping ─▶ overlap(): refused, if another pod of the node has it
                                     └──────▶ elements() ─▶ the kernel ─▶ mappings_of(), when the journal was lost

A mapping is one element for each family that the pod has and the mapping is of, and a pod that has any is one more.

Source: the CNI conventions, capability `portMappings`.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Sequence

import msgspec

from ipam_daemon.errors import InvalidConfig, UnsupportedField
from ipam_daemon.model import Address, Attachment, Interface, PortMapping

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
MAPS = ("specific4", "specific6", "any4", "any6")
PAIRS = ("hairpin4", "hairpin6")
_WHERE = "runtimeConfig.portMappings"
Place = tuple[str, bytes]
"""A map and a key of it."""
LOCALHOST = ipaddress.ip_address("127.0.0.1")
LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One of `runtimeConfig.portMappings`, as a runtime writes it."""

    host_port: int | None = None
    container_port: int | None = None
    protocol: str | None = None
    host_ip: str | None = msgspec.field(name="hostIP", default=None)


class Element(msgspec.Struct, frozen=True, order=True):
    """An element of one of the table's sets, its fields packed as nft's registers are; `data` is empty in a set."""

    name: str
    key: bytes
    data: bytes = b""


class TableState(msgspec.Struct, frozen=True):
    """What the kernel has of our table: whether the rules are whole, and the elements."""

    whole: bool
    elements: frozenset[Element] = frozenset()


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the node that somebody has. `host_ip` as in PortMapping."""

    protocol: str
    port: int
    host_ip: Address | None


# --- what is asked for ----------------------------------------------------------------------------------------------


def parse(entries: Sequence[Entry]) -> tuple[PortMapping, ...]:
    """The mappings that are asked for, each once. A protocol that is not said is TCP, as Kubernetes has it.

    Raises InvalidConfig for what is ill-formed, UnsupportedField for what the kernel cannot do; both name field and
    value.
    """
    found: dict[tuple[str, int], list[PortMapping]] = {}
    for number, entry in enumerate(entries):
        where = f"{_WHERE}[{number}]"
        mapping = PortMapping(
            protocol=_protocol(where, entry.protocol),
            host_port=_port(f"{where}.hostPort", entry.host_port),
            container_port=_port(f"{where}.containerPort", entry.container_port),
            host_ip=_host_ip(where, entry.host_ip),
        )
        same_port = found.setdefault((mapping.protocol, mapping.host_port), [])
        for other in same_port:
            if _is_same_place(mapping.host_ip, other.host_ip) and mapping.container_port != other.container_port:
                raise InvalidConfig(
                    f"{where} maps {describe(mapping)} to {mapping.container_port}, and an entry before it "
                    f"{describe(other)} to {other.container_port}: expected one of them"
                )
        if mapping not in same_port:
            same_port.append(mapping)
    return tuple(itertools.chain.from_iterable(found.values()))


def _is_same_place(a: Address | None, b: Address | None) -> bool:
    """Whether one element would say both of one port. One address may lead elsewhere than all the others do."""
    return overlap(a, b) and (a == b or all(ip is None or ip.is_unspecified for ip in (a, b)))


def check_families(mappings: Iterable[PortMapping], addresses: Iterable[Interface]) -> None:
    """Raises UnsupportedField for a mapping of an address of a family that the pod has no address of."""
    versions = {each.version for each in addresses}
    for mapping in mappings:
        if mapping.host_ip is not None and mapping.host_ip.version not in versions:
            raise UnsupportedField(
                f"{_WHERE} has hostIP {str(mapping.host_ip)!r}, "
                f"and the pod gets no IPv{mapping.host_ip.version} address"
            )


def describe(mapping: PortMapping) -> str:
    """The node's side of a mapping, in words: 192.0.2.1:80/tcp, port 80/tcp."""
    port = f"{mapping.host_port}/{mapping.protocol}"
    if mapping.host_ip is None:
        return f"port {port}"
    return f"[{mapping.host_ip}]:{port}" if mapping.host_ip.version == 6 else f"{mapping.host_ip}:{port}"


def _port(where: str, port: int | None) -> int:
    if port is None or not 1 <= port <= 65535:
        said = "missing" if port is None else port
        raise InvalidConfig(f"{where} is {said}, expected 1 to 65535")
    return port


def _protocol(where: str, text: str | None) -> str:
    protocol = (text or "tcp").lower()
    if protocol not in PROTOCOLS:
        raise InvalidConfig(f"{where}.protocol is {text!r}, expected tcp, udp or sctp")
    return protocol


def _host_ip(where: str, text: str | None) -> Address | None:
    if not text:
        return None
    try:
        written = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidConfig(f"{where}.hostIP is {text!r}, expected an address such as 192.0.2.1") from error
    address = unmapped(written)
    if address.version == 6 and address.is_loopback:
        raise UnsupportedField(
            f"{where}.hostIP is {text!r}: the kernel takes nothing from ::1 to another link; 127.0.0.1 can be had"
        )
    if address.is_multicast or getattr(written, "scope_id", None):
        raise InvalidConfig(f"{where}.hostIP is {text!r}, expected an address of the node")
    return address


def unmapped(address: Address) -> Address:
    """192.0.2.1 for ::ffff:192.0.2.1, which is no address of a packet but how IPv6 writes one
    of IPv4 (RFC 4291, 2.5.5.2)."""
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


# --- who has which port ---------------------------------------------------------------------------------------------


def overlap(a: Address | None, b: Address | None) -> bool:
    """Whether two claims of one port and protocol are for the same packets: 0.0.0.0 is every IPv4 address, :: every
    IPv6 address, None is both."""
    if a is None or b is None:
        return True
    return a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)


def shadows(mapping: PortMapping, listening: Address) -> bool:
    """Whether the mapping would take connections from a socket of the node that listens on an address."""
    if mapping.host_ip is None or mapping.host_ip.is_unspecified:
        if (listening.is_loopback and listening != LOCALHOST) or listening in LINK_LOCAL:
            return False
        return mapping.host_ip is None or mapping.host_ip.version == listening.version
    return mapping.host_ip == listening or (listening.is_unspecified and listening.version == mapping.host_ip.version)


# --- elements -------------------------------------------------------------------------------------------------------


def elements(attachment: Attachment) -> frozenset[Element]:
    """What the table holds for an attachment; nothing for one without mappings."""
    found = set()
    for interface in attachment.addresses:
        for mapping in attachment.port_mappings:
            if mapping.host_ip is None or mapping.host_ip.version == interface.version:
                found.add(_element(mapping, interface.ip))
                found.add(Element(f"hairpin{interface.version}", 2 * interface.ip.packed))
    return frozenset(found)


def _element(mapping: PortMapping, pod: Address) -> Element:
    host_ip = mapping.host_ip or _unspecified(pod.version)
    specific, everywhere = places(PROTOCOLS[mapping.protocol], host_ip, mapping.host_port)
    return Element(*(everywhere if host_ip.is_unspecified else specific), leads_to(pod, mapping.container_port))


def places(protocol: int, destination: Address, port: int) -> tuple[Place, Place]:
    """Where the rules look for what is sent to a port of an address: among those of one address, then of all."""
    key = _padded(bytes([protocol])) + _padded(port.to_bytes(2, "big"))
    version = destination.version
    return (f"specific{version}", destination.packed + key), (f"any{version}", key)


def leads_to(pod: Address, port: int) -> bytes:
    """The data of an element that leads to a port of a pod."""
    return pod.packed + _padded(port.to_bytes(2, "big"))


def sent_to(element: Element) -> tuple[int, int]:
    """The number of the protocol and the node's port that an element of a map is about."""
    return element.key[-8], int.from_bytes(element.key[-4:-2], "big")


def target(element: Element) -> Address:
    """The pod's address that an element is about."""
    size = 4 if element.name.endswith("4") else 16
    return ipaddress.ip_address((element.data or element.key)[:size])


def mappings_of(found: Iterable[Element], addresses: Iterable[Interface]) -> tuple[PortMapping, ...]:
    """The mappings that elements in the kernel say a pod with these addresses has, for a journal that was lost."""
    pod = {interface.ip for interface in addresses}
    read: dict[tuple[str, int, int, Address | None], set[int]] = {}
    for element in sorted(found):
        if element.name not in MAPS:
            continue
        size = 4 if element.name.endswith("4") else 16
        to_address = target(element)
        if to_address not in pod:
            continue
        *host_ip, protocol, port = _fields(element.key, size if element.name.startswith("specific") else 0)
        name = next(name for name, number in PROTOCOLS.items() if number == protocol[0])
        specific = _address(host_ip[0]) if host_ip else None
        to = int.from_bytes(element.data[size : size + 2], "big")
        read.setdefault((name, int.from_bytes(port[:2], "big"), to, specific), set()).add(to_address.version)
    everywhere = {address.version for address in pod}
    return tuple(
        PortMapping(protocol=name, host_port=port, container_port=to, host_ip=host_ip)
        for (name, port, to, specific), versions in read.items()
        for host_ip in ([specific] if specific or versions == everywhere else [_unspecified(v) for v in versions])
    )


def _fields(key: bytes, address: int) -> list[bytes]:
    return [*([key[:address]] if address else []), key[address : address + 4], key[address + 4 :]]


def _address(packed: bytes) -> Address:
    return ipaddress.ip_address(packed)


def _unspecified(version: int) -> Address:
    return ipaddress.ip_address("0.0.0.0" if version == 4 else "::")


def _padded(field: bytes) -> bytes:
    return field + b"\0" * (-len(field) % 4)
