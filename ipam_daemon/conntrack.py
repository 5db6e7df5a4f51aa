"""Connections of UDP that conntrack remembers, forgotten by the port that they were sent to.

Who sends UDP to a port of the node keeps one entry alive as long as it sends: what was decided for its first packet
holds, although the port leads to another pod now, or to one at all. So entries of exactly that port are deleted when a
mapping comes or goes. TCP needs none of this, since a new connection has another source port.

    dump, filtered in the kernel by protocol and port (5.8 and later) ─▶ those of an address of the node ─▶ delete

An entry whose packets were sent elsewhere than to this node is somebody else's: pods that ask a DNS server outside keep
theirs when the node's port 53 is mapped. With no entry it is one request, 0.05 ms and what the walk over the kernel's
table takes.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Container, Iterator, Mapping

import msgspec

from ipam_daemon.model import Address
from podwire import conntrack
from podwire.nlattr import attribute, attributes, nested

_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_NUMBER_AND_PORT = 1 << 3 | 1 << 5  # CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT
_SECONDS = 5.0


class Entry(msgspec.Struct, frozen=True):
    """A connection as far as it is looked at: where it was sent, and the attributes that its deletion repeats."""

    family: int
    destination: Address
    name: bytes


def forget_udp(port: int, mine: Callable[[], Container[Address]]) -> int:
    """Deletes the entries of UDP that was sent to `port` of one of the addresses `mine`, in this thread's namespace.
    Asks for the addresses only when there is an entry at all. Returns how many were deleted. Raises OSError."""
    with conntrack.channel(_SECONDS) as channel:
        entries = [each for family in conntrack.DESTINATION for each in _dump(channel, family, port)]
        if not entries:
            return 0
        addresses = mine()
        doomed = [entry for entry in entries if entry.destination in addresses]
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
    address = dict(attributes(original.get(conntrack.IP, b""))).get(conntrack.DESTINATION[family])
    if (
        address is not None
        and protocol.get(conntrack.PROTOCOL_NUMBER) == bytes([socket.IPPROTO_UDP])
        and protocol.get(conntrack.DESTINATION_PORT) == port.to_bytes(2, "big")
    ):
        yield Entry(family, ipaddress.ip_address(address), conntrack.name_of(found))
