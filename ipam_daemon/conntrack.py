"""Connections of UDP and SCTP that conntrack remembers, forgotten by the port that they were sent to.

Who sends UDP to a port of the node keeps one entry alive as long as it sends: what was decided for its first packet
holds, although the port leads to another pod now, or to one at all. Who speaks SCTP often has a port of its own that is
configured, and begins anew from there. So entries of exactly that port are deleted when a mapping comes or goes, and
those of pods' VXLAN when a node becomes known. TCP needs none of this, since a new connection has another source port.

    dump, filtered in the kernel (5.8 and later) ─▶ those of an address of the node ─▶ delete

An entry whose packets were sent elsewhere than to this node is somebody else's: pods that ask a DNS server outside keep
theirs when the node's port 53 is mapped.

A dump is a walk over the kernel's whole table, of each family: 3.8 ms where that has 262,144 buckets and no entry, 7 to
13 ms with 50,000 entries. So several ports are one walk, filtered by protocol, and chosen from at 7 µs an entry; in
a table so large that this costs more, each port is a walk of its own, filtered by port.
"""

from __future__ import annotations

import ipaddress
import itertools
import socket
import struct
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence

import msgspec

from ipam_daemon.model import Address, Network
from ipam_daemon.netlink import read_sysctl
from podwire import conntrack
from podwire.nlattr import attribute, attributes, nested

_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_BY_NUMBER, _BY_PORT = 1 << 3, 1 << 5  # CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT
_WORTH_A_WALK = 1000  # entries
_SECONDS = 5.0


class Entry(msgspec.Struct, frozen=True):
    """A connection as far as it is looked at: who sent it where, who it leads to (the same, if nothing was
    translated), and the attributes that its deletion repeats."""

    family: int
    source: Address
    destination: Address
    port: int
    leads_to: tuple[Address, int]
    name: bytes


Choice = Callable[[Sequence[Entry]], Iterable[Entry]]
"""Which of the entries are to go."""


def forget(protocol: int, ports: Collection[int], choose: Choice) -> int:
    """Deletes those that `choose` names of the entries that were sent to one of `ports`, in this thread's namespace.
    Asks only when there is an entry at all. Returns how many were deleted. Raises OSError."""
    with conntrack.channel(_SECONDS) as channel:
        asked = itertools.product(conntrack.DESTINATION, _walks(frozenset(ports)))
        entries = [each for family, some in asked for each in _dump(channel, family, protocol, some)]
        doomed = list(choose(entries)) if entries else []
        for entry in doomed:
            conntrack.delete(channel, entry.family, entry.name)
    return len(doomed)


def forget_udp_of(sources: Collection[Network], port: int, destinations: Container[Address]) -> int:
    """Deletes the entries of UDP that addresses of `sources` sent to `port` of `destinations`; as `forget`."""

    def choose(entries: Sequence[Entry]) -> Iterable[Entry]:
        there = [entry for entry in entries if entry.destination in destinations]
        return [entry for entry in there if any(entry.source in each for each in sources)]

    return forget(socket.IPPROTO_UDP, [port], choose)


def _walks(ports: frozenset[int]) -> list[frozenset[int]]:
    """The ports, as they are asked for at once."""
    entries = int(read_sysctl("net/netfilter/nf_conntrack_count") or 0)
    if entries <= _WORTH_A_WALK * len(ports):
        return [ports]
    return [frozenset({port}) for port in ports]


def _dump(channel: socket.socket, family: int, protocol: int, ports: frozenset[int]) -> Iterator[Entry]:
    wanted, known = attribute(conntrack.PROTOCOL_NUMBER, bytes([protocol])), _BY_NUMBER
    if len(ports) == 1:
        wanted += attribute(conntrack.DESTINATION_PORT, min(ports).to_bytes(2, "big"))
        known |= _BY_PORT
    flags = attribute(_FILTER_ORIGINAL, struct.pack("=I", known))
    flags += attribute(_FILTER_REPLY, struct.pack("=I", 0))
    filters = nested(conntrack.ORIGINAL, nested(conntrack.PROTOCOL, wanted)) + nested(conntrack.FILTER, flags)
    for found in conntrack.dump(channel, family, filters):
        yield from _read(family, found, protocol, ports)


def _read(family: int, found: Mapping[int, bytes], protocol: int, ports: Container[int]) -> Iterator[Entry]:
    """The entry, if it is of this protocol and these ports: a kernel before 5.8 filters nothing."""
    original, reply = found.get(conntrack.ORIGINAL, b""), found.get(conntrack.REPLY, b"")
    fields = _fields(original, conntrack.PROTOCOL)
    port = int.from_bytes(fields.get(conntrack.DESTINATION_PORT, b""), "big")
    if fields.get(conntrack.PROTOCOL_NUMBER) != bytes([protocol]) or port not in ports or not reply:
        return
    sent, answered = _fields(original, conntrack.IP), _fields(reply, conntrack.IP)
    yield Entry(
        family=family,
        source=ipaddress.ip_address(sent[conntrack.SOURCE[family]]),
        destination=ipaddress.ip_address(sent[conntrack.DESTINATION[family]]),
        port=port,
        leads_to=(
            ipaddress.ip_address(answered[conntrack.SOURCE[family]]),
            int.from_bytes(_fields(reply, conntrack.PROTOCOL)[conntrack.SOURCE_PORT], "big"),
        ),
        name=conntrack.name_of(found),
    )


def _fields(of_tuple: bytes, kind: int) -> dict[int, bytes]:
    return dict(attributes(dict(attributes(of_tuple)).get(kind, b"")))
