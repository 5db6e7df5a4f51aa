"""Conntrack over netlink: what dumps and deletes entries, for who knows which ones.

A dump is one request and a message for each entry, read as they come, so that a table of a million entries is never in
memory; a filter spares the messages where the kernel knows it (5.8 and later). A deletion repeats the tuple, the id and
the zone that the dump said, so that an entry that has been replaced meanwhile is left alone.

Source: linux/netfilter/nfnetlink_conntrack.h; ctnetlink_dump_table() in net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping

from podwire.nlattr import attribute, attributes, message, messages, nested

ORIGINAL, REPLY, STATUS, ID, ZONE, FILTER = 1, 2, 3, 12, 18, 25
"""Attributes of an entry (CTA_…), and of a dump."""
IP, PROTOCOL = 1, 2
"""Attributes of a tuple."""
PROTOCOL_NUMBER, SOURCE_PORT, DESTINATION_PORT = 1, 2, 3
"""Attributes of a tuple's protocol."""
SOURCE: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
DESTINATION: dict[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 4}
"""Attributes of a tuple's addresses, by family."""
SEEN_REPLY = 1 << 1
"""In the status: the other end has answered."""

_NETLINK_NETFILTER = 12
_GET, _DELETE = 0x101, 0x102
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_BUFFER = 1 << 18


def channel(seconds: float) -> socket.socket:
    """A socket of this thread's namespace that waits for so long. Raises OSError."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    made.settimeout(seconds)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return made


def dump(open_channel: socket.socket, family: int, filters: bytes = b"") -> Iterator[dict[int, bytes]]:
    """The attributes of every entry of a family; `filters` are attributes of the request. Raises OSError."""
    body = _GENERIC.pack(family, 0, 0) + filters
    open_channel.send(message(_GET, _REQUEST | _DUMP, family, body))
    while True:
        for kind, _, _, answer in messages(open_channel.recv(_BUFFER)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                _raise(answer)
            elif answer[0] == family:
                yield dict(attributes(answer[_GENERIC.size :]))


def name_of(entry: Mapping[int, bytes]) -> bytes:
    """What a deletion has to repeat."""
    name = nested(ORIGINAL, entry[ORIGINAL])
    for kind in (ID, ZONE):
        name += attribute(kind, entry[kind]) if kind in entry else b""
    return name


def delete(open_channel: socket.socket, family: int, name: bytes) -> bool:
    """Deletes an entry. False when it is not there any more. Raises OSError."""
    open_channel.send(message(_DELETE, _REQUEST | _ACK, 0, _GENERIC.pack(family, 0, 0) + name))
    for kind, _, _, answer in messages(open_channel.recv(_BUFFER)):
        if kind == _ERROR:
            return _raise(answer, but_not=errno.ENOENT)
    return False


def _raise(answer: bytes, but_not: int = 0) -> bool:
    """Raises what the answer says. True for success, False for the error that does not count."""
    number: int = -struct.unpack_from("=i", answer)[0]
    if number not in (0, but_not):
        raise OSError(number, os.strerror(number))
    return number == 0
