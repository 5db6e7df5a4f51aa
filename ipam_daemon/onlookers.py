"""Whose business the packets of a link are besides ours: what the fast path would take them past.

    a queue that somebody chose (a token bucket, say), nft chains at its own hooks      of the link: a dump for all
    tc's filters, programs of TCX                                                       of the link: 0.03 ms for each
    a bridge that does not forward for it, or not to all                                of the port: a dump for all
    IPsec policies, routing rules that ask for a mark                                   of the node

Where there is any, the fast path stands back: a limit stays a limit, what leaves encrypted still does, and so does what
is marked by the way that it is marked for, or to a proxy. Within a node no mark leads anywhere, since the bridge does
not route. What comes later is found in the next round.

Source: rtnetlink(7); linux/if_link.h, linux/if_bridge.h, linux/xfrm.h, linux/fib_rules.h. Every function here runs on
the netlink thread.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from contextlib import closing
from functools import cached_property, lru_cache

from ipam_daemon import tc_program
from ipam_daemon.links import get_link, read_link
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.rtnl import LINK, Channel, Message
from podwire.bpf.tcx import Way, programs
from podwire.nfelements import Family
from podwire.nfnetlink import Interfaces
from podwire.nlattr import attributes

_NETLINK_XFRM, _GET_POLICIES, _POLICIES = 6, 0x25, 1
_GET_LINK, _MASTER, _PORT, _STATE, _ISOLATED, _FORWARDING = 18, 10, 12, 1, 33, 3
_UP = 0x1  # linux/if.h
_GET_RULE, _BY_MARK = 34, frozenset((10, 16))  # FRA_FWMARK, FRA_FWMASK
_RULE = struct.Struct("=B11x")  # fib_rule_hdr: family
_COUNTS = struct.Struct("=III")  # xfrmu_spdinfo: in, out, forwarded
_U32 = struct.Struct("=I")
_SECONDS = 5.0


class Onlookers:
    """What there is now."""

    def __init__(self, thread: NetlinkThread, before: Onlookers | None = None) -> None:
        """Chains of family inet, which may be thousands, are those of the time `before`. Raises OSError."""
        self._thread = thread
        self._kinds: dict[int, set[str]] = {}
        for answer in thread.channel.dump(tc_program.list_qdiscs()):
            found = tc_program.read_qdisc(answer)
            self._kinds.setdefault(found.ifindex, set()).add(found.kind)
        netdev = thread.nftables.devices(Family.NETDEV)
        self._inet: Interfaces = before._inet if before else thread.nftables.devices(Family.INET)
        self._chains = {Family.NETDEV: netdev, Family.INET: self._inet}

    def is_there(self, ifindex: int) -> bool:
        """Whether there is a link with this index."""
        return ifindex in self._kinds

    def has_filters(self, ifindex: int) -> bool:
        """Whether there is a place for filters, whoever made it."""
        return "clsact" in self._kinds.get(ifindex, ())

    def is_forwarded(self, ifindex: int, bridge: int) -> bool:
        """Whether the bridge with this index sends on what the link takes in, and to it, without exception. Raises
        OSError for a link that is gone."""
        if ifindex in self._ports:
            return self._ports[ifindex] == bridge
        (link,) = self._thread.channel.exchange([get_link(ifindex)])  # no port; or links came and went under the dump
        return read_link(link).is_port_of(bridge)

    @cached_property
    def _ports(self) -> dict[int, int]:
        """The bridge that forwards for each port, 0 for none."""
        asked = Message(_GET_LINK, 0, LINK.pack(socket.AF_BRIDGE, 0, 0, 0, 0), "bridge ports")
        return dict(map(_read_port, self._thread.channel.dump(asked)))

    def of(self, ifindex: int, ifname: str, *, sends: bool) -> str:
        """Who looks at packets that the link takes in, in words, and at those that it `sends`; empty when nobody does.
        For filters and programs there is `programs`."""
        kinds = self._kinds.get(ifindex, set())
        chosen = (kinds - tc_program.PLAIN - {"clsact"}) if sends else kinds & {"ingress"}
        if chosen:
            return f"it has a queueing discipline of somebody else ({min(chosen)})"
        families = (family for family, devices in self._chains.items() if ifname in devices)
        return next((f"it has an nft chain of family {family.name.lower()}" for family in families), "")

    def with_filters(self) -> list[int]:
        """The links that have a place for filters."""
        return [ifindex for ifindex, kinds in self._kinds.items() if "clsact" in kinds]

    def programs(self, ifindex: int, *, sends: bool) -> frozenset[str]:
        """The names of the filters and programs for what the link takes in, and for what it `sends`."""
        found = set(programs(ifindex, Way.IN).values()) | set(programs(ifindex, Way.OUT).values() if sends else ())
        return self.filters(ifindex) | found if self.has_filters(ifindex) else frozenset(found)

    def links(self) -> Iterable[int]:
        """All links."""
        return self._kinds.keys()

    def filters(self, ifindex: int) -> frozenset[str]:
        """The names of the link's filters, "" for one that has none; the place for them is there."""
        answers = [each for asked in tc_program.list_filters(ifindex) for each in self._thread.channel.dump(asked)]
        return frozenset(name for name in map(tc_program.read_filter_name, answers) if name is not None)


@lru_cache(maxsize=1 << 10)  # a port's answer is seldom another: 20 µs each
def _read_port(answer: bytes) -> tuple[int, int]:
    """The index of a link, and that of the bridge that forwards for it, 0 for none."""
    _, _, ifindex, flags, _ = LINK.unpack_from(answer)
    found = dict(attributes(answer[LINK.size :]))
    port = dict(attributes(found.get(_PORT, b"")))
    forwarding = flags & _UP and port.get(_STATE) == bytes((_FORWARDING,)) and not any(port.get(_ISOLATED, b""))
    return ifindex, _U32.unpack(found[_MASTER])[0] if forwarding and _MASTER in found else 0


def has_ipsec() -> bool:
    """Whether there are IPsec policies in the namespace of this thread. Raises OSError."""
    try:
        asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_XFRM)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:  # a kernel without IPsec
            return False
        raise
    with closing(Channel(asking, _SECONDS)) as channel:
        (answer,) = channel.exchange([Message(_GET_POLICIES, 0, _U32.pack(0xFFFFFFFF), "IPsec policies")])
    found = dict(attributes(answer[_U32.size :])).get(_POLICIES, bytes(_COUNTS.size))
    return any(_COUNTS.unpack_from(found))


def routes_by_mark(channel: Channel) -> bool:
    """Whether routing rules of the channel's namespace ask for a packet's mark, which those of multicast may do. Raises
    OSError."""
    answers = channel.dump(Message(_GET_RULE, 0, _RULE.pack(socket.AF_UNSPEC), "routing rules"))
    routed = (each for each in answers if each[0] in (socket.AF_INET, socket.AF_INET6))
    return any(kind in _BY_MARK for each in routed for kind, _ in attributes(each[_RULE.size :]))


def between_nodes(channel: Channel) -> str:
    """What there is in the namespace of this thread and channel that decides how packets leave and arrive, in words;
    empty when nothing does. Raises OSError."""
    if has_ipsec():
        return "the node has IPsec policies"
    return "the node has routing rules that ask for a mark" if routes_by_mark(channel) else ""
