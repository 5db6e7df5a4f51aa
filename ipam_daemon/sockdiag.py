"""Which addresses the node itself listens on, at one port: sock_diag(7), which filters by port in the kernel.

30–60 µs for a port, of which most is the walk over the kernel's table of sockets.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from ipam_daemon.hostports import unmapped
from ipam_daemon.model import Address
from podwire.nlattr import attributes, message, messages

_NETLINK_SOCK_DIAG, _BY_FAMILY = 4, 20
_ERROR, _DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_ASK = struct.Struct("=BBxxI")  # inet_diag_req_v2: family, protocol, extensions, padding, states
_SOCKET = struct.Struct("!HH16s16s12x")  # inet_diag_sockid: source port, destination port, addresses, link and cookie
_AT, _SIZE = 4, 72  # inet_diag_msg: inet_diag_sockid after family, state, timer, retransmits
_ONLY_IPV6 = 11  # INET_DIAG_SKV6ONLY
_ALL_IPV4 = ipaddress.ip_address("0.0.0.0")
_FAMILIES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_STATES = {"tcp": 1 << 10, "sctp": 1 << 10, "udp": 1 << 7}
"""TCP_LISTEN, and TCP_CLOSE, which is what a UDP socket is in that is not connected."""
_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": 132}
_UNKNOWN = {errno.ENOENT, errno.EINVAL}  # the kernel has no such protocol, or does not tell about it
_BUFFER, _TIMEOUT = 1 << 16, 5.0


def listening(protocol: str, port: int) -> frozenset[Address]:
    """The addresses whose packets sockets of this thread's namespace take at `port`; 0.0.0.0 and :: are all of a
    family, and a socket on :: that takes IPv4 as well is both.

    Raises OSError.
    """
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(_TIMEOUT)
        return frozenset(each for family in _FAMILIES for each in _ask(diag, family, protocol, port))


def _ask(diag: socket.socket, family: int, protocol: str, port: int) -> list[Address]:
    body = _ASK.pack(family, _NUMBERS[protocol], _STATES[protocol]) + _SOCKET.pack(port, 0, b"", b"")
    diag.send(message(_BY_FAMILY, _REQUEST | _DUMP, family, body))
    found: list[Address] = []
    while True:
        for kind, _, _, answer in messages(diag.recv(_BUFFER)):
            if kind == _DONE:
                return found
            if kind == _ERROR:
                number = -struct.unpack_from("=i", answer)[0]
                if number in _UNKNOWN:
                    return found
                raise OSError(number, os.strerror(number), f"sockets at port {port}/{protocol}")
            if _SOCKET.unpack_from(answer, _AT)[0] == port:
                found += _addresses(answer)


def _addresses(answer: bytes) -> list[Address]:
    """Those that a socket is bound to, from an inet_diag_msg and its attributes."""
    _, _, packed, _ = _SOCKET.unpack_from(answer, _AT)
    address = ipaddress.ip_address(packed[: _FAMILIES[answer[0]]])
    if address.version == 6 and address.is_unspecified:
        only_six = dict(attributes(answer[_SIZE:])).get(_ONLY_IPV6, b"\0")[0]
        return [address] if only_six else [address, _ALL_IPV4]
    return [unmapped(address)]
