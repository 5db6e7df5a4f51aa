"""The other nodes in the kernel: neighbours and FDB entries on the VXLAN device, and routes.

Order is a contract. What is referred to comes first, and removals go in reverse, so that a route never leads to a VTEP
that is not known yet:

    add       neighbour ─▶ FDB ─▶ route           remove    route ─▶ FDB ─▶ neighbour

Only what differs is sent (podwire/delta.py), in bulk (ipam_daemon/peer_messages.py). Who knows which entries have
changed says so, and then a change costs what it changes, however many peers there are; what the kernel refused stays
pending, and the next `apply` tries it again. What the kernel has is read back at the start and at every periodic
reconcile: whatever somebody deleted is put back, and entries of nodes that left while no daemon ran are removed. Ours
are all entries of our device, and the routes with our protocol number that lead to our device or into `pools` (a
peer on the same segment may be reached over the underlay's device); nothing else is looked at.

5,000 peers are 15,000 entries: 0.2 s to program, 0.1 s to read back and compare. Every function here runs on the
netlink thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Mapping

import msgspec

from ipam_daemon import peer_messages as messages
from ipam_daemon.errors import EntriesRefused, PlumbingFailed
from ipam_daemon.model import Network
from ipam_daemon.netlink import NetlinkThread, index_of
from ipam_daemon.peer_table import Touched
from ipam_daemon.plan import VXLAN, PeersPlan, RoutePlan
from ipam_daemon.rtnl import Message
from podwire.delta import DeltaTracker

_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
_TOLD = 3  # failures that an error names

_Tracker = DeltaTracker[bytes, bytes]


class Peers:
    """What the kernel holds for the other nodes, kept at its plan."""

    def __init__(self, thread: NetlinkThread, device: str = VXLAN, pools: Iterable[Network] = ()) -> None:
        """`pools` are the cluster's: a route of ours into one of them may leave by any device."""
        self._thread = thread
        self._device = device
        self._pools = tuple(pools)
        self._index = 0
        self._neighbours = _Tracker()
        self._fdb = _Tracker()
        self._routes = _Tracker()

    # --- reading

    def resync(self) -> None:
        """Reads back what the kernel has; the next `apply` repairs what differs. Raises PlumbingFailed, OSError."""
        self._index = self._find_device()
        bulk = self._thread.bulk
        self._neighbours.replace_actual(bulk.neighbours(self._index))
        self._fdb.replace_actual(bulk.fdb(self._index))
        self._routes.replace_actual(self._own_routes())

    def read(self) -> PeersPlan:
        """What the kernel has. Raises PlumbingFailed when the device is gone."""
        index, bulk = self._find_device(), self._thread.bulk
        return PeersPlan(
            neighbours={ipaddress.ip_address(key): mac.hex(":") for key, mac in bulk.neighbours(index).items()},
            fdb={mac.hex(":"): ipaddress.ip_address(place) for mac, place in bulk.fdb(index).items()},
            routes={messages.unpack_network(key): _route_of(key, way) for key, way in self._own_routes(index).items()},
        )

    def _own_routes(self, index: int = 0) -> dict[bytes, bytes]:
        index = index or self._index
        return {
            key: way
            for key, way in self._thread.bulk.routes().items()
            if messages.unpack_way(way)[1] == index or self._is_in_pool(key)
        }

    def _is_in_pool(self, key: bytes) -> bool:
        network = messages.unpack_network(key)
        return any(
            network.version == pool.version and network.prefixlen >= pool.prefixlen and network.network_address in pool
            for pool in self._pools
        )

    # --- bringing to the plan

    def apply(self, plan: PeersPlan, touched: Touched | None = None) -> int:
        """Brings the kernel to `plan`. Returns how many entries were changed.

        `touched`: what may differ from the plan that was applied before; None compares everything. Raises
        EntriesRefused that names what the kernel refused, after all others were tried.
        """
        index = self._find_device()
        if index != self._index:  # made anew: what the kernel had of it is gone
            self.resync()
            touched = None
        if touched is None:
            self._desire_all(plan)
        else:
            self._desire(plan, touched)
        failures: list[str] = []
        changed = sum(
            (
                self._update(self._neighbours, self._set_neighbour, _address_name, failures),
                self._update(self._fdb, self._set_fdb, _mac_name, failures),
                self._update_routes(failures),
                self._delete(self._routes, messages.delete_route, _route_name, failures),
                self._delete(self._fdb, lambda mac, _: messages.delete_fdb(index, mac), _mac_name, failures),
                self._delete(
                    self._neighbours,
                    lambda address, _: messages.delete_neighbour(index, address),
                    _address_name,
                    failures,
                ),
            )
        )
        if failures:
            more = f" (and {len(failures) - _TOLD} more)" if len(failures) > _TOLD else ""
            raise EntriesRefused("; ".join(failures[:_TOLD]) + more)
        return changed

    def _desire_all(self, plan: PeersPlan) -> None:
        way_of = _Ways(plan.routes)
        self._neighbours.replace_desired({key.packed: messages.pack_mac(mac) for key, mac in plan.neighbours.items()})
        self._fdb.replace_desired({messages.pack_mac(mac): place.packed for mac, place in plan.fdb.items()})
        self._routes.replace_desired({messages.pack_network(cidr): way_of(cidr) for cidr in plan.routes})

    def _desire(self, plan: PeersPlan, touched: Touched) -> None:
        way_of = _Ways(plan.routes)
        for address in touched.neighbours:
            mac = plan.neighbours.get(address)
            _set(self._neighbours, address.packed, None if mac is None else messages.pack_mac(mac))
        for mac in touched.fdb:
            place = plan.fdb.get(mac)
            _set(self._fdb, messages.pack_mac(mac), None if place is None else place.packed)
        for cidr in touched.routes:
            _set(self._routes, messages.pack_network(cidr), way_of(cidr) if cidr in plan.routes else None)

    # --- sending

    def _set_neighbour(self, address: bytes, mac: bytes) -> _Change:
        return _Change(messages.set_neighbour(self._index, address, mac))

    def _set_fdb(self, mac: bytes, underlay: bytes) -> _Change:
        return _Change(messages.set_fdb(self._index, mac, underlay))

    def _set_route(self, key: bytes, way: bytes) -> _Change:
        gateway, index, onlink = messages.unpack_way(way)
        if not index:
            raise _NotYet("its device is gone")
        if onlink and gateway is not None and gateway.packed not in self._neighbours.actual:
            raise _NotYet(f"its gateway {gateway} has no neighbour entry yet")
        return _Change(messages.set_route(key, way, there=key in self._routes.actual))

    def _set_route_again(self, key: bytes, way: bytes) -> _Change:
        change, (gateway, _, onlink) = self._set_route(key, way), messages.unpack_way(way)
        if not onlink or gateway is None or gateway.version == 4:
            return change
        before, after = messages.reach_gateway(way)
        return _Change(change.message, before=(before,), after=(after,))

    def _update_routes(self, failures: list[str]) -> int:
        """Those whose VTEP the kernel does not know yet stay pending."""
        refused: list[str] = []
        changed = self._update(self._routes, self._set_route, _route_name, refused)
        if refused:
            refused.clear()
            changed += self._update(self._routes, self._set_route_again, _route_name, refused)
        failures += refused
        return changed

    def _update(
        self,
        tracker: _Tracker,
        change_of: Callable[[bytes, bytes], _Change],
        name: Callable[[bytes], str],
        failures: list[str],
    ) -> int:
        """Sends what is to be added or changed, and confirms what the kernel did not refuse."""
        sent: list[Message] = []
        places: dict[int, tuple[bytes, bytes]] = {}
        for key, value in tracker.pending_updates():
            try:
                change = change_of(key, value)
            except _NotYet as reason:
                failures.append(f"{name(key)}: {reason}")
                continue
            sent += change.before
            places[len(sent)] = (key, value)
            sent += (change.message, *change.after)
        failed = self._thread.bulk.carry_out(sent) if sent else {}
        for place, (key, value) in places.items():
            if place in failed:
                failures.append(_told(name(key), failed[place]))
            else:
                tracker.set_actual(key, value)
        return sum(place not in failed for place in places)

    def _delete(
        self,
        tracker: _Tracker,
        message_of: Callable[[bytes, bytes], Message],
        name: Callable[[bytes], str],
        failures: list[str],
    ) -> int:
        keys = tracker.pending_deletions()
        failed = self._thread.bulk.carry_out([message_of(key, tracker.actual[key]) for key in keys]) if keys else {}
        for place, key in enumerate(keys):
            if failed.get(place) in (None, *_GONE):
                tracker.drop_actual(key)
            else:
                failures.append(_told(name(key), failed[place]))
        return len(keys) - sum(code not in _GONE for code in failed.values())

    def _find_device(self) -> int:
        index = index_of(self._device)
        if not index:
            raise PlumbingFailed(f"{self._device} is gone")
        return index


