"""What the node stands on: its own addresses, the interfaces that have them, and word of every change of these.

    addresses ─▶ interfaces ─▶ MTU       less the overhead, it is the pods'
                         └──▶ networks   who is on one of them is reached without a router

A node that was not told its addresses takes those from which it reaches the world, one of each family. IPv6 addresses
that come and go (temporary, deprecated, not yet unique) are not taken, since a node's peers keep what it tells them.
One that is gone for some seconds is followed by the one from which the node reaches the world by then (another lease,
another prefix); a link that flaps and a client that renews are quicker. Until there is one, the last known is kept.

A node address may be on an interface that no packet leaves by (`lo`, where hosts speak BGP): then the MTU is that of
the default route's interface, and its network, of one address, has no neighbours.

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
from typing import Any

import msgspec

from ipam_daemon.errors import TryAgainLater
from ipam_daemon.model import Address, Network
from ipam_daemon.netlink import NetlinkThread, tolerating
from podwire.netns import netlink_socket

# Any address beyond a default route will do; nothing is sent. These are of no network that a node is on.
_FAR = {4: "192.88.99.1", 6: "2001:1::1"}
_UNSTABLE = 0x01 | 0x08 | 0x20 | 0x40  # IFA_F_TEMPORARY, _DADFAILED, _DEPRECATED, _TENTATIVE (linux/if_addr.h)
_GOING = 0x08 | 0x20  # of these what an address that is there does not come back from by itself
_UP, _LOOPBACK = 0x1, 0x8  # IFF_ (linux/if.h)
_LARGEST_MTU = 65535  # of an IP packet, and of a bridge
GRACE = 5.0
"""Seconds for which an address of the node may be gone before another takes its place."""
_GLOBAL = 0  # RT_SCOPE_UNIVERSE

_GROUPS = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR (linux/rtnetlink.h)
_INDEX_AT = 20  # of the interface in ifinfomsg and in ifaddrmsg, the header of 16 bytes counted
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_INSTRUCTION = struct.Struct("=HBBI")
_SO_ATTACH_FILTER = 26


class Underlay(msgspec.Struct, frozen=True, kw_only=True):
    """Where this node's addresses are. `devices` are the interfaces that have them and those that packets leave by,
    index → name, those of the first address first; `mtu` is the smallest of the latter, in bytes, 0 when there is none;
    `on_link` are the networks that these are on, each with its interface."""

    devices: Mapping[int, str]
    mtu: int
    on_link: Mapping[Network, str]


def find_underlay(thread: NetlinkThread, addresses: Sequence[Address]) -> Underlay:
    """The underlay of a node with these addresses. Raises TryAgainLater when no interface has the first."""
    places: dict[Address, list[tuple[int, Network]]] = {}
    for each in thread.host.get_addr():
        address = ipaddress.ip_address(each.get("local") or each.get("address"))
        if address in addresses:
            network = ipaddress.ip_network(f"{address}/{each['prefixlen']}", strict=False)
            places.setdefault(address, []).append((each["index"], network))
    if addresses[0] not in places:
        raise TryAgainLater(f"no interface of this node has the node address {addresses[0]}")
    devices: dict[int, str] = {}
    on_link: dict[Network, str] = {}
    mtus: list[int] = []
    for address in (each for each in addresses if each in places):
        found = [(thread.host.get_links(index)[0], network) for index, network in places[address]]
        link, network = min(found, key=lambda each: _unlikelihood(each[0]))
        devices[link["index"]] = str(link.get("ifname"))
        if _leads_out(link):
            on_link[network] = str(link.get("ifname"))
        elif (way := _link_outward(thread, address.version)) is not None:
            link = way
            devices[link["index"]] = str(link.get("ifname"))
        if not link["flags"] & _LOOPBACK:
            mtus.append(int(link.get("mtu")))
    return Underlay(devices=devices, mtu=min(*mtus, _LARGEST_MTU) if mtus else 0, on_link=on_link)


def _unlikelihood(link: Any) -> tuple[bool, bool]:
    """How little it is this one of several interfaces with the same address."""
    return not _leads_out(link), not link["flags"] & _UP


def _leads_out(link: Any) -> bool:
    """Whether packets leave the node by this interface."""
    return not link["flags"] & _LOOPBACK and link.get(("linkinfo", "kind")) != "dummy"


def _link_outward(thread: NetlinkThread, family: int) -> Any | None:
    route = _route_towards(thread, _FAR[family])
    return None if route is None else thread.host.get_links(route.get("oif"))[0]


def default_addresses(thread: NetlinkThread) -> tuple[Address, ...]:
    """The addresses from which this node reaches the world, one of each family that it has a default route of."""
    return tuple(address for far in _FAR.values() if (address := _source_towards(thread, far)) is not None)


def _source_towards(thread: NetlinkThread, far: str) -> Address | None:
    route = _route_towards(thread, far)
    if route is None:
        return None
    family = socket.AF_INET6 if ":" in far else socket.AF_INET
    chosen = route.get("prefsrc")
    stable = [
        each.get("local") or each.get("address")
        for each in thread.host.get_addr(index=route.get("oif"), family=family)
        if each["scope"] == _GLOBAL and not _flags(each) & _UNSTABLE
    ]
    if chosen and (chosen in stable or family == socket.AF_INET):
        return ipaddress.ip_address(chosen)
    return ipaddress.ip_address(stable[0]) if stable else None


def _route_towards(thread: NetlinkThread, far: str) -> Any | None:
    route = None
    with tolerating(errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
        route = next(iter(thread.host.route("get", dst=far)), None)
    return route if route is not None and route.get("oif") else None


def _flags(address: Any) -> int:
    return int(address.get("flags") or address["flags"])


# --- the node's own addresses -------------------------------------------------------------------------------------


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel says of addresses: `held` are all that interfaces have and keep, `outward` those from which the
    world is reached, at most one of each family."""

    held: frozenset[Address]
    outward: tuple[Address, ...] = ()


