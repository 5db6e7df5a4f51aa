"""Connections of UDP that conntrack remembers, forgotten by the port that they were sent to.

Who sends UDP to a port of the node keeps one entry alive as long as it sends: what was decided for its first packet
holds, although the port leads to another pod now, or to one at all. So entries of exactly that port are deleted when a
mapping comes or goes, and those of pods' VXLAN when a node becomes known. TCP needs none of this, since a new
connection has another source port.

    dump, filtered in the kernel by protocol and port (5.8 and later) ─▶ those of an address of the node ─▶ delete

An entry whose packets were sent elsewhere than to this node is somebody else's: pods that ask a DNS server outside keep
theirs when the node's port 53 is mapped. With no entry it is one request, 0.05 ms and what the walk over the kernel's
table takes.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence

import msgspec

from ipam_daemon.model import Address, Network
from podwire import conntrack
from podwire.nlattr import attribute, attributes, nested

_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_NUMBER_AND_PORT = 1 << 3 | 1 << 5  # CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT
_SECONDS = 5.0


class Entry(msgspec.Struct, frozen=True):
    """A connection as far as it is looked at: who sent it where, and the attributes that its deletion repeats."""

    family: int
    source: Address
    destination: Address
    name: bytes


def forget_udp(port: int, mine: Callable[[], Container[Address]]) -> int:
    """Deletes the entries of UDP that was sent to `port` of one of the addresses `mine`, in this thread's namespace.
    Asks for the addresses only when there is an entry at all. Returns how many were deleted. Raises OSError."""

    def choose(entries: Sequence[Entry]) -> Iterable[Entry]:
        addresses = mine()
        return [entry for entry in entries if entry.destination in addresses]

    return _forget(port, choose)


def forget_udp_of(sources: Collection[Network], port: int, destinations: Container[Address]) -> int:
    """Deletes the entries of UDP that addresses of `sources` sent to `port` of `destinations`; as `forget_udp`."""

    def choose(entries: Sequence[Entry]) -> Iterable[Entry]:
        there = [entry for entry in entries if entry.destination in destinations]
        return [entry for entry in there if any(entry.source in each for each in sources)]

    return _forget(port, choose)


def _forget(port: int, choose: Callable[[Sequence[Entry]], Iterable[Entry]]) -> int:
    with conntrack.channel(_SECONDS) as channel:
        entries = [each for family in conntrack.DESTINATION for each in _dump(channel, family, port)]
        doomed = list(choose(entries)) if entries else []
        for entry in doomed:
            conntrack.delete(channel, entry.family, entry.name)
    return len(doomed)


def _dump(channel: socket.socket, family: int, port: int) -> Iterator[Entry]:
    protocol = attribute(conntrack.PROTOCOL_NUMBER, bytes([socket.IPPROTO_UDP]))
    protocol += attribute(conntrack.DESTINATION_PORT, port.to_bytes(2, "big"))
    flags = attribute(_FILTER_ORIGINAL, struct.pack("=I", _BY_NUMBER_AND_PORT))
    flags += attribute(_FILTER_REPLY, struct.pack("=I", 0))
    filters = nested(conntrack.ORIGINAL, nested(conntrack.PROTOCOL, protocol)) + nested(conntrack.FILTER, flags)
    for found in conntrack.dump(channel, family, filters):
        yield from _read(family, found, port)


def _read(family: int, found: Mapping[int, bytes], port: int) -> Iterator[Entry]:
    """The entry, if it is of UDP and of this port: a kernel before 5.8 filters nothing."""
    original = dict(attributes(found.get(conntrack.ORIGINAL, b"")))
    protocol = dict(attributes(original.get(conntrack.PROTOCOL, b"")))
    addresses = dict(attributes(original.get(conntrack.IP, b"")))
    source, destination = addresses.get(conntrack.SOURCE[family]), addresses.get(conntrack.DESTINATION[family])
    if (
        source is not None
        and destination is not None
        and protocol.get(conntrack.PROTOCOL_NUMBER) == bytes([socket.IPPROTO_UDP])
        and protocol.get(conntrack.DESTINATION_PORT) == port.to_bytes(2, "big")
    ):
        name = conntrack.name_of(found)
        yield Entry(family, ipaddress.ip_address(source), ipaddress.ip_address(destination), name)
