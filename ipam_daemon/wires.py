"""A pod's wire: one veth pair, its end in the pod named and addressed, its end on the node a port of the bridge.

ADD is one message that makes both ends in their namespaces, enslaves and raises the host's (0.4–1.2 ms), then two
datagrams on a socket inside the pod's namespace (how its link-local address is made; addresses, up, default routes: 0.2
ms with opening it), and one for the port (hairpin, its MAC, an alias that says whose it is, and the question whether it
sends: 0.05 ms). They are packed by hand (ipam_daemon/rtnl.py), since pyroute2 takes three times as long. There is no
wait for duplicate address detection: the allocator gives an address once, and an IPv6 address is added with
IFA_F_NODAD.

The bridge is told which MAC is behind a port: it forgets what it has learnt of a pod that is silent for five minutes,
or sends by the fast path alone, and then all the others get what is for that one.

DEL kills the wire at once and deletes it later. Taking the link down and out of the bridge is 0.5 ms, and nothing
passes it from then on; deleting a veth pair takes the kernel 20–35 ms of RCU grace periods, the same for one as for a
group of twenty. So dead links are collected in a link group of our own and deleted by group, off the DEL path; on the
path of an ADD only when the same namespace is used again before that.

Every function here runs on the netlink thread.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

import msgspec
from pyroute2.netlink.exceptions import NetlinkError

from ipam_daemon.errors import InterfaceExists, InvalidNetns, PlumbingFailed, TryAgainLater
from ipam_daemon.faults import point
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.hostport_table import read_table
from ipam_daemon.hostports import mappings_of
from ipam_daemon.links import Link, Port, get_link, list_links, read_link
from ipam_daemon.model import Address, Attachment, Network, host_mac
from ipam_daemon.netlink import (
    NetlinkThread,
    container,
    container_channel,
    index_of,
    naming,
    read_sysctl,
    tolerating,
    write_sysctl,
)
from ipam_daemon.plan import BRIDGE, alias_of, attachment_of
from ipam_daemon.rtnl import (
    Channel,
    End,
    add_address,
    add_default_route,
    lower_link,
    make_link_local_of_mac,
    make_pair,
    raise_link,
    set_mtu,
    set_port,
    set_port_mac,
)
from ipam_daemon.shaper import Shaper
from ipam_daemon.tc_program import add_clsact
from podwire.netns import NetnsError, inside, open_netns

DOOMED_GROUP = 0x70770DED
"""The link group of wires that are to be deleted."""
FORWARDED_GROUPS = 0xFFFD
"""The reserved group addresses 01:80:c2:00:00:0x that a port forwards, as a mask: all but that of pause frames, which
the kernel drops. A bridge that keeps such a frame to itself learns its sender's MAC before anybody has looked at it
(IEEE 802.1D, table 7-10; br_handle_frame())."""
_PORT = Port(hairpin=True, forwarded_groups=FORWARDED_GROUPS)
_UP = "up"
_CARRIER_SECONDS, _CARRIER_POLL = 5.0, 0.001  # a kernel before 6.9 may run its link watch once a second


class WireState(Enum):
    """What a look at an attached wire found."""

    FINE = "fine"
    MENDED = "mended"
    GONE = "gone"


class Wires:
    """The wires of this node's pods."""

    def __init__(
        self,
        thread: NetlinkThread,
        bridge: str = BRIDGE,
        guard: SpoofGuard | None = None,
        dying: Callable[[str], None] = lambda _: None,
        filtered: bool = False,
    ) -> None:
        """Without a `guard` a pod may send as anybody. `dying` is called with the name of a wire that is about to be
        killed, for what leads round its port. With `filtered` ports get a place for tc's filters when nobody can lose a
        packet by that yet: a link whose place is made or taken away drops what it sends for half a millisecond."""
        self._thread = thread
        self._dying = dying
        self._filtered = filtered
        self._bridge = bridge
        self._shaper = Shaper(thread)
        self._guard = guard

    # --- the spoof guard

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """Takes the wires of an earlier daemon to be what they are; for the start, before any call is answered."""
        if self._guard:
            self._guard.adopt(attachments)

    def ensure_guard(self) -> list[str]:
        """Brings what guards the wires to what they are. Returns what had to be done, in words."""
        return self._guard.ensure() if self._guard else []

    # --- ADD

    def attach(self, attachment: Attachment, gateways: Mapping[Network, Address], *, last: bool = False) -> None:
        """Makes the wire, or nothing: what was made before a failure is deleted again. `last` says that no plugin
        follows that may want the place for filters to itself.

        Raises InvalidNetns, InterfaceExists, TryAgainLater (the bridge is not there yet) or PlumbingFailed.
        """
        try:
            netns = open_netns(attachment.netns)
        except NetnsError as error:
            raise InvalidNetns(f"CNI_NETNS: {error}") from error
        try:
            self._make_anew(attachment, netns, gateways, last)
        except BaseException:
            self._unbind(attachment.host_ifname)
            raise
        finally:
            os.close(netns)

    def _make_anew(self, attachment: Attachment, netns: int, gateways: Mapping[Network, Address], last: bool) -> None:
        try:
            self._make(attachment, netns, gateways, last)
        except InterfaceExists:
            if not self._delete_killed():
                raise
            self._make(attachment, netns, gateways, last)  # a wire that DEL has killed was in the way

    def _make(self, attachment: Attachment, netns: int, gateways: Mapping[Network, Address], last: bool) -> None:
        if self._guard:
            self._guard.bind(attachment)  # before it can send
        point("add.bound")
        self._make_pair(attachment, netns)
        try:
            point("add.pair-made")
            self._shaper.limit(attachment)
            point("add.limited")
            if last and self._filtered and not attachment.bandwidth:
                self._add_filters_place(attachment.host_ifname)
            self._configure_container(attachment, netns, gateways)
            point("add.pod-configured")
            self._configure_port(attachment)
            point("add.port-configured")
            self._await_carrier(attachment.host_ifname)
        except BaseException:
            self.delete(attachment.host_ifname)
            raise

    def _make_pair(self, attachment: Attachment, netns: int) -> None:
        bridge = index_of(self._bridge)
        if not bridge:
            raise TryAgainLater(f"bridge {self._bridge} is not there yet")
        ifname, mtu = attachment.key.ifname, attachment.mtu
        host = End(ifname=attachment.host_ifname, mac=host_mac(attachment.host_ifname), mtu=mtu)
        pod = End(ifname=ifname, mac=attachment.mac, mtu=mtu)
        with naming(f"wire of {attachment.key}"):
            try:
                self._thread.channel.exchange([make_pair(host, bridge, pod, netns)])
            except FileExistsError as error:
                raise InterfaceExists(
                    f"CNI_IFNAME is {ifname!r}, and {attachment.netns} has an interface of that name already"
                ) from error

    def _add_filters_place(self, host_ifname: str) -> None:
        with suppress(OSError):  # no pod waits for its fast path, which does without the place or says what it lacks
            self._thread.channel.exchange([add_clsact(index_of(host_ifname))])

    def _configure_container(self, attachment: Attachment, netns: int, gateways: Mapping[Network, Address]) -> None:
        ifname = attachment.key.ifname
        if any(interface.version == 6 for interface in attachment.addresses):
            _enable_ipv6(netns, ifname)
        with container_channel(netns, ifname) as (channel, index), naming(f"{attachment.key} in its namespace"):
            with tolerating(errno.EAFNOSUPPORT):  # a kernel without IPv6
                channel.exchange([make_link_local_of_mac(index)])  # what the guard knows the pod by
            addresses = [add_address(index, interface) for interface in attachment.addresses]
            routes = [add_default_route(index, gateways[interface.network]) for interface in attachment.addresses]
            try:
                channel.exchange([*addresses, raise_link(index), *routes])
            except FileExistsError as error:
                if error.filename not in {route.what for route in routes}:
                    raise
                raise InterfaceExists(
                    f"{attachment.netns} has a default route already: Podwire makes a container's first interface, and "
                    "only one"
                ) from error

    def _configure_port(self, attachment: Attachment) -> None:
        with naming(f"bridge port {attachment.host_ifname}"):
            index = index_of(attachment.host_ifname)
            port = set_port(index, alias_of(attachment), FORWARDED_GROUPS)
            with suppress(FileExistsError):  # the second: it has learnt that, or another has the MAC
                self._thread.channel.exchange([port, set_port_mac(index, attachment.mac)])

    def _await_carrier(self, host_ifname: str) -> None:
        """Returns when the host's end sends, and the bridge: until then the pod's first answers would be dropped.

        A link whose other end has just come up gets its transmit queue, and a bridge port its forwarding, from the
        kernel's link watch, a worker that a busy machine lets wait; and so does a bridge whose first port that is.
        Asking for a link settles it at once (kernel 6.9 and later: rtnl_getlink in net/core/rtnetlink.c), the port
        before the bridge; older kernels are waited for.
        """
        deadline = time.monotonic() + _CARRIER_SECONDS
        names = (host_ifname, self._bridge)
        while True:
            last = time.monotonic() > deadline  # before it is asked: this process may be what stood still
            with naming(f"looking at {' and '.join(names)}"):
                links = self._thread.channel.exchange([get_link(index_of(name)) for name in names])
            silent = [name for name, link in zip(names, links, strict=True) if not read_link(link).is_sending]
            if not silent:
                return
            if last:
                raise PlumbingFailed(f"{' and '.join(silent)}: no carrier after {_CARRIER_SECONDS:g} s")
            time.sleep(_CARRIER_POLL)

    # --- another MTU

    def resize(self, attachment: Attachment, mtu: int) -> None:
        """Gives both ends this MTU, in bytes: the pod's first when it shrinks, so that it sends nothing that its other
        end would drop, last when it grows; and its queues. An end that somebody gave another MTU keeps it; one that is
        gone is fine."""
        steps = [self._resize_pods_end, self._resize_hosts_end, self._shaper.resize]
        for resize in steps if mtu < attachment.mtu else reversed(steps):
            resize(attachment, mtu)

    def _resize_hosts_end(self, attachment: Attachment, mtu: int) -> None:
        index = index_of(attachment.host_ifname)
        if index:
            with naming(f"MTU of {attachment.host_ifname}"), tolerating(errno.ENODEV):
                _resize(self._thread.channel, index, attachment.mtu, mtu)

    def _resize_pods_end(self, attachment: Attachment, mtu: int) -> None:
        try:
            netns = open_netns(attachment.netns)
        except NetnsError:
            return  # its wire goes with it
        try:
            with container_channel(netns, attachment.key.ifname) as (channel, index):
                if index:
                    with naming(f"MTU of {attachment.key} in its namespace"), tolerating(errno.ENODEV):
                        _resize(channel, index, attachment.mtu, mtu)
        finally:
            os.close(netns)

    # --- DEL

    def kill(self, host_ifname: str) -> None:
        """Nothing passes the wire any more when this returns; `reap` deletes it. A wire that is gone is fine."""
        self._dying(host_ifname)
        index = index_of(host_ifname)
        steps = [lower_link(index, DOOMED_GROUP)] if index else []
        steps += self._shaper.doom(host_ifname, DOOMED_GROUP)
        if steps:
            with naming(f"taking {host_ifname} down"), tolerating(errno.ENODEV):
                self._thread.channel.exchange(steps)
        self._unbind(host_ifname)

    def cut(self, host_ifname: str) -> None:
        """Nothing passes the wire any more, which stays where it is until its DEL. A wire that is gone is fine."""
        self._dying(host_ifname)
        index = index_of(host_ifname)
        if index:
            with naming(f"cutting {host_ifname}"), tolerating(errno.ENODEV):
                self._thread.host.link("set", index=index, state="down", master=0)

    def reap(self, host_ifnames: Iterable[str]) -> frozenset[str]:
        """Deletes all killed wires at once and returns those of `host_ifnames` that are seen gone."""
        self._delete_killed()
        self._shaper.sweep_chains()  # of those, too, that an ADD in the same namespace has deleted
        return frozenset(name for name in host_ifnames if not index_of(name) and self._shaper.is_gone(name))

    def _delete_killed(self) -> bool:
        """Deletes all killed wires at once. False when there were none."""
        with naming("deleting killed wires"):
            try:
                self._thread.host.link("del", group=DOOMED_GROUP)
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise
                return False
        return True

    def delete(self, host_ifname: str) -> None:
        """Deletes a wire at once, pair and all. A wire that is gone is fine."""
        self._dying(host_ifname)
        index = index_of(host_ifname)
        if index:
            with naming(f"deleting {host_ifname}"), tolerating(errno.ENODEV):
                self._thread.host.link("del", index=index)
        self._shaper.delete(host_ifname)
        self._unbind(host_ifname)

    def _unbind(self, host_ifname: str) -> None:
        if self._guard:
            self._guard.unbind(host_ifname)

    # --- reading back

    def differences(self, attachment: Attachment, netns_path: str, gateways: Mapping[Network, Address]) -> list[str]:
        """What of the wire is not as ADD left it, in words; empty when all is well."""
        found = self._port_differences(self._port(attachment.host_ifname), attachment)
        found += self._shaper.differences(attachment)
        found += self._guard.differences(attachment) if self._guard else []
        return found + self.inside(attachment, netns_path, gateways)

    def inside(self, attachment: Attachment, netns_path: str, gateways: Mapping[Network, Address]) -> list[str]:
        """The same of the wire's end in the pod alone."""
        try:
            netns = open_netns(netns_path)
        except NetnsError as error:
            return [str(error)]
        try:
            with container(netns, attachment.key.ifname) as (route, index):
                if not index:
                    return [f"{netns_path} has no interface {attachment.key.ifname}"]
                return _container_differences(route, index, attachment, gateways)
        finally:
            os.close(netns)

    def limits(self, attachments: Iterable[Attachment]) -> dict[str, tuple[str, ...]]:
        """What is not right of the queues of limited wires, in words, by the name of the host's end."""
        limited = (each for each in attachments if each.bandwidth)
        return {each.host_ifname: tuple(self._shaper.differences(each)) for each in limited}

    def _port(self, host_ifname: str) -> Link | None:
        """The host's end as the kernel has it, None when it is gone."""
        index, answers = index_of(host_ifname), list[bytes]()
        if index:  # and yet a namespace that is being deleted takes its wires with it at any moment
            with naming(f"looking at {host_ifname}"), tolerating(errno.ENODEV):
                answers = self._thread.channel.exchange([get_link(index)])
        return read_link(answers[0]) if answers else None

    def _port_differences(self, link: Link | None, attachment: Attachment) -> list[str]:
        if link is None:
            return [f"{attachment.host_ifname} is gone"]
        found = []
        if link.master != index_of(self._bridge):
            found.append(f"{attachment.host_ifname} is not a port of {self._bridge}")
        elif link.port != _PORT:
            found.append(f"{attachment.host_ifname} is a port of other settings")
        if not link.is_up:
            found.append(f"{attachment.host_ifname} is down")
        return found

    def found(self, now: float) -> tuple[Attachment, ...]:
        """The live wires that the kernel has, as their aliases describe them. For a journal that was lost."""
        with naming("listing links"):
            links = map(read_link, self._thread.channel.dump(list_links()))
        live = (link for link in links if link.alias and link.group != DOOMED_GROUP)
        described = (attachment_of(link.alias, link.name, link.mtu, now) for link in live)
        return tuple(attachment for attachment in described if attachment is not None)

    def recall(self, wire: Attachment) -> Attachment:
        """A wire that was found, with what its alias has no room for: its limits, and the ports that lead to it."""
        there = read_table(self._thread.nftables).elements
        return msgspec.structs.replace(
            wire,
            bandwidth=self._shaper.recall(wire.host_ifname),
            port_mappings=mappings_of(there, wire.addresses),
        )

    def strays(self, known: Iterable[str]) -> tuple[str, ...]:
        """Wires that are gone, are none of `known`, and have left an ifb device."""
        return self._shaper.strays(known)

    def rename(self, host_ifname: str, wanted: str) -> None:
        """Gives a link its name back. Before 6.2 the kernel renames no link that is up."""
        index = index_of(host_ifname)
        with naming(f"renaming {host_ifname} to {wanted}"), tolerating(errno.ENODEV):
            self._thread.host.link("set", index=index, state="down")
            self._thread.host.link("set", index=index, ifname=wanted)
            self._thread.host.link("set", index=index, state=_UP)

    def has(self, attachment: Attachment) -> bool:
        """Whether the wire of this name is there and its alias still says the same."""
        link = self._port(attachment.host_ifname)
        return link is not None and link.group != DOOMED_GROUP and link.alias == alias_of(attachment)

    def mend(self, attachment: Attachment) -> WireState:
        """Puts a wire's port back into the bridge, and up, when somebody took it out, its alias when that was changed,
        and its queues; says what was found."""
        link = self._port(attachment.host_ifname)
        if link is None:
            return WireState.GONE
        if self._guard and not self._guard.is_bound(attachment):
            self._guard.bind(attachment)  # the journal has taken it in
        limited = self._shaper.mend(attachment)
        if link.alias == alias_of(attachment) and not self._port_differences(link, attachment):
            return WireState.MENDED if limited else WireState.FINE
        with naming(f"bridge port {attachment.host_ifname}"):
            self._thread.host.link("set", index=link.index, master=index_of(self._bridge), state=_UP)
        self._configure_port(attachment)
        return WireState.MENDED


