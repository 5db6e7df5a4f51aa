"""What the node stands on: its own addresses, the interfaces that have them, and word of every change of these.

    addresses ─▶ interfaces ─▶ MTU       less the overhead, it is the pods'
                         └──▶ networks   who is on one of them is reached without a router

A node that was not told its addresses takes those from which it reaches the world, one of each family. IPv6 addresses
that come and go (temporary, deprecated, not yet unique) are not taken, since a node's peers keep what it tells them.

Word of a change comes from a netlink socket in the groups for links and addresses, with a socket filter that lets
nothing through but what is about these interfaces: a pod that is added makes a dozen messages, and none of them wakes
the daemon. What was missed all the same (an interface that was made anew) the periodic resync finds.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from ipam_daemon.errors import TryAgainLater
from ipam_daemon.model import Address, Network
from ipam_daemon.netlink import NetlinkThread, tolerating
from podwire.netns import netlink_socket

# Any address beyond a default route will do; nothing is sent. These are of no network that a node is on.
_FAR = ("192.88.99.1", "2001:1::1")
_UNSTABLE = 0x01 | 0x08 | 0x20 | 0x40  # IFA_F_TEMPORARY, _DADFAILED, _DEPRECATED, _TENTATIVE (linux/if_addr.h)
_GLOBAL = 0  # RT_SCOPE_UNIVERSE

_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR (linux/rtnetlink.h)
_INDEX_AT = 20  # of the interface in ifinfomsg and in ifaddrmsg, the header of 16 bytes counted
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_INSTRUCTION = struct.Struct("=HBBI")
_SO_ATTACH_FILTER = 26


class Underlay(msgspec.Struct, frozen=True, kw_only=True):
    """Where this node's addresses are. `devices` are interfaces, index → name, that of the first address first; `mtu`
    is their smallest, in bytes; `on_link` are the networks that they are on, each with its interface."""

    devices: Mapping[int, str]
    mtu: int
    on_link: Mapping[Network, str]


def find_underlay(thread: NetlinkThread, addresses: Sequence[Address]) -> Underlay:
    """The underlay of a node with these addresses. Raises TryAgainLater when no interface has the first."""
    places: dict[Address, tuple[int, Network]] = {}
    for each in thread.host.get_addr():
        address = ipaddress.ip_address(each.get("local") or each.get("address"))
        if address in addresses:
            network = ipaddress.ip_network(f"{address}/{each['prefixlen']}", strict=False)
            places[address] = (each["index"], network)
    if addresses[0] not in places:
        raise TryAgainLater(f"no interface of this node has the node address {addresses[0]}")
    links = {}
    for address in addresses:
        if address in places:
            index, _ = places[address]
            links[index] = thread.host.get_links(index)[0]
    return Underlay(
        devices={index: str(link.get("ifname")) for index, link in links.items()},
        mtu=min(int(link.get("mtu")) for link in links.values()),
        on_link={network: str(links[index].get("ifname")) for index, network in places.values()},
    )


def default_addresses(thread: NetlinkThread) -> tuple[Address, ...]:
    """The addresses from which this node reaches the world, one of each family that it has a default route of."""
    return tuple(address for far in _FAR if (address := _source_towards(thread, far)) is not None)


def _source_towards(thread: NetlinkThread, far: str) -> Address | None:
    route = None
    with tolerating(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
        route = next(iter(thread.host.route("get", dst=far)), None)
    if route is None or not route.get("oif"):
        return None
    family = socket.AF_INET6 if ":" in far else socket.AF_INET
    chosen = route.get("prefsrc")
    stable = [
        each.get("local") or each.get("address")
        for each in thread.host.get_addr(index=route.get("oif"), family=family)
        if each["scope"] == _GLOBAL and not (each.get("flags") or each["flags"]) & _UNSTABLE
    ]
    if chosen and (chosen in stable or family == socket.AF_INET):
        return ipaddress.ip_address(chosen)
    return ipaddress.ip_address(stable[0]) if stable else None


# --- word of changes ----------------------------------------------------------------------------------------------


class UnderlayWatch:
    """Calls back, in the event loop, when an interface of the underlay or an address of it changes."""

    def __init__(self, thread: NetlinkThread, changed: Callable[[], None]) -> None:
        self._thread = thread
        self._changed = changed
        self._indexes: frozenset[int] = frozenset()
        self._socket: socket.socket | None = None

    async def follow(self, indexes: Iterable[int]) -> bool:
        """Watches these interfaces from now on, and no others. True when it did not before: then look once more."""
        wanted = frozenset(indexes)
        if wanted == self._indexes:
            return False
        self.close()
        self._socket = await self._thread.run(_listen, wanted)
        self._indexes = wanted
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        return True

    def close(self) -> None:
        """Watches nothing any more."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        self._socket, self._indexes = None, frozenset()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            while True:
                self._socket.recv(65536)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # more came than there was room for: that is word, too
                raise
        self._changed()


def _listen(indexes: frozenset[int]) -> socket.socket:
    sock = netlink_socket()
    try:
        sock.setblocking(False)
        _attach(sock, change_filter(indexes))
        sock.bind((0, _GROUPS))
    except BaseException:
        sock.close()
        raise
    return sock


def change_filter(indexes: Iterable[int]) -> bytes:
    """A classic BPF program that accepts link and address messages about these interfaces. A word is loaded in network
    order, and the index is in the host's."""
    wanted = [socket.htonl(index) for index in sorted(indexes)]
    program = [(_LOAD_WORD, 0, 0, _INDEX_AT)]
    program += [(_JUMP_IF_EQUAL, len(wanted) - number, 0, index) for number, index in enumerate(wanted)]
    program += [(_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF)]
    return b"".join(_INSTRUCTION.pack(*each) for each in program)


def _attach(sock: socket.socket, program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // _INSTRUCTION.size, ctypes.addressof(buffer))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
