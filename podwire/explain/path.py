"""The whole way of a connection, hop by hop, in the order in which its first packet meets them. Pure.

    the ends · interface · wire · Service ─▶ egress policy · route · tunnel · underlay · the other node · ingress policy
             · interface · wire · listener · the way back

Of a Service's endpoints each is gone to, until one fails; the hops are those to that one, or to the first. A node port
of another node is translated there; from then on the connection is that node's, and only its ends are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ipam_daemon.plan import BRIDGE, VXLAN
from kube_proxy_lite.model import Address, Backend, FrontendKind, Protocol, Source, Verdict
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import Flow
from podwire.explain import ends, way
from podwire.explain.cluster import Cluster, NoSuchPlace, Place, PlaceKind, PortWish, Translation
from podwire.explain.enforcement import side
from podwire.explain.hops import Ask, Finding, Hop, NodeFacts, State, Steps, Where, fails, ok, warns
from podwire.explain.translation import service
from podwire.explain.verdict import kind_of, trouble_of

_ENDPOINTS = 8
"""So many endpoints of a Service are gone to."""


class Path(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `end` is whom the hops lead to, in words; `also` are endpoints that were found in order."""

    source: Place
    target: Place
    protocol: str
    port: int
    hops: tuple[Hop, ...]
    end: str = ""
    also: tuple[str, ...] = ()

    def first(self, state: State) -> tuple[int, Hop, Finding] | None:
        """The first finding of that state, with its hop and the hop's number from 1."""
        for number, hop in enumerate(self.hops, start=1):
            for finding in hop.findings:
                if finding.state is state:
                    return number, hop, finding
        return None


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """What all hops need to know."""

    cluster: Cluster
    nodes: Mapping[str, NodeFacts]
    source: Place
    own: Address
    mtu: int = 0
    masqueraded: bool = False

    def node(self, name: str) -> NodeFacts:
        return self.nodes.get(name) or NodeFacts(name=name)


def walk(cluster: Cluster, nodes: Mapping[str, NodeFacts], source: Place, target: Place, wish: PortWish) -> Steps[Path]:
    """Goes the whole way. Raises NoSuchPlace for ports and families that there are not."""
    hop = _ends(cluster, nodes, source, target)
    if hop.state is State.FAILS:
        protocol = wish.protocol or "TCP"
        return Path(source=source, target=target, protocol=protocol, port=wish.number, hops=(hop,))
    own, protocol, port, made = _question(cluster, source, target, wish)
    hops = [hop]
    first = made.address if made and made.address else (target.of(own.version) or own)
    journey = _Way(cluster=cluster, nodes=nodes, source=source, own=own)
    if not source.on_host:
        where = Where(source.node, source.key)
        if made and made.headless and made.decision.backends:
            first = made.decision.backends[0].address
        found, link = yield from ends.interface("source pod", where, own, first)
        hops += [found, (yield from ends.wire(where, link, own))]
        journey = msgspec.structs.replace(journey, mtu=link.mtu if link else 0)
    if made is None:
        hops += yield from _flow(journey, first, protocol, port)
        return Path(source=source, target=target, protocol=protocol, port=port, hops=tuple(hops))
    elsewhere = _elsewhere(journey, made)
    if elsewhere:
        rest = yield from _by_node_port(journey, made, elsewhere, protocol)
        return Path(source=source, target=target, protocol=protocol, port=port, hops=(*hops, *rest))
    hops.append((yield from service(cluster, source.node, made, own)))
    rest, end, also = yield from _endpoints(journey, made, protocol)
    return Path(
        source=source, target=target, protocol=protocol, port=port, hops=(*hops, *rest), end=end, also=tuple(also)
    )


def _ends(cluster: Cluster, nodes: Mapping[str, NodeFacts], source: Place, target: Place) -> Hop:
    """Whether both ends are there at all."""
    findings: list[Finding] = []
    here = nodes.get(source.node)
    if here is not None and here.trouble:
        findings.append(way.daemon(here))
    for place in (source, target):
        if place.kind is not PlaceKind.POD:
            continue
        pod = cluster.pod(place.key)
        phase = (pod.status.phase if pod else "") or "Pending"
        facts = nodes.get(place.node) or NodeFacts(name=place.node)
        if place.addresses and phase == "Running":
            where = f"pod {place.name} runs on {place.node}, and has {', '.join(map(str, place.addresses))}"
            findings.append(ok(where))
            continue
        why = f"pod {place.name} is {phase}" + ("" if place.addresses else ", and has no address")
        if not place.node:
            findings.append(fails(f"{why}: no node was chosen for it", "see `kubectl describe pod`"))
        elif facts.trouble:
            text = f"{why}: the daemon of {place.node}, which would give it one, does not answer ({facts.trouble})"
            findings.append(fails(text, f"start podwire-ipamd on {place.node}; its log says why it ended"))
        else:
            findings.append(fails(why, "wait until it runs, or look at its events and its log"))
    return Hop(title="the ends", where="", findings=tuple(findings))


