"""The netlink messages of the ADD path, packed by hand and sent together.

An ADD makes seven small requests. pyroute2 takes 0.2–0.4 ms for each, nearly all of it its own Python, and 0.4 ms more
to adopt the socket inside the pod's namespace: 3.3 ms in all, where these take 0.6–1.3 ms, most of it the kernel's. On
a node whose cores are busy starting pods that is what limits how many start. Requests that follow one another go in one
datagram. Only what ADD and the kill of a DEL need is here, and links.py for reading; everything else is pyroute2's.

    Message ──▶ one datagram ──▶ kernel: each in its order, one answer each ──▶ Channel.exchange()

The kernel goes on after a message that failed, so messages of one exchange must not depend on each other's success, or
the caller must be ready to undo them.

Source: netlink(7), rtnetlink(7), linux/if_link.h, linux/if_addr.h, linux/neighbour.h, linux/rtnetlink.h. All numbers
are of these headers; integers are in host order but for addresses.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from itertools import count

import msgspec

from ipam_daemon.model import Address, Interface
from podwire.nlattr import attribute, message, messages

# netlink
_ERROR, _DONE, _NEWLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH = 2, 3, 16, 20, 24, 28
_REQUEST, _ACK, _EXCL, _DUMP, _CREATE = 0x1, 0x4, 0x200, 0x300, 0x400
LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst, src, tos, table, protocol, scope, type, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_U8, _U16, _U32, _ERRNO = struct.Struct("=B"), struct.Struct("=H"), struct.Struct("=I"), struct.Struct("=i")
_BUFFER = 1 << 16

# attributes and values
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER = 1, 3, 4, 10
_IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_GROUP, _IFLA_NET_NS_FD = 18, 20, 27, 28
_IFLA_AF_SPEC, _INET6_ADDR_GEN_MODE, _EUI64 = 26, 8, 0
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_INFO_PEER, _BRPORT_MODE, _BRPORT_GROUP_FWD_MASK = 1, 4, 31
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_OIF, _RTA_GATEWAY = 4, 5
_IFF_UP, _IFA_F_NODAD = 0x1, 0x02
_TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _TYPE_UNICAST = 254, 4, 0, 1
_NDA_LLADDR, _NUD_NOARP, _NTF_MASTER = 2, 0x40, 0x04
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Message(msgspec.Struct, frozen=True):
    """A request: its type, its flags but for those of every request, its body, and what it does, for an error."""

    kind: int
    flags: int
    body: bytes
    what: str


class End(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a veth pair. `mac` in colon notation, `mtu` in bytes."""

    ifname: str
    mac: str
    mtu: int


# --- messages -------------------------------------------------------------------------------------------------------


def make_pair(host: End, master: int, peer: End, netns: int) -> Message:
    """Makes a veth pair: `host` here, up, a port of the link with index `master`; `peer` in the namespace `netns`, a
    file descriptor."""
    theirs = LINK.pack(0, 0, 0, 0, 0) + _end(peer) + attribute(_IFLA_NET_NS_FD, _U32.pack(netns))
    info = attribute(_INFO_KIND, b"veth") + attribute(_INFO_DATA, attribute(_VETH_INFO_PEER, theirs))
    body = (
        LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP)
        + _end(host)
        + attribute(_IFLA_MASTER, _U32.pack(master))
        + attribute(_IFLA_LINKINFO, info)
    )
    return Message(_NEWLINK, _CREATE | _EXCL, body, f"veth pair {host.ifname}")


def set_port(index: int, alias: str, forwarded_groups: int) -> Message:
    """Makes a bridge port send back to where a frame came from (hairpin), and forward frames to these of the reserved
    group addresses (a mask of the last octet); gives the link an alias."""
    port = attribute(_BRPORT_MODE, _U8.pack(1)) + attribute(_BRPORT_GROUP_FWD_MASK, _U16.pack(forwarded_groups))
    info = attribute(_INFO_SLAVE_KIND, b"bridge") + attribute(_INFO_SLAVE_DATA, port)
    named = attribute(_IFLA_IFALIAS, alias.encode()) if alias else b""
    body = LINK.pack(0, 0, index, 0, 0) + named + attribute(_IFLA_LINKINFO, info)
    return Message(_NEWLINK, 0, body, "bridge port")


def set_port_mac(index: int, mac: str) -> Message:
    """Tells the bridge of a port who is behind it, for good: an entry that is not learnt and does not age. EEXIST where
    the bridge knows the MAC, which may be its own."""
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _NUD_NOARP, _NTF_MASTER, 0) + attribute(
        _NDA_LLADDR, bytes.fromhex(mac.replace(":", ""))
    )
    return Message(_NEWNEIGH, _CREATE | _EXCL, body, f"FDB entry of {mac}")


def raise_link(index: int) -> Message:
    """Sets a link up."""
    return Message(_NEWLINK, 0, LINK.pack(0, 0, index, _IFF_UP, _IFF_UP), "link up")