def _enable_ipv6(netns: int, ifname: str) -> None:
    """Some runtimes make namespaces in which no interface has IPv6 unless somebody says so (disable_ipv6)."""
    disabled = f"net/ipv6/conf/{ifname}/disable_ipv6"
    with inside(netns):
        if read_sysctl(disabled) == "1":
            write_sysctl(disabled, "0")


def _resize(channel: Channel, index: int, known: int, mtu: int) -> None:
    (link,) = channel.exchange([get_link(index)])
    if read_link(link).mtu == known:
        channel.exchange([set_mtu(index, mtu)])


def _container_differences(
    route: Any, index: int, attachment: Attachment, gateways: Mapping[Network, Address]
) -> list[str]:
    link = route.get_links(index)[0]
    addresses = {f"{each.get('address')}/{each['prefixlen']}" for each in route.get_addr(index=index)}
    defaults = {each.get("gateway") for each in route.get_routes(oif=index) if each["dst_len"] == 0}
    ifname, found = attachment.key.ifname, []
    if link.get("address") != attachment.mac:
        found.append(f"{ifname} has MAC {link.get('address')}, expected {attachment.mac}")
    if link.get("state") != _UP:
        found.append(f"{ifname} is down")
    for interface in attachment.addresses:
        if str(interface) not in addresses:
            found.append(f"{ifname} has lost its address {interface}")
        if str(gateways[interface.network]) not in defaults:
            found.append(f"{ifname} has no default route via {gateways[interface.network]}")
    return found
