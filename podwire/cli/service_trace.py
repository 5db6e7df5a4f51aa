"""What becomes of a new connection, hop by hop, from a pod, a node or outside to an address and port. Pure.

    origin ─▶ where it enters ─▶ the node's proxy: which place, which verdict, which endpoints ─▶ (another node) ─▶ end

It says what the model says (kube_proxy_lite.model.decide), which is what the rules are rendered from; `expectations` is
what the node's kernel must then hold, element by element, so that whoever can read the kernel compares. NetworkPolicy
is not judged here.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from kube_proxy_lite.model import (
    Address,
    Backend,
    Frontend,
    FrontendKind,
    PortPlan,
    Protocol,
    Settings,
    Source,
    Verdict,
    decide,
    is_allowed,
)
from kube_proxy_lite.render.nftables_elements import Elements, contribute, place_plan, place_text
from kube_proxy_lite.render.nftables_layout import WORDS
from kube_proxy_lite.services import Services
from podwire.cli.service_view import Cluster
from podwire.errors import PodwireError

KINDS = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.NODE_PORT: "NodePort",
    FrontendKind.EXTERNAL_IP: "external IP",
    FrontendKind.LOAD_BALANCER: "load balancer's address",
}
_SLOTS_COMPARED = 20


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Who connects. `node` is where its packets meet a proxy first; empty for one from outside."""

    name: str
    source: Source
    address: Address
    node: str = ""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is connected to."""

    address: Address
    port: int
    protocol: Protocol = Protocol.TCP

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}/{self.protocol}"


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """An element that the kernel of the hop's node must hold: a table, a map, a key, and the value."""

    table: str
    map: str
    key: str
    value: str


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """A step: where, what happens, and more about it. `expects`: elements; `slots`: endpoints in any order."""

    at: str
    what: str
    more: tuple[str, ...] = ()
    expects: tuple[Expectation, ...] = ()
    slots: tuple[Expectation, ...] = ()


def trace(cluster: Cluster, origin: Origin, target: Target) -> list[Hop]:
    """The way of a connection. From outside to a load balancer's address it may enter at several nodes."""
    if origin.address.version != target.address.version:
        raise PodwireError(f"{origin.name} has {origin.address}, and {target} is of the other family")
    if origin.node:
        return list(_at_node(cluster, origin.node, origin, target))
    return list(_from_outside(cluster, origin, target))


def _from_outside(cluster: Cluster, origin: Origin, target: Target) -> Iterator[Hop]:
    node = cluster.node_at(target.address)
    if node:
        yield from _at_node(cluster, node, origin, target)
        return
    if not any(str(target.address) in _ingress(service) for service in cluster.services):
        what = "there is no way into the cluster for this address: it is no node's and no load balancer's"
        yield Hop(at=origin.name, what=f"{what}{_named(cluster, target.address)}")
        return
    takers = [node.metadata.name for node in cluster.nodes if _takes(cluster, node.metadata.name, target)]
    if not takers:
        yield Hop(at="balancer", what="no node answers its health check: unreachable")
        return
    yield Hop(at="balancer", what=f"one of {', '.join(takers)}, whose health checks pass, with both addresses kept")
    for taker in takers:
        yield from _at_node(cluster, taker, origin, target)


def _takes(cluster: Cluster, node: str, target: Target) -> bool:
    """Whether a balancer sends to the node; that its proxy is alive is taken for granted."""
    seen = cluster.seen_by(node)
    found = find_frontend(seen, target)
    if found is None:
        return True
    health = seen.health((found[0].key.namespace, found[0].key.service))
    return health is None or health.ready > 0


def _ingress(service: object) -> set[str]:
    ingress = service.status.load_balancer.ingress or ()  # type: ignore[attr-defined]
    return {each.ip for each in ingress}


# --- at a node --------------------------------------------------------------------------------------------------


def find_frontend(seen: Services, target: Target) -> tuple[PortPlan, Frontend] | None:
    """The place of a Service that the target is, on the node whose view `seen` is."""
    for plan in seen.plans():
        if plan.key.protocol is not target.protocol or plan.key.version != target.address.version:
            continue
        for frontend in plan.frontends:
            here = frontend.address == target.address or (
                frontend.address is None and _answers_node_ports(seen, target.address)
            )
            if here and frontend.port == target.port:
                return plan, frontend
    return None


def _answers_node_ports(seen: Services, address: Address) -> bool:
    networks = seen.settings.node_port_addresses
    return address in seen.node_addresses and (not networks or any(address in network for network in networks))