def look_at_addresses(thread: NetlinkThread, searches: bool) -> Standing:
    """How it stands with the addresses of this node. Where they are configured (not `searches`) nothing takes the place
    of any, and one that nobody begins to talk from any more (deprecated) is as good as others."""
    lost = _GOING if searches else 0
    held = frozenset(
        ipaddress.ip_address(each.get("local") or each.get("address"))
        for each in thread.host.get_addr()
        if not _flags(each) & lost
    )
    return Standing(held=held, outward=default_addresses(thread) if searches else ())


class OwnAddresses:
    """The node's own addresses on the underlay as they come and go. It is told how it stands, and asks nobody."""

    def __init__(self, configured: tuple[Address, ...], families: Iterable[int], grace: float = GRACE) -> None:
        """`families` of the pods: an address of each is looked for. `grace` is in seconds."""
        self.addresses = configured
        """At most one of each family, that of the VXLAN end point first. A family that came does not go."""
        self.searches = not configured
        """Whether they are found, not configured."""
        self.due: float | None = None
        """When it is time to look again, by the clock that `follow` is told of; None when no address is missing, or
        all is done that could be."""
        self._families = frozenset(families)
        self._grace = grace
        self._missing: dict[Address, float] = {}  # since when
        self._told: dict[Address, str] = {}

    @property
    def lacks(self) -> list[str]:
        """Which addresses have long been gone and have no successor, in words."""
        return list(self._told.values())

    def follow(self, standing: Standing, now: float) -> list[str]:
        """Takes what came, and puts others in the place of those that have long been gone. Returns what an operator has
        to know, in words. `now` in seconds."""
        if self.searches:
            self._take(standing.outward)
        self._missing = {each: self._missing.get(each, now) for each in self.addresses if each not in standing.held}
        self._told = {each: word for each, word in self._told.items() if each in self._missing}
        late = [each for each, since in self._missing.items() if now - since >= self._grace]
        words = [word for each in late if (word := self._replace(each, standing.outward))]
        waiting = [since for each, since in self._missing.items() if each not in late]
        self.due = min(waiting) + self._grace if waiting else None
        return words

    def _take(self, found: Iterable[Address]) -> None:
        known = {each.version for each in self.addresses}
        if known and self._families <= known:
            return
        more = [each for each in found if each.version not in known]
        self.addresses = tuple(sorted((*self.addresses, *more), key=lambda each: each.version))

    def _replace(self, gone: Address, found: Iterable[Address]) -> str:
        successor = next((each for each in found if each.version == gone.version), None)
        if successor is not None:
            self.addresses = tuple(successor if each == gone else each for each in self.addresses)
            del self._missing[gone]
            self._told.pop(gone, None)
            return f"the node's address {gone} is gone; it is {successor} from now on"
        if gone in self._told:
            return ""
        why = "and there is no other from which it reaches the world" if self.searches else "which nodeAddresses has"
        self._told[gone] = f"no interface of this node has its address {gone}, {why}"
        return self._told[gone]


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
