"""Who has a place that several Services ask for: pure.

A place is an address or the node, with a port and a protocol; it can lead to one Service only. The API server gives
out ClusterIPs and node ports once, but external IPs are what anybody writes, balancers' addresses what a controller
writes, and manifests in a folder what they are. The rule has no memory, so that every node and every restart decides
alike, whatever order the objects arrive in:

    ClusterIP  before  load balancer  before  external IP        what is allocated goes before what is claimed, so that
                                                                 nobody takes the cluster's DNS over with an externalIP
    then the older Service, then by namespace and name, then the port that comes first in it

A health check's node port is a place like a TCP node port, and yields to one. Whoever has lost keeps all its other
places, is named in `contested`, and gets the place as soon as the winner gives it up. A place costs a dictionary entry;
a change costs the logarithm of how many claim the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import msgspec

from kube_proxy_lite.frontends import Offer
from kube_proxy_lite.model import Frontend, FrontendKind, Protocol

PRECEDENCE = {
    FrontendKind.CLUSTER_IP: 0,
    FrontendKind.NODE_PORT: 0,
    FrontendKind.LOAD_BALANCER: 1,
    FrontendKind.EXTERNAL_IP: 2,
}
HEALTH_PRECEDENCE = 1
NODE = -1
"""In place of an address: any of the node's."""


class Place(msgspec.Struct, frozen=True, gc=False):
    """`address` is a number, or NODE."""

    version: int
    address: int
    port: int
    protocol: str


class Claimant(msgspec.Struct, frozen=True, order=True, gc=False):
    """The least has the place. `wish` is its number in the offer; -1 is the health check."""

    precedence: int
    created: str
    service: tuple[str, str]
    wish: int


def place_of(frontend: Frontend, version: int, protocol: Protocol) -> Place:
    """The place that a frontend takes."""
    number = NODE if frontend.address is None else int(frontend.address)
    return Place(version, number, frontend.port, protocol.value)


def health_places(offer: Offer) -> list[Place]:
    """The places that a Service's health check takes, one a family; empty without one."""
    if not offer.health_port:
        return []
    return [Place(address.version, NODE, offer.health_port, Protocol.TCP.value) for address in offer.cluster_ips]


def claims_of(offer: Offer) -> Iterator[tuple[Place, Claimant]]:
    """All that a Service claims."""
    for index, wish in enumerate(offer.wishes):
        for frontend in wish.frontends:
            place = place_of(frontend, wish.key.version, wish.key.protocol)
            yield place, Claimant(PRECEDENCE[frontend.kind], offer.created, offer.key, index)
    for place in health_places(offer):
        yield place, Claimant(HEALTH_PRECEDENCE, offer.created, offer.key, -1)


class Claims:
    """Every place and its claimants."""

    def __init__(self) -> None:
        self._sole: dict[Place, Claimant] = {}
        self._contested: dict[Place, list[Claimant]] = {}

    def replace(self, old: Offer | None, new: Offer | None) -> set[tuple[str, str]]:
        """Exchange one Service's claims; gives the Services that have gained or lost a place by it."""
        before = set(claims_of(old)) if old else set()
        after = set(claims_of(new)) if new else set()
        touched: set[tuple[str, str]] = set()
        for place, claimant in before - after:
            touched |= self._remove(place, claimant)
        for place, claimant in after - before:
            touched |= self._add(place, claimant)
        return touched

    def winner(self, place: Place) -> tuple[tuple[str, str], int] | None:
        """(service, wish) of the one who has the place."""
        claimants = self._contested.get(place)
        first = claimants[0] if claimants else self._sole.get(place)
        return (first.service, first.wish) if first else None

    def contested(self) -> Iterator[tuple[Place, Claimant, list[Claimant]]]:
        """Places with more than one claimant: place, who has it, who has not."""
        for place, claimants in self._contested.items():
            yield place, claimants[0], claimants[1:]

    def _add(self, place: Place, claimant: Claimant) -> set[tuple[str, str]]:
        claimants = self._contested.get(place)
        if claimants is None:
            sole = self._sole.pop(place, None)
            if sole is None:
                self._sole[place] = claimant
                return {claimant.service}
            claimants = self._contested[place] = [sole]
        first = claimants[0]
        insort(claimants, claimant)
        return {first.service, claimant.service} if claimants[0] is claimant else {claimant.service}

    def _remove(self, place: Place, claimant: Claimant) -> set[tuple[str, str]]:
        claimants = self._contested.get(place)
        if claimants is None:
            del self._sole[place]
            return {claimant.service}
        position = bisect_left(claimants, claimant)
        del claimants[position]
        if len(claimants) == 1:
            del self._contested[place]
            self._sole[place] = claimants[0]
        return {claimant.service, claimants[0].service} if position == 0 else {claimant.service}