class _Change(msgspec.Struct, frozen=True):
    """The message that makes an entry, with what goes before and after it, which may fail."""

    message: Message
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()


class _NotYet(Exception):
    """Why an entry cannot be sent now."""


class _Ways:
    """Values of routes; the index of a device is looked up once."""

    def __init__(self, routes: Mapping[Network, RoutePlan]) -> None:
        self._routes = routes
        self._indexes: dict[str, int] = {}

    def __call__(self, cidr: Network) -> bytes:
        route = self._routes[cidr]
        index = self._indexes.get(route.device)
        if index is None:
            index = self._indexes[route.device] = index_of(route.device)
        return messages.pack_way(route.gateway, index, route.onlink)


def _set(tracker: _Tracker, key: bytes, value: bytes | None) -> None:
    if value is None:
        tracker.drop_desired(key)
    else:
        tracker.set_desired(key, value)


def _route_of(key: bytes, way: bytes) -> RoutePlan:
    gateway, index, onlink = messages.unpack_way(way)
    unspecified = ipaddress.ip_address(bytes(len(key) - 1))
    return RoutePlan(gateway=gateway or unspecified, device=_name_of(index), onlink=onlink)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def _told(what: str, code: int) -> str:
    if code == errno.EEXIST:
        return f"{what}: there is one already that is somebody else's"
    return f"{what}: {errno.errorcode.get(code, code)}: {os.strerror(code)}"


def _address_name(key: bytes) -> str:
    return f"neighbour {ipaddress.ip_address(key)}"


def _mac_name(key: bytes) -> str:
    return f"FDB entry {key.hex(':')}"


def _route_name(key: bytes) -> str:
    return f"route {messages.unpack_network(key)}"
