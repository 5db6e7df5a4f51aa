"""The other nodes in the kernel: neighbours, FDB entries and routes on the VXLAN device.

Order is a contract. What is referred to comes first, and removals go in reverse, so that a route never leads to a VTEP
that is not known yet:

    add       neighbour ─▶ FDB ─▶ route           remove    route ─▶ FDB ─▶ neighbour

Only what differs is sent (podwire/delta.py). What the kernel has is read back at the start and at every periodic
reconcile: whatever somebody deleted is put back, and entries of nodes that left while no daemon ran are removed. Ours
are all entries of our device, and the routes with our protocol number; nothing else is looked at.

Every function here runs on the netlink thread.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.model import Address, Network
from ipam_daemon.netlink import NetlinkThread, index_of, naming, tolerating
from ipam_daemon.plan import VXLAN, PeersPlan, RoutePlan
from podwire.delta import DeltaTracker

ROUTE_PROTOCOL = 80
"""rtm_protocol of our routes (rtnetlink(7)); `ip route show proto 80` lists them. Not in iproute2's rt_protos."""
_PERMANENT = 0x80  # NUD_PERMANENT
_SELF = 0x02  # NTF_SELF
_ONLINK = 0x04  # RTNH_F_ONLINK

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Peers:
    """What the kernel holds for the other nodes, kept at its plan."""

    def __init__(self, thread: NetlinkThread, device: str = VXLAN) -> None:
        self._thread = thread
        self._device = device
        self._neighbours: DeltaTracker[Address, str] = DeltaTracker()
        self._fdb: DeltaTracker[str, Address] = DeltaTracker()
        self._routes: DeltaTracker[Network, RoutePlan] = DeltaTracker()

    def resync(self) -> None:
        """Reads back what the kernel has; the next `apply` repairs what differs."""
        actual = self.read()
        self._neighbours.replace_actual(actual.neighbours)
        self._fdb.replace_actual(actual.fdb)
        self._routes.replace_actual(actual.routes)

    def read(self) -> PeersPlan:
        """What the kernel has. Raises PlumbingFailed when the device is gone."""
        index = self._index()
        host = self._thread.host
        return PeersPlan(
            neighbours={
                ipaddress.ip_address(each.get("dst")): each.get("lladdr")
                for family in (socket.AF_INET, socket.AF_INET6)
                for each in host.get_neighbours(ifindex=index, family=family)
                if each["state"] & _PERMANENT and each.get("dst") and each.get("lladdr")
            },
            fdb={
                each.get("lladdr"): ipaddress.ip_address(each.get("dst"))
                for each in host.fdb("dump", ifindex=index)
                if each["ifindex"] == index and each.get("dst") and each.get("lladdr")
            },
            routes={
                ipaddress.ip_network(f"{each.get('dst')}/{each['dst_len']}"): _route_of(each)
                for family in (socket.AF_INET, socket.AF_INET6)
                for each in host.get_routes(family=family, proto=ROUTE_PROTOCOL)
                if each["proto"] == ROUTE_PROTOCOL and each.get("oif") == index and each.get("dst")
            },
        )

    def apply(self, plan: PeersPlan) -> int:
        """Brings the kernel to `plan`. Returns how many entries were changed.

        Raises PlumbingFailed for the first entry that the kernel refused, after all others were tried.
        """
        self._neighbours.replace_desired(plan.neighbours)
        self._fdb.replace_desired(plan.fdb)
        self._routes.replace_desired(plan.routes)
        index = self._index()
        host = self._thread.host
        failures: list[PlumbingFailed] = []

        def set_neighbour(address: Address, mac: str) -> None:
            host.neigh("replace", ifindex=index, dst=str(address), lladdr=mac, state=_PERMANENT)

        def set_fdb(mac: str, underlay: Address) -> None:
            host.fdb("replace", ifindex=index, lladdr=mac, dst=str(underlay), state=_PERMANENT, flags=_SELF)

        def set_route(cidr: Network, route: RoutePlan) -> None:
            if route.gateway not in self._neighbours.actual:
                raise PlumbingFailed(f"route {cidr}: its gateway {route.gateway} has no neighbour entry yet")
            host.route(
                "replace", dst=str(cidr), gateway=str(route.gateway), oif=index, flags=_ONLINK, proto=ROUTE_PROTOCOL
            )

        changed = _update(self._neighbours, "neighbour", set_neighbour, failures)
        changed += _update(self._fdb, "FDB entry", set_fdb, failures)
        changed += _update(self._routes, "route", set_route, failures)
        changed += _delete(
            self._routes,
            "route",
            lambda cidr: host.route("del", dst=str(cidr), oif=index, proto=ROUTE_PROTOCOL),
            failures,
        )
        changed += _delete(self._fdb, "FDB entry", lambda mac: self._delete_fdb(index, mac), failures)
        changed += _delete(
            self._neighbours,
            "neighbour",
            lambda address: host.neigh("del", ifindex=index, dst=str(address)),
            failures,
        )
        if failures:
            raise failures[0]
        return changed

    def _delete_fdb(self, index: int, mac: str) -> None:
        for each in self._thread.host.fdb("dump", ifindex=index):
            if each["ifindex"] == index and each.get("lladdr") == mac:
                self._thread.host.fdb("del", ifindex=index, lladdr=mac, dst=each.get("dst"), flags=_SELF)

    def _index(self) -> int:
        index = index_of(self._device)
        if not index:
            raise PlumbingFailed(f"{self._device} is gone")
        return index


def _update(
    tracker: DeltaTracker[K, V], what: str, send: Callable[[K, V], None], failures: list[PlumbingFailed]
) -> int:
    changed = 0
    for key, value in tracker.pending_updates():
        try:
            with naming(f"{what} {key}"):
                send(key, value)
        except PlumbingFailed as error:
            failures.append(error)
            continue
        tracker.set_actual(key, value)
        changed += 1
    return changed


def _delete(tracker: DeltaTracker[K, V], what: str, send: Callable[[K], object], failures: list[PlumbingFailed]) -> int:
    changed = 0
    for key in tracker.pending_deletions():
        try:
            with naming(f"{what} {key}"), tolerating(errno.ENOENT, errno.ESRCH, errno.ENODEV):
                send(key)
        except PlumbingFailed as error:
            failures.append(error)
            continue
        tracker.drop_actual(key)
        changed += 1
    return changed


def _route_of(message: Any) -> RoutePlan:
    gateway = message.get("gateway")
    return RoutePlan(gateway=ipaddress.ip_address(gateway if gateway else "0.0.0.0"), device=VXLAN)