def _question(
    cluster: Cluster, source: Place, target: Place, wish: PortWish
) -> tuple[Address, Protocol, int, Translation | None]:
    """The source's address, the protocol, the port, and what a Service makes of it, if there is one."""
    if target.kind is PlaceKind.SERVICE:
        found = cluster.translate_service(target, wish, source, kind_of(source))
        served = [each for each in found if each.decision.verdict is Verdict.FORWARD] or found
        if not served:
            raise NoSuchPlace(f"Service {target.name}: {trouble_of(target, ())}")
        made = served[0]
        version = made.address.version if made.address else source.addresses[0].version
        if made.headless and made.decision.backends:
            version = made.decision.backends[0].address.version
        protocol = made.plan.key.protocol if made.plan else Protocol(wish.protocol or "TCP")
        own = source.of(version)
        assert own is not None, "translations are of families that the source has"
        return own, protocol, made.port, made
    protocol, port = cluster.port_of(target, wish)
    for there in target.addresses:
        own = source.of(there.version)
        if own is not None:
            return own, protocol, port, cluster.translate(there, protocol, port, own, kind_of(source))
    raise NoSuchPlace(f"{source} and {target} have no family in common")


def _endpoints(journey: _Way, made: Translation, protocol: Protocol) -> Steps[tuple[list[Hop], str, list[str]]]:
    """The hops to the first endpoint that fails, else to the first; and the endpoints that are in order besides."""
    first: tuple[list[Hop], str] | None = None
    good: list[str] = []
    journey = msgspec.structs.replace(journey, masqueraded=made.decision.masquerade)
    for backend in made.decision.backends[:_ENDPOINTS]:
        hops = yield from _flow(journey, backend.address, protocol, backend.port)
        name = _called(journey.cluster, backend)
        if any(hop.state is State.FAILS for hop in hops):
            return hops, name, good
        first = first or (hops, name)
        good.append(name)
    return (*first, [each for each in good if each != first[1]]) if first else ([], "", [])


def _elsewhere(journey: _Way, made: Translation) -> str:
    """The other node that translates the connection: a node port is one of the node whose address it is asked at."""
    if made.address is None or made.frontend is None or made.frontend.kind is not FrontendKind.NODE_PORT:
        return ""
    name = journey.cluster.node_addresses.get(made.address, "")
    return "" if name == journey.source.node else name


def _by_node_port(journey: _Way, made: Translation, name: str, protocol: Protocol) -> Steps[list[Hop]]:
    """To a port of another node: out with this node's address, translated there, and from there on the other's."""
    cluster, source, there = journey.cluster, journey.source, made.address
    assert there is not None
    flow = Flow(source=journey.own, destination=there, protocol=protocol, port=made.port)
    judged = judge(cluster.policies, flow, cluster.node_addresses)
    hops = [] if source.on_host else [(yield from side(cluster, flow, judged.egress))]
    found, _ = yield from way.leave(source.node, journey.own, there, journey.node(name), own=source.on_host, way="out")
    hops.append(found)
    if not source.on_host:
        hops.append((yield from way.masquerade(source.node, journey.own, there, name)))
    client = next((each for each in journey.node(source.node).addresses if each.version == there.version), journey.own)
    seen = Cluster(cluster.objects, name)
    seen.node_addresses = cluster.node_addresses
    again = seen.translate(there, protocol, made.port, client, Source.EXTERNAL) or made
    hops.append((yield from service(seen, name, again, client)))
    for backend in again.decision.backends[:_ENDPOINTS]:
        as_whom = there if again.decision.masquerade else client
        onward = Flow(source=as_whom, destination=backend.address, protocol=protocol, port=backend.port)
        ruling = judge(cluster.policies, onward, cluster.node_addresses).ingress
        hops.append((yield from side(cluster, onward, ruling)))
        owner = cluster.policies.owner(backend.address)
        if owner is not None:
            where = Where(owner.node, (owner.namespace, owner.name))
            called = f"{owner.namespace}/{owner.name}"
            hops.append((yield from ends.listener(where, backend.address, protocol, backend.port, called)))
    return hops


def _called(cluster: Cluster, backend: Backend) -> str:
    owner = cluster.policies.owner(backend.address)
    return f"{owner.namespace}/{owner.name} ({backend.address})" if owner else str(backend.address)


# --- from address to address --------------------------------------------------------------------------------------