def _at_node(cluster: Cluster, node: str, origin: Origin, target: Target) -> Iterator[Hop]:
    seen = cluster.seen_by(node)
    found = find_frontend(seen, target)
    if found is None:
        yield from _past_services(cluster, seen, node, origin, target)
        return
    plan, frontend = found
    what = f"{KINDS[frontend.kind]} of {plan.key}"
    if not is_allowed(frontend, origin.address):
        ranges = ", ".join(map(str, frontend.source_ranges))
        yield Hop(at=node, what=f"{what}: dropped, since it is open to {ranges} alone")
        return
    settings = seen.settings
    decision = decide(plan, frontend, origin.source, settings)
    expects, slots = expectations(plan, frontend, origin.source, settings)
    if decision.verdict is not Verdict.FORWARD:
        refused = decision.verdict is Verdict.REFUSE
        why = "refused: it has no endpoints" if refused else f"dropped: it is Local, and {node} has no endpoint"
        yield Hop(at=node, what=f"{what}: {why}", expects=expects)
        return
    count = len(decision.backends)
    words = ["to its only endpoint" if count == 1 else f"to one of {count} endpoints"]
    if plan.affinity:
        words.append(f"a client keeps its own for {plan.affinity} s")
    words.append(f"seen as {f'an address of {node}' if decision.masquerade else origin.address}")
    if not decision.masquerade and any(backend.address == origin.address for backend in decision.backends):
        words.append(f"by itself as an address of {node}")
    backends = tuple(_backend_words(cluster, backend) for backend in decision.backends)
    yield Hop(at=node, what=f"{what}: {', '.join(words)}", more=backends, expects=expects, slots=slots)


def _past_services(cluster: Cluster, seen: Services, node: str, origin: Origin, target: Target) -> Iterator[Hop]:
    if target.address in seen.cluster_ips:
        word = "refused" if cluster.mode == "nftables" else "dropped"  # iptables mode knows of networks alone
        yield Hop(at=node, what=f"{word}: the Service of {target.address} has no port {target.port}/{target.protocol}")
        return
    if any(target.address in network for network in seen.service_cidrs):
        yield Hop(at=node, what=f"dropped: no Service has {target.address}, which is of the Services' network")
        return
    other = cluster.node_at(target.address)
    if other in ("", node):
        yield Hop(at=node, what=f"no Service: goes on to {target}{_named(cluster, target.address)}")
        return
    own = _own_address(cluster, node, target.address.version)
    masked = origin.source is Source.POD and own is not None
    client = own if masked and own is not None else origin.address
    yield Hop(at=node, what=f"no Service here: goes on to {other}, seen as {client}")
    there = msgspec.structs.replace(origin, source=Source.EXTERNAL, address=client, node=other)
    if find_frontend(cluster.seen_by(other), target) is None:
        yield Hop(at=other, what=f"no Service: whoever listens on {target} there")
        return
    yield from _at_node(cluster, other, there, target)


def _own_address(cluster: Cluster, node: str, version: int) -> Address | None:
    addresses = cluster.seen_by(node).node_addresses
    return next((each for each in addresses if each.version == version), None)


def _backend_words(cluster: Cluster, backend: Backend) -> str:
    host = f"[{backend.address}]" if backend.address.version == 6 else str(backend.address)
    return f"{host}:{backend.port}{_named(cluster, backend.address)}"


def _named(cluster: Cluster, address: Address) -> str:
    place = cluster.place_of(address)
    return f"   {place}" if place else ""


# --- the kernel -------------------------------------------------------------------------------------------------


def expectations(
    plan: PortPlan, frontend: Frontend, source: Source, settings: Settings
) -> tuple[tuple[Expectation, ...], tuple[Expectation, ...]]:
    """What the maps of the nftables mode must hold for a place: its verdict, and its endpoints in some order."""
    table, place = WORDS[plan.key.version].table, place_text(frontend, plan)
    elements = Elements()
    contribute(place_plan(plan), settings, elements)
    base = "nodeports" if frontend.address is None else "services"
    name = base
    if source is Source.EXTERNAL and (f"{base}_external", place) in elements.own:
        name = f"{base}_external"
    verdict = elements.own[name, place]
    expected = (Expectation(table=table, map=name, key=place, value=verdict),)
    local = "_local_" in verdict
    slots = [
        Expectation(table=table, map=map_name, key=f"{key} . {slot}", value=value)
        for (map_name, key), values in elements.slots.items()
        if ("_local_" in map_name) == local and key in (str(frontend.port), f"{frontend.address} . {frontend.port}")
        for slot, value in enumerate(values[:_SLOTS_COMPARED])
    ]
    return expected, tuple(slots) if verdict.startswith("goto ") and verdict != "goto refuse" else ()
