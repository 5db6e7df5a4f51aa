"""The node's connections: every one of UDP, TCP and SCTP, and the deletion of some.

A table may have a million entries, so they are read and judged one by one in a thread, and the event loop goes on:
100,000 take about a second of it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from kube_proxy_lite.stale import Connection
from podwire import conntrack
from podwire.errors import TryAgain
from podwire.nlattr import attributes

_VERSIONS: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 6}
_FAMILIES = {version: family for family, version in _VERSIONS.items()}
_PROTOCOLS: dict[int, str] = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP", socket.IPPROTO_SCTP: "SCTP"}
_SECONDS = 30.0
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


def _select(wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
    with conntrack.channel(_SECONDS) as channel:
        return wanted(each for family in _VERSIONS for each in _connections(channel, family))


def _delete_all(connections: Sequence[Connection]) -> int:
    with conntrack.channel(_SECONDS) as channel:
        return sum(conntrack.delete(channel, _FAMILIES[each.version], each.handle) for each in connections)


def _connections(channel: socket.socket, family: int) -> Iterator[Connection]:
    for entry in conntrack.dump(channel, family):
        found = read(family, entry)
        if found is not None:
            yield found


def read(family: int, entry: Mapping[int, bytes]) -> Connection | None:
    """What an entry says, None for other protocols than those of Services."""
    original, reply = (dict(attributes(entry.get(kind, b""))) for kind in (conntrack.ORIGINAL, conntrack.REPLY))
    there, back = (dict(attributes(each.get(conntrack.PROTOCOL, b""))) for each in (original, reply))
    protocol = _PROTOCOLS.get(there.get(conntrack.PROTOCOL_NUMBER, b"\0")[0])
    if protocol is None:
        return None
    asked, answering = (dict(attributes(each[conntrack.IP])) for each in (original, reply))
    return Connection(
        version=_VERSIONS[family],
        protocol=protocol,
        source=_number(asked[conntrack.SOURCE[family]]),
        destination=_number(asked[conntrack.DESTINATION[family]]),
        port=_number(there[conntrack.DESTINATION_PORT]),
        endpoint=_number(answering[conntrack.SOURCE[family]]),
        endpoint_port=_number(back[conntrack.SOURCE_PORT]),
        handle=conntrack.name_of(entry),
        answered=bool(_number(entry.get(conntrack.STATUS, b"")) & conntrack.SEEN_REPLY),
    )


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")
