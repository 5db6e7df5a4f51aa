"""What the kernel says of links, asked for and read by hand: a round of reconciling looks at every wire.

    get_link   ─▶ one answer   ┐
    list_links ─▶ one for each ┴─▶ read_link ─▶ Link      20 µs; pyroute2 reads all that there is to say, in 0.4 ms

Source: rtnetlink(7), linux/if_link.h. All numbers are of this header.
"""

from __future__ import annotations

import struct

import msgspec

from ipam_daemon.rtnl import LINK, Message
from podwire.nlattr import attribute, attributes

_GETLINK = 18
_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_OPERSTATE, _IFLA_LINKINFO = 3, 4, 10, 16, 18
_IFLA_IFALIAS, _IFLA_GROUP, _IFLA_EXT_MASK = 20, 27, 29
_INFO_KIND, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 4, 5
_BRPORT_MODE, _BRPORT_GROUP_FWD_MASK = 4, 31
_IFF_UP, _OPERSTATE_UP, _SKIP_STATS = 0x1, 6, 1 << 3
_ETHERNET = 1  # linux/if_arp.h
_U16, _U32 = struct.Struct("=H"), struct.Struct("=I")


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """A port of a bridge. `forwarded_groups` is the mask of reserved group addresses that it forwards."""

    hairpin: bool
    forwarded_groups: int


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link. `is_sending` is being up operationally (RFC 2863); `mtu` is in bytes; `master` is 0 for none."""

    index: int
    name: str
    is_ethernet: bool
    is_up: bool
    is_sending: bool
    mtu: int
    master: int
    group: int
    alias: str
    port: Port | None

    def is_port_of(self, bridge: int) -> bool:
        """Whether it is up, and a port of the bridge with this index."""
        return self.is_up and self.master == bridge


def get_link(index: int) -> Message:
    """Asks for a link, its counters left out. ENODEV where there is none."""
    return Message(_GETLINK, 0, LINK.pack(0, 0, index, 0, 0) + _WITHOUT_COUNTERS, "link")


def list_links(kind: str = "") -> Message:
    """Asks for all links, or for those of a kind; a kernel that does not know the kind answers with all."""
    wanted = attribute(_IFLA_LINKINFO, attribute(_INFO_KIND, kind.encode())) if kind else b""
    return Message(_GETLINK, 0, LINK.pack(0, 0, 0, 0, 0) + _WITHOUT_COUNTERS + wanted, "links")


def read_link(answer: bytes) -> Link:
    """The link of an answer to `get_link`, or of one of those to `list_links`."""
    _, hardware, index, flags, _ = LINK.unpack_from(answer)
    found = dict(attributes(answer[LINK.size :]))
    return Link(
        index=index,
        name=_text(found.get(_IFLA_IFNAME)),
        is_ethernet=hardware == _ETHERNET,
        is_up=bool(flags & _IFF_UP),
        is_sending=found.get(_IFLA_OPERSTATE) == bytes((_OPERSTATE_UP,)),
        mtu=_number(found.get(_IFLA_MTU)),
        master=_number(found.get(_IFLA_MASTER)),
        group=_number(found.get(_IFLA_GROUP)),
        alias=_text(found.get(_IFLA_IFALIAS)),
        port=_port(dict(attributes(found.get(_IFLA_LINKINFO, b"")))),
    )


def _port(info: dict[int, bytes]) -> Port | None:
    if _text(info.get(_INFO_SLAVE_KIND)) != "bridge":
        return None
    data = dict(attributes(info.get(_INFO_SLAVE_DATA, b"")))
    (groups,) = _U16.unpack(data.get(_BRPORT_GROUP_FWD_MASK, bytes(_U16.size)))
    return Port(hairpin=any(data.get(_BRPORT_MODE, b"")), forwarded_groups=groups)


def _number(value: bytes | None) -> int:
    return int(_U32.unpack(value)[0]) if value else 0


def _text(value: bytes | None) -> str:
    return value.rstrip(b"\0").decode(errors="replace") if value else ""


_WITHOUT_COUNTERS = attribute(_IFLA_EXT_MASK, _U32.pack(_SKIP_STATS))
