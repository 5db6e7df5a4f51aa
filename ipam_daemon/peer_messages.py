"""Neighbours, FDB entries and routes in bulk: packed, sent by the hundred, and read back in dumps that are not decoded.

A node has three of these for every other node, and programs all of them when it starts. pyroute2 takes 0.3 ms for each
and builds 10 kB of objects for each that it reads; here 15,000 take as long as the kernel needs for them.

    set_… ─▶ Message ─┬─▶ one datagram of at most 128 ─▶ kernel, each in its order ─┬─▶ an error, by its number
    delete_… ─────────┘   (the last asks for an answer)                             └─▶ the last's answer: all are done

The kernel answers a message that failed whether or not it was asked to, so only the last of a datagram asks: its answer
says that all were seen, and who was not named before it succeeded. A datagram that failed in every message makes 128
answers, which a default receive buffer holds; should one be lost nevertheless, the socket says so (ENOBUFS).

Everything is bytes, as the kernel has it, which are small, hash fast and are not the garbage collector's business:

    neighbour   packed address          → 6 bytes of MAC
    FDB entry   6 bytes of MAC          → packed address on the underlay
    route       prefix length, network  → flags (1 byte), interface index (4), packed gateway

Source: netlink(7), rtnetlink(7), linux/neighbour.h, linux/rtnetlink.h; integers are in host order. Strict dumps
(NETLINK_GET_STRICT_CHK, Linux 4.20) let the kernel filter; what an older one does not filter is filtered here.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ipam_daemon.model import Address, Network
from ipam_daemon.rtnl import Message
from podwire.nlattr import attribute, message

ROUTE_PROTOCOL = 80
"""rtm_protocol of our routes (rtnetlink(7)); `ip route show proto 80` lists them. Not in iproute2's rt_protos."""

_ERROR, _DONE, _NEWROUTE, _DELROUTE, _GETROUTE, _NEWNEIGH, _DELNEIGH, _GETNEIGH = 2, 3, 24, 25, 26, 28, 29, 30
_REQUEST, _ACK, _DUMP, _REPLACE, _EXCL, _CREATE, _INTERRUPTED = 0x1, 0x4, 0x300, 0x100, 0x200, 0x400, 0x10
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_NEIGHBOUR = struct.Struct("=BxHiHBB")  # ndmsg: family, index, state, flags, type
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst, src, tos, table, protocol, scope, type, flags
_U32, _ERRNO = struct.Struct("=I"), struct.Struct("=i")
_WAY = struct.Struct("=BI")  # of a route's value: flags, interface index

_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 4, 5, 6
_PERMANENT, _SELF, _ONLINK = 0x80, 0x02, 0x04  # NUD_PERMANENT, NTF_SELF, RTNH_F_ONLINK
_TABLE_MAIN, _SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_NOWHERE, _UNICAST = 254, 0, 253, 255, 1
_METRIC = {socket.AF_INET: 0, socket.AF_INET6: 1024}  # of a route that was added without one
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}  # by the length of a packed address
_GET_STRICT_CHECK, _SOL_NETLINK = 12, 270

_BATCH = 128
_BUFFER = 1 << 16
_LOOKS = 3  # at a dump that changes while it is read


# --- values -----------------------------------------------------------------------------------------------------------


def pack_mac(mac: str) -> bytes:
    """A MAC in colon notation as six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def pack_network(network: Network) -> bytes:
    """The key of a route."""
    return bytes((network.prefixlen,)) + network.network_address.packed


def pack_way(gateway: Address, index: int, onlink: bool) -> bytes:
    """The value of a route."""
    return _WAY.pack(_ONLINK if onlink else 0, index) + gateway.packed


def unpack_network(key: bytes) -> Network:
    """The network that a route's key says."""
    return ipaddress.ip_network((key[1:], key[0]))


def unpack_way(way: bytes) -> tuple[Address | None, int, bool]:
    """Gateway (None: there is none, or several), interface index and whether it is on-link, of a route's value."""
    flags, index = _WAY.unpack_from(way)
    gateway = way[_WAY.size :]
    return ipaddress.ip_address(gateway) if gateway else None, index, bool(flags & _ONLINK)


# --- messages ---------------------------------------------------------------------------------------------------------


def set_neighbour(index: int, address: bytes, mac: bytes) -> Message:
    """Adds or changes a permanent neighbour of the interface `index`."""
    body = _NEIGHBOUR.pack(_FAMILY[len(address)], 0, index, _PERMANENT, 0, 0)
    body += attribute(_NDA_DST, address) + attribute(_NDA_LLADDR, mac)
    return Message(_NEWNEIGH, _CREATE | _REPLACE, body, "neighbour")