def _flow(journey: _Way, there: Address, protocol: Protocol, port: int) -> Steps[list[Hop]]:
    """From the source to an address that no Service translates any more."""
    cluster, source = journey.cluster, journey.source
    sent = Flow(source=journey.own, destination=there, protocol=protocol, port=port)
    flow = msgspec.structs.replace(sent, source=_seen_as(journey, there))
    egress = judge(cluster.policies, sent, cluster.node_addresses).egress
    owner = cluster.policies.owner(there)
    hops = [] if source.on_host else [(yield from side(cluster, sent, egress))]
    if owner is None:
        return hops + (yield from _to_node_or_outside(journey, there, protocol, port))
    if owner.node == source.node:
        hops.append((yield from _same_node(journey, there)))
    else:
        hops += yield from _to_other_node(journey, there, owner.node)
    ingress = judge(cluster.policies, flow, cluster.node_addresses).ingress
    hops.append((yield from side(cluster, flow, ingress)))
    where = Where(owner.node, (owner.namespace, owner.name))
    found, link = yield from ends.interface("destination pod", where, there, flow.source)
    hops += [found, (yield from ends.wire(where, link, there))]
    hops.append((yield from ends.listener(where, there, protocol, port, f"{owner.namespace}/{owner.name}")))
    if owner.node != source.node:
        hops += yield from _back(journey, there, owner.node, link.mtu if link else 0)
    return hops


def _seen_as(journey: _Way, there: Address) -> Address:
    """The address that the other end sees: a node reaches remote pods from its tunnel's, for itself and for those whom
    it masquerades. A pod of the same node is judged before that."""
    owner = journey.cluster.policies.owner(there)
    if (journey.source.on_host or journey.masqueraded) and owner is not None and owner.node != journey.source.node:
        vteps = journey.node(journey.source.node).vteps
        return next((each for each in vteps if each.version == there.version), journey.own)
    return journey.own


def _same_node(journey: _Way, there: Address) -> Steps[Hop]:
    """Switched by the bridge, past the node's firewall."""
    node = journey.source.node
    if journey.source.on_host:
        said = ok(f"{node} sends it to its own pod by {BRIDGE}, and filters nothing of that")
        return Hop(title="the bridge", where=node, findings=(said,))
    key = "nf_call_iptables" if there.version == 4 else "nf_call_ip6tables"
    reading = yield Ask(Where(node), ("ip", "-j", "-d", "link", "show", "dev", BRIDGE))
    items = reading.items()
    passed = bool(items) and (items[0].get("linkinfo") or {}).get("info_data", {}).get(key)
    if passed or not items:
        finding = ok(f"both pods are on {node}: {BRIDGE} switches it, and hands it to the firewall on the way", reading)
    else:
        text = f"{BRIDGE} does not hand packets to the firewall ({key} is 0): Services and policies do not see them"
        finding = warns(text, f"`podwire ipam check --fix` on {node}", reading)
    return Hop(title="the bridge", where=node, findings=(finding,))


def _to_other_node(journey: _Way, there: Address, name: str) -> Steps[list[Hop]]:
    """Out of the source's node, over the underlay, into the other one."""
    source, own = journey.source, journey.own
    here, other = journey.node(source.node), journey.node(name)
    hops, device = yield from _between(journey, here, other, own, there, journey.mtu, "out")
    return [*hops, (yield from way.arrive(other, own, there, device, "the other node"))]


def _between(
    journey: _Way, here: NodeFacts, other: NodeFacts, own: Address, there: Address, mtu: int, word: str
) -> Steps[tuple[list[Hop], str]]:
    """The hops from node to node, and the device by which the packet gets into the other."""
    is_own = journey.source.on_host and here.name == journey.source.node
    found, route = yield from way.leave(here.name, own, there, other, own=is_own, way=word)
    hops = [found]
    tunnelled = route is None or route.device == VXLAN
    if found.state is not State.FAILS:
        if route is not None and tunnelled and route.gateway is not None:
            hops.append((yield from way.tunnel(here.name, route.gateway, other)))
        hops.append((yield from way.underlay(here, other, mtu, tunnelled=tunnelled)))
    return hops, VXLAN if route is None else route.device  # by which it comes in, too, where nodes are alike


def _back(journey: _Way, there: Address, name: str, mtu: int) -> Steps[list[Hop]]:
    """The answer's way, which is another node's routes and tunnel."""
    here, other = journey.node(name), journey.node(journey.source.node)
    to = _seen_as(journey, there)
    hops, _ = yield from _between(journey, here, other, there, to, mtu, "back")
    return [msgspec.structs.replace(hop, title=f"back: {hop.title.removeprefix('back: ')}") for hop in hops]


def _to_node_or_outside(journey: _Way, there: Address, protocol: Protocol, port: int) -> Steps[list[Hop]]:
    """To a node's own address, or out of the cluster."""
    source, own = journey.source, journey.own
    name = journey.cluster.node_addresses.get(there, "")
    facts = journey.node(name) if name else None
    hops: list[Hop] = []
    if name != source.node or not name:
        found, _ = yield from way.leave(source.node, own, there, facts, own=source.on_host, way="out")
        hops.append(found)
        if not source.on_host:
            hops.append((yield from way.masquerade(source.node, own, there, name)))
    if not name:
        end = Hop(title="outside the cluster", where=str(there), findings=(ok("what is there is not Podwire's"),))
        return [*hops, end]
    return [*hops, (yield from ends.listener(Where(name), there, protocol, port, f"node {name}"))]
