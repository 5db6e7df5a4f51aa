"""Conntrack over netlink: every connection of UDP, TCP and SCTP, and the deletion of some.

A dump is one request and some hundred thousand small messages, read with `struct` in a thread of its own, so that the
event loop goes on: 100,000 entries take about a second of it. Deletions go by the tuple and the id that the dump said,
so that an entry that has been replaced meanwhile is left alone.

Source: linux/netfilter/nfnetlink_conntrack.h, linux/netlink.h.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from kube_proxy_lite.stale import Connection
from podwire.errors import TryAgain

_NETLINK_NETFILTER = 12
_GET, _DELETE = 0x101, 0x102
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF
_ORIGINAL, _REPLY, _ID, _ZONE = 1, 2, 12, 18
_IP, _PROTOCOL = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_VERSIONS: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 6}
_SOURCE: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
_DESTINATION: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 4}
_PROTOCOLS: dict[int, str] = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP", socket.IPPROTO_SCTP: "SCTP"}
_BUFFER, _SECONDS = 1 << 18, 30.0
T = TypeVar("T")


class ConntrackFailed(TryAgain):
    """The kernel refused to tell, or to delete; the message has its words."""


class Conntrack:
    """The connections of this network namespace (sync.Connections)."""

    async def select(self, wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
        """Those that `wanted`, called in another thread, picks. Raises ConntrackFailed."""
        return await self._in_thread(lambda: _select(wanted))

    async def delete(self, connections: Sequence[Connection]) -> int:
        """Deletes those that are still there. Returns how many. Raises ConntrackFailed."""
        return await self._in_thread(lambda: _delete_all(connections)) if connections else 0

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            raise ConntrackFailed(f"conntrack: {error.strerror or error}") from error


def _channel() -> socket.socket:
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    channel.settimeout(_SECONDS)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return channel


def _select(wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
    with _channel() as channel:
        return wanted(each for family in _VERSIONS for each in _dump(channel, family))


def _delete_all(connections: Sequence[Connection]) -> int:
    with _channel() as channel:
        return sum(_delete(channel, each) for each in connections)


def _dump(channel: socket.socket, family: int) -> Iterator[Connection]:
    body = _GENERIC.pack(family, 0, 0)
    channel.send(_HEADER.pack(_HEADER.size + len(body), _GET, _REQUEST | _DUMP, family, 0) + body)
    while True:
        for kind, answer in _messages(channel.recv(_BUFFER)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                _raise(answer)
            found = _read(answer)
            if found is not None:
                yield found


def _read(answer: bytes) -> Connection | None:
    family = answer[0]
    attributes = dict(_nested(answer[_GENERIC.size :]))
    if family not in _VERSIONS or _ORIGINAL not in attributes or _REPLY not in attributes:
        return None
    original, reply = dict(_nested(attributes[_ORIGINAL])), dict(_nested(attributes[_REPLY]))
    there, back = dict(_nested(original[_PROTOCOL])), dict(_nested(reply[_PROTOCOL]))
    protocol = _PROTOCOLS.get(there[_NUMBER][0])
    if protocol is None:
        return None
    asked = dict(_nested(original[_IP]))
    handle = _attribute(_ORIGINAL | _NESTED, attributes[_ORIGINAL])
    for kind in (_ID, _ZONE):
        handle += _attribute(kind, attributes[kind]) if kind in attributes else b""
    return Connection(
        _VERSIONS[family],
        protocol,
        int.from_bytes(asked[_SOURCE[family]], "big"),
        int.from_bytes(asked[_DESTINATION[family]], "big"),
        int.from_bytes(there[_DESTINATION_PORT], "big"),
        int.from_bytes(dict(_nested(reply[_IP]))[_SOURCE[family]], "big"),
        int.from_bytes(back[_SOURCE_PORT], "big"),
        handle,
    )


def _delete(channel: socket.socket, connection: Connection) -> int:
    family = socket.AF_INET if connection.version == 4 else socket.AF_INET6
    body = _GENERIC.pack(family, 0, 0) + connection.handle
    channel.send(_HEADER.pack(_HEADER.size + len(body), _DELETE, _REQUEST | _ACK, 0, 0) + body)
    for kind, answer in _messages(channel.recv(_BUFFER)):
        if kind == _ERROR:
            return _raise(answer, but_not=errno.ENOENT)
    return 0


def _raise(answer: bytes, but_not: int = 0) -> int:
    """Raises what the answer says. 1 for success, 0 for the error that does not count."""
    number: int = -struct.unpack_from("=i", answer)[0]
    if number not in (0, but_not):
        raise OSError(number, os.strerror(number))
    return 0 if number else 1


def _attribute(kind: int, payload: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def _nested(payload: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        yield kind & _TYPE_MASK, payload[at + _ATTRIBUTE.size : at + length]
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, at)
        yield kind, datagram[at + _HEADER.size : at + length]
        at += (max(length, _HEADER.size) + 3) & ~3