def make_link_local_of_mac(index: int) -> Message:
    """The link will make its link-local address of its MAC (RFC 4291, appendix A). EAFNOSUPPORT without IPv6."""
    six = attribute(socket.AF_INET6, attribute(_INET6_ADDR_GEN_MODE, _U8.pack(_EUI64)))
    body = LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_AF_SPEC, six)
    return Message(_NEWLINK, 0, body, "how its link-local address is made")


def set_mtu(index: int, mtu: int) -> Message:
    """Gives a link an MTU, in bytes."""
    return Message(_NEWLINK, 0, LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_MTU, _U32.pack(mtu)), "MTU")


def lower_link(index: int, group: int) -> Message:
    """Sets a link down, takes it out of its bridge, and puts it into a link group, all at once."""
    body = (
        LINK.pack(0, 0, index, 0, _IFF_UP)
        + attribute(_IFLA_MASTER, _U32.pack(0))
        + attribute(_IFLA_GROUP, _U32.pack(group))
    )
    return Message(_NEWLINK, 0, body, "link down")


def add_address(index: int, interface: Interface) -> Message:
    """Adds an address with its prefix length; one of IPv6 without duplicate address detection."""
    family, packed = _FAMILIES[interface.version], interface.ip.packed
    nodad = attribute(_IFA_FLAGS, _U32.pack(_IFA_F_NODAD)) if interface.version == 6 else b""
    body = (
        _ADDRESS.pack(family, interface.network.prefixlen, 0, _SCOPE_UNIVERSE, index)
        + attribute(_IFA_LOCAL, packed)
        + attribute(_IFA_ADDRESS, packed)
        + nodad
    )
    return Message(_NEWADDR, _CREATE | _EXCL, body, f"address {interface}")


def add_default_route(index: int, gateway: Address) -> Message:
    """Adds the default route of the gateway's family."""
    family = _FAMILIES[gateway.version]
    body = (
        _ROUTE.pack(family, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_UNIVERSE, _TYPE_UNICAST, 0)
        + attribute(_RTA_GATEWAY, gateway.packed)
        + attribute(_RTA_OIF, _U32.pack(index))
    )
    return Message(_NEWROUTE, _CREATE | _EXCL, body, f"default route via {gateway}")


# --- the socket -----------------------------------------------------------------------------------------------------


class Channel:
    """A NETLINK_ROUTE socket, which belongs to the namespace that it was opened in. Not for several threads."""

    def __init__(self, sock: socket.socket, timeout: float = 5.0) -> None:
        """Takes `sock` over. `timeout` in seconds: the kernel answers before it returns, so only a bug waits."""
        self._socket = sock
        self._socket.settimeout(timeout)
        self._sequence = count(1)

    def exchange(self, requests: Sequence[Message]) -> list[bytes]:
        """Sends all in one datagram. Returns the answer's body for each, empty for one that was only carried out.

        Raises OSError with the errno of the first that failed, after all were tried; `filename` says what it was.
        """
        numbered = {next(self._sequence): each for each in requests}
        self._socket.send(
            b"".join(
                message(each.kind, _REQUEST | _ACK | each.flags, number, each.body) for number, each in numbered.items()
            )
        )
        bodies: dict[int, bytes] = {}
        errors: dict[int, int] = {}
        while numbered.keys() - errors.keys():  # an answer that nobody waits for any more counts for nothing
            _read(self._socket.recv(_BUFFER), bodies, errors)
        for number, each in numbered.items():
            if errors[number]:
                raise OSError(errors[number], os.strerror(errors[number]), each.what)
        return [bodies.get(number, b"") for number in numbered]

    def dump(self, request: Message) -> list[bytes]:
        """The body of each answer to a request for all of something. What changes meanwhile may be missing or come
        twice. Raises OSError."""
        number, found = next(self._sequence), list[bytes]()
        self._socket.send(message(request.kind, _REQUEST | _DUMP | request.flags, number, request.body))
        while True:
            for kind, _, of, body in messages(self._socket.recv(_BUFFER)):
                if of != number:
                    continue
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    code = -_ERRNO.unpack_from(body)[0]
                    raise OSError(code, os.strerror(code), request.what)
                found.append(body)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def _read(datagram: bytes, bodies: dict[int, bytes], errors: dict[int, int]) -> None:
    for kind, _, number, body in messages(datagram):
        if kind == _ERROR:
            errors[number] = -_ERRNO.unpack_from(body)[0]
        else:
            bodies[number] = body


def _end(end: End) -> bytes:
    return (
        attribute(_IFLA_IFNAME, end.ifname.encode() + b"\0")
        + attribute(_IFLA_MTU, _U32.pack(end.mtu))
        + attribute(_IFLA_ADDRESS, bytes.fromhex(end.mac.replace(":", "")))
    )