def delete_neighbour(index: int, address: bytes) -> Message:
    """Deletes a neighbour of the interface `index`."""
    body = _NEIGHBOUR.pack(_FAMILY[len(address)], 0, index, 0, 0, 0) + attribute(_NDA_DST, address)
    return Message(_DELNEIGH, 0, body, "neighbour")


def set_fdb(index: int, mac: bytes, underlay: bytes) -> Message:
    """Adds or changes a permanent FDB entry of the VXLAN device `index`."""
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, index, _PERMANENT, _SELF, 0)
    body += attribute(_NDA_DST, underlay) + attribute(_NDA_LLADDR, mac)
    return Message(_NEWNEIGH, _CREATE | _REPLACE, body, "FDB entry")


def delete_fdb(index: int, mac: bytes) -> Message:
    """Deletes an FDB entry of the VXLAN device `index`, with all its destinations."""
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, index, 0, _SELF, 0) + attribute(_NDA_LLADDR, mac)
    return Message(_DELNEIGH, 0, body, "FDB entry")


def set_route(network: bytes, way: bytes, there: bool = True) -> Message:
    """Adds a route of ours to the main table, or changes it if it is `there`. EEXIST for one that is not, where another
    leads to the same network with the same metric, which is somebody else's."""
    flags, index = _WAY.unpack_from(way)
    body = _ROUTE.pack(
        _FAMILY[len(network) - 1], network[0], 0, 0, _TABLE_MAIN, ROUTE_PROTOCOL, _SCOPE_UNIVERSE, _UNICAST, flags
    )
    body += attribute(_RTA_DST, network[1:]) + attribute(_RTA_GATEWAY, way[_WAY.size :])
    how = _CREATE | (_REPLACE if there else _EXCL)
    return Message(_NEWROUTE, how, body + attribute(_RTA_OIF, _U32.pack(index)), "route")


def reach_gateway(way: bytes) -> tuple[Message, Message]:
    """Makes the gateway of an IPv6 way on-link by a host route of its own, and undoes that.

    Linux refuses an on-link gateway that another route of the table leads to over another device, unless it is the
    default route (EINVAL, ip6_route_check_nh_onlink). Replacing a direct route to a block by one over a VTEP inside
    that very block is such a case.
    """
    _, index = _WAY.unpack_from(way)
    gateway = way[_WAY.size :]
    length = 8 * len(gateway)
    body = _ROUTE.pack(
        _FAMILY[len(gateway)], length, 0, 0, _TABLE_MAIN, ROUTE_PROTOCOL, _SCOPE_LINK, _UNICAST, 0
    ) + attribute(_RTA_DST, gateway)
    made = Message(_NEWROUTE, _CREATE | _EXCL, body + attribute(_RTA_OIF, _U32.pack(index)), "route")
    return made, delete_route(bytes((length,)) + gateway, way)


def delete_route(network: bytes, way: bytes) -> Message:
    """Deletes a route of ours that leaves by the interface of `way`."""
    _, index = _WAY.unpack_from(way)
    body = _ROUTE.pack(_FAMILY[len(network) - 1], network[0], 0, 0, _TABLE_MAIN, ROUTE_PROTOCOL, _SCOPE_NOWHERE, 0, 0)
    body += attribute(_RTA_DST, network[1:])
    return Message(_DELROUTE, 0, body + (attribute(_RTA_OIF, _U32.pack(index)) if index else b""), "route")


# --- the socket -------------------------------------------------------------------------------------------------------


