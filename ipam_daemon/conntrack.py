"""Connections of UDP that conntrack remembers, forgotten by the port that they were sent to.

Who sends UDP to a port of the node keeps one entry alive as long as it sends: what was decided for its first packet
holds, although the port leads to another pod now, or to one at all. So entries of exactly that port are deleted when a
mapping comes or goes. TCP needs none of this, since a new connection has another source port.

    dump, filtered in the kernel by protocol and port (5.8 and later) ─▶ those of an address of the node ─▶ delete

An entry whose packets were sent elsewhere than to this node is somebody else's: pods that ask a DNS server outside keep
theirs when the node's port 53 is mapped. With no entry it is one request, 0.05 ms and what the walk over the kernel's
table takes.

Source: linux/netfilter/nfnetlink_conntrack.h; ctnetlink_dump_table() in net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Container, Iterator

import msgspec

from ipam_daemon.model import Address
from ipam_daemon.nlattr import attribute, attributes, message, messages, nested

_NETLINK_NETFILTER = 12
_GET, _DELETE = 0x101, 0x102
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_TUPLE_ORIGINAL, _ID, _ZONE, _FILTER = 1, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_DESTINATION: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 4}  # CTA_IP_V4_DST, CTA_IP_V6_DST
_PROTOCOL_NUMBER, _DESTINATION_PORT = 1, 3
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_NUMBER_AND_PORT = 1 << 3 | 1 << 5  # CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT
_BUFFER, _TIMEOUT = 1 << 16, 5.0


class Entry(msgspec.Struct, frozen=True):
    """A connection as far as it is looked at: where it was sent, and the attributes that its deletion repeats."""

    family: int
    destination: Address
    name: bytes


def forget_udp(port: int, mine: Callable[[], Container[Address]]) -> int:
    """Deletes the entries of UDP that was sent to `port` of one of the addresses `mine`, in this thread's namespace.
    Asks for the addresses only when there is an entry at all. Returns how many were deleted. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as channel:
        channel.settimeout(_TIMEOUT)
        entries = [each for family in _DESTINATION for each in _dump(channel, family, port)]
        if not entries:
            return 0
        addresses = mine()
        doomed = [entry for entry in entries if entry.destination in addresses]
        for entry in doomed:
            _delete(channel, entry)
    return len(doomed)


def _dump(channel: socket.socket, family: int, port: int) -> list[Entry]:
    protocol = attribute(_PROTOCOL_NUMBER, bytes([socket.IPPROTO_UDP]))
    protocol += attribute(_DESTINATION_PORT, port.to_bytes(2, "big"))
    flags = attribute(_FILTER_ORIGINAL, struct.pack("=I", _BY_NUMBER_AND_PORT))
    flags += attribute(_FILTER_REPLY, struct.pack("=I", 0))
    body = (
        _GENERIC.pack(family, 0, 0)
        + nested(_TUPLE_ORIGINAL, nested(_TUPLE_PROTOCOL, protocol))
        + nested(_FILTER, flags)
    )
    channel.send(message(_GET, _REQUEST | _DUMP, family, body))
    found: list[Entry] = []
    while True:
        for kind, _, answer in messages(channel.recv(_BUFFER)):
            if kind == _DONE:
                return found
            if kind == _ERROR:
                _raise(answer, f"connections to UDP port {port}")
            found += _read(answer, port)


def _read(answer: bytes, port: int) -> Iterator[Entry]:
    """The entry, if it is of UDP and of this port: a kernel before 5.8 filters nothing."""
    family = answer[0]
    found = dict(attributes(answer[_GENERIC.size :]))
    original = dict(attributes(found.get(_TUPLE_ORIGINAL, b"")))
    protocol = dict(attributes(original.get(_TUPLE_PROTOCOL, b"")))
    address = dict(attributes(original.get(_TUPLE_IP, b""))).get(_DESTINATION.get(family, 0))
    if (
        address is not None
        and protocol.get(_PROTOCOL_NUMBER) == bytes([socket.IPPROTO_UDP])
        and protocol.get(_DESTINATION_PORT) == port.to_bytes(2, "big")
    ):
        name = nested(_TUPLE_ORIGINAL, found[_TUPLE_ORIGINAL])
        for kind in (_ID, _ZONE):
            name += attribute(kind, found[kind]) if kind in found else b""
        yield Entry(family, ipaddress.ip_address(address), name)


def _delete(channel: socket.socket, entry: Entry) -> None:
    body = _GENERIC.pack(entry.family, 0, 0) + entry.name
    channel.send(message(_DELETE, _REQUEST | _ACK, 0, body))
    for kind, _, answer in messages(channel.recv(_BUFFER)):
        if kind == _ERROR:
            _raise(answer, f"connection to {entry.destination}", but_not=errno.ENOENT)


def _raise(answer: bytes, what: str, but_not: int = 0) -> None:
    number = -struct.unpack_from("=i", answer)[0]
    if number not in (0, but_not):
        raise OSError(number, os.strerror(number), what)
