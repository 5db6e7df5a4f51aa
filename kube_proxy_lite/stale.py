"""Which connections lead to nowhere, because the rules that made them are no more: pure.

The kernel remembers for every connection where its first packet was sent, and sends the others after it, whatever the
rules say by then. A client of UDP that goes on sending keeps such an entry alive for ever: 13 hours of DNS queries into
the void have been reported of a proxy that missed one case. So after changes, and once after the start, the connections
to a Service's places are looked at, and what is judged stale is deleted; the next packet is judged by the rules.

    connection to a place that …                     UDP                        TCP, SCTP
    a Service has, translated to an endpoint         stale if that endpoint     stale if that endpoint is gone, from
                                                     does not serve             every slice, not if it terminates
    a Service has, with backends, not translated     stale: it was there        the same, if it was never answered
                                                     before the Service's rules
    was a Service's and is no more, translated       stale                      left alone

A TCP connection to a pod that terminates is being closed by both ends in order, and cutting it would break what
graceful termination is for. One that is answered without us goes to whoever has the address really, as a balancer's
may be. Connections to other places are nobody's business here; but UDP that was translated from an address of the
service CIDRs, where no Service is, was a Service's before we were started.

What is to be looked at is noted by place, and what is noted stays until the look has succeeded. A look costs a dump of
the kernel's table (a million entries: seconds; in a thread) and is made only when something was lost or is new: an
endpoint that joins asks for none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import msgspec

from kube_proxy_lite.claims import NODE, Place, place_of
from kube_proxy_lite.model import Address, Network, PortKey, PortPlan, Protocol

Endpoints = Callable[[PortKey, bool], Collection[tuple[Address, int]]]
"""The endpoints that a port's slices list, whatever their conditions; with True those that serve."""
LookedAt = tuple[bool, frozenset[Place]]
"""What a look looks at: everything, or these places."""


class Connection(msgspec.Struct, frozen=True, gc=False):
    """An entry of conntrack: who began it, where it was sent to, and who answers. Addresses are numbers.

    `handle` is what the kernel needs to know to find it again; `answered` whether the other end ever said something.
    """

    version: int
    protocol: str
    source: int
    destination: int
    port: int
    endpoint: int
    endpoint_port: int
    handle: bytes
    answered: bool = True

    @property
    def translated(self) -> bool:
        """Whether somebody else answers than was asked."""
        return (self.destination, self.port) != (self.endpoint, self.endpoint_port)


class StaleConnections:
    """Judges connections by the plans as they are now."""

    def __init__(self) -> None:
        self._places: dict[Place, PortPlan] = {}
        self._doubtful: set[Place] = set()
        self._all = True

    @property
    def in_doubt(self) -> bool:
        """Whether a look is needed."""
        return self._all or bool(self._doubtful)

    def doubt_all(self) -> None:
        """Whatever happened, the connections to every place are to be looked at."""
        self._all = True

    def doubt(self, plan: PortPlan) -> None:
        """The endpoints of `plan` have changed in a way that the plan does not show."""
        self._doubtful |= {_place(plan, index) for index in range(len(plan.frontends))}

    def take(self, before: PortPlan | None, now: PortPlan | None) -> None:
        """A plan has changed: notes whose connections are to be looked at."""
        old = {_place(before, index) for index in range(len(before.frontends))} if before else set()
        new = {_place(now, index) for index in range(len(now.frontends))} if now else set()
        for place in old - new:
            if self._places.get(place) is before:
                del self._places[place]
        if now is not None:
            self._places.update(dict.fromkeys(new, now))
        if not before or not now or not (before.cluster or before.local) or _has_lost(before, now):
            self._doubtful |= old | new
        else:
            self._doubtful |= old ^ new

    def begin(self) -> LookedAt:
        """What a look is to look at. From here on doubts are for the next look."""
        looked_at = self._all, frozenset(self._doubtful)
        self._all, self._doubtful = False, set()
        return looked_at

    def again(self, looked_at: LookedAt) -> None:
        """The look has failed."""
        self._all = self._all or looked_at[0]
        self._doubtful |= looked_at[1]

    def stale(
        self,
        connections: Iterable[Connection],
        looked_at: LookedAt,
        own: Collection[int],
        endpoints: Endpoints,
        service_cidrs: Iterable[Network] = (),
    ) -> list[Connection]:
        """Those of `connections` that are stale. `own` are the node's addresses that NodePorts answer on, as numbers.
        May be called in any thread."""
        everything, places = looked_at
        known: dict[PortKey, frozenset[object]] = {}
        ranges = [(each.version, int(each[0]), int(each[-1])) for each in service_cidrs] if everything else []
        found = []
        for each in connections:
            place = self._place_of(each, own)
            if not everything and place not in places:
                continue
            plan = self._places.get(place)
            if plan is None:
                was_ours = not everything or _is_in(each, ranges)
                is_stale = was_ours and each.translated and each.protocol == Protocol.UDP
            elif each.translated:
                is_udp = each.protocol == Protocol.UDP
                place_there = (each.endpoint, each.endpoint_port) if is_udp else each.endpoint
                is_stale = place_there not in _kept(plan, endpoints, known)
            else:
                is_stale = bool(plan.cluster or plan.local) and (each.protocol == Protocol.UDP or not each.answered)
            if is_stale:
                found.append(each)
        return found

    def _place_of(self, connection: Connection, own: Collection[int]) -> Place:
        place = Place(connection.version, connection.destination, connection.port, connection.protocol)
        if place not in self._places and connection.destination in own:
            return Place(connection.version, NODE, connection.port, connection.protocol)
        return place


def _has_lost(before: PortPlan, now: PortPlan) -> bool:
    """Whether connections may have lost their endpoint. Those of TCP have not before the slices have, too (`doubt`)."""
    if now.key.protocol is not Protocol.UDP:
        return False
    were, are = {*before.cluster, *before.local}, {*now.cluster, *now.local}
    return not {(each.address, each.port) for each in were} <= {(each.address, each.port) for each in are}


def _kept(plan: PortPlan, endpoints: Endpoints, known: dict[PortKey, frozenset[object]]) -> Collection[object]:
    """Where connections of this plan may lead: UDP to address and port, the others to any port of an address, since
    a Service that has another target port now does not end what goes on at the former one."""
    if plan.key not in known:
        is_udp = plan.key.protocol is Protocol.UDP
        both = {(each.address, each.port) for each in (*plan.cluster, *plan.local)} | {*endpoints(plan.key, is_udp)}
        known[plan.key] = frozenset((int(address), port) if is_udp else int(address) for address, port in both)
    return known[plan.key]


def _is_in(connection: Connection, ranges: Iterable[tuple[int, int, int]]) -> bool:
    return any(version == connection.version and low <= connection.destination <= high for version, low, high in ranges)


def _place(plan: PortPlan, index: int) -> Place:
    return place_of(plan.frontends[index], plan.key.version, plan.key.protocol)