class BulkChannel:
    """A NETLINK_ROUTE socket, which belongs to the namespace that it was opened in. Not for several threads."""

    def __init__(self, sock: socket.socket, timeout: float = 5.0) -> None:
        """Takes `sock` over. `timeout` in seconds: the kernel answers before it returns, so only a bug waits."""
        self._socket = sock
        self._socket.settimeout(timeout)
        self._sequence = 0
        with suppress(OSError):  # older than Linux 4.20: it sends more, and we filter
            sock.setsockopt(_SOL_NETLINK, _GET_STRICT_CHECK, 1)

    def carry_out(self, messages: Sequence[Message]) -> dict[int, int]:
        """Sends all, in their order. Returns the errno of those that failed, by their place; the others are done.

        Raises OSError when the socket fails: then nothing is known of any.
        """
        failed: dict[int, int] = {}
        for start in range(0, len(messages), _BATCH):
            failed |= {start + place: code for place, code in self._send(messages[start : start + _BATCH]).items()}
        return failed

    def _send(self, batch: Sequence[Message]) -> dict[int, int]:
        first = self._numbers(len(batch))
        last = first + len(batch) - 1
        self._socket.send(
            b"".join(
                message(each.kind, _REQUEST | each.flags | (_ACK if number == last else 0), number, each.body)
                for number, each in enumerate(batch, first)
            )
        )
        failed: dict[int, int] = {}
        answered = False
        while not answered:
            for kind, _, number, data, at, _ in _messages(self._socket.recv(_BUFFER)):
                if kind == _ERROR and first <= number <= last:  # others are of an exchange that was given up
                    code = -_ERRNO.unpack_from(data, at)[0]
                    if code:
                        failed[number - first] = code
                    answered |= number == last
        return failed

    def _numbers(self, count: int) -> int:
        """The first of so many sequence numbers that follow one another."""
        if self._sequence + count >= 1 << 32:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += count
        return first

    # --- dumps

    def neighbours(self, index: int) -> dict[bytes, bytes]:
        """Packed address → MAC: the permanent neighbours of the interface `index`."""
        found: dict[bytes, bytes] = {}
        for family in _METRIC:
            body = _NEIGHBOUR.pack(family, 0, 0, 0, 0, 0) + attribute(_NDA_IFINDEX, _U32.pack(index))
            for data, at, end in self._dump(_GETNEIGH, body):
                _, _, owner, state, _, _ = _NEIGHBOUR.unpack_from(data, at)
                if owner == index and state & _PERMANENT:
                    attributes = _attributes(data, at + _NEIGHBOUR.size, end)
                    address, mac = attributes.get(_NDA_DST), attributes.get(_NDA_LLADDR)
                    if address and mac:
                        found[address] = mac
        return found

    def fdb(self, index: int) -> dict[bytes, bytes]:
        """MAC → packed address on the underlay: the FDB of the VXLAN device `index`. The MAC of no host may have
        several, of which this is the last; it is nobody's of ours."""
        found: dict[bytes, bytes] = {}
        for data, at, end in self._dump(_GETNEIGH, _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, index, 0, 0, 0)):
            if _NEIGHBOUR.unpack_from(data, at)[2] == index:
                attributes = _attributes(data, at + _NEIGHBOUR.size, end)
                mac, underlay = attributes.get(_NDA_LLADDR), attributes.get(_NDA_DST)
                if mac and underlay:
                    found[mac] = underlay
        return found

    def routes(self) -> dict[bytes, bytes]:
        """Network → way: the routes in the main table with our protocol number, and no metric of somebody's choice."""
        found: dict[bytes, bytes] = {}
        for family, metric in _METRIC.items():
            unspecified = bytes(4 if family == socket.AF_INET else 16)
            body = _ROUTE.pack(family, 0, 0, 0, 0, ROUTE_PROTOCOL, 0, 0, 0)
            for data, at, end in self._dump(_GETROUTE, body):
                _, length, _, _, table, protocol, _, kind, flags = _ROUTE.unpack_from(data, at)
                if protocol != ROUTE_PROTOCOL or table != _TABLE_MAIN:
                    continue
                attributes = _attributes(data, at + _ROUTE.size, end)
                given = attributes.get(_RTA_PRIORITY)
                if (_U32.unpack(given)[0] if given else 0) != metric:
                    continue
                oif = attributes.get(_RTA_OIF)
                gateway = attributes.get(_RTA_GATEWAY, b"") if kind == _UNICAST else b""
                way = _WAY.pack(flags & _ONLINK, _U32.unpack(oif)[0] if oif else 0) + gateway
                found[bytes((length,)) + attributes.get(_RTA_DST, unspecified)] = way
        return found

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _dump(self, kind: int, body: bytes) -> list[tuple[bytes, int, int]]:
        """The messages of a dump: datagram, where the body begins, where it ends. Raises OSError."""
        for _ in range(_LOOKS):
            found, whole = self._dump_once(kind, body)
            if whole:
                break
        return found  # of what changed meanwhile the next look tells

    def _dump_once(self, kind: int, body: bytes) -> tuple[list[tuple[bytes, int, int]], bool]:
        number = self._numbers(1)
        self._socket.send(message(kind, _REQUEST | _DUMP, number, body))
        found: list[tuple[bytes, int, int]] = []
        whole = True
        while True:
            for answer, flags, of, data, at, end in _messages(self._socket.recv(_BUFFER)):
                if of != number:
                    continue
                whole &= not flags & _INTERRUPTED
                if answer == _DONE:
                    return found, whole
                if answer == _ERROR:
                    code = -_ERRNO.unpack_from(data, at)[0]
                    raise OSError(code, "dump")
                found.append((data, at, end))


def _messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes, int, int]]:
    """Type, flags, number, and the datagram with the beginning and end of the body in it."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, flags, number, _ = _HEADER.unpack_from(datagram, at)
        yield kind, flags, number, datagram, at + _HEADER.size, at + length
        at += max(length, _HEADER.size) + 3 & ~3


def _attributes(data: bytes, at: int, end: int) -> dict[int, bytes]:
    """Attribute type → payload; of one that comes twice the last."""
    found = {}
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += max(length, 4) + 3 & ~3
    return found
