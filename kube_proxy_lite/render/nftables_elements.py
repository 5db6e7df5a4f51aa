"""Plans as elements of the sets and maps of nftables_layout.py. Pure functions of a plan and of where it has its slots.

A place is `address . protocol . port`, or `protocol . port` on the node's own addresses. What a plan puts in:

    services        place : verdict          one per frontend; nodeports for places on the node
    …_external      place : verdict          where a policy Local makes it another for clients from outside
    eps_tcp …       place . slot : endpoint  one per endpoint and frontend; eps_local_…, np_…, np_local_…
    masquerades     place : goto masq_…      all places but ClusterIPs; nodeport_masquerades
    learners        place : goto learn_…     with affinity; nodeport_learners
    closed, sources                          with source ranges
    cluster_ips, hairpin                     shared between plans, so they are counted, as are chains

**Slots.** Dice fall on a slot, so the endpoints of a choice sit in slots 0 … n-1 without a hole. `settle` keeps who
stays where they are, puts who is new where somebody left, and moves the last into a hole that remains: one endpoint
more or fewer changes one or two elements a frontend, be it of three or a thousand.

Nothing but addresses and numbers gets into the text: no name of any object does.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from kube_proxy_lite.model import (
    Address,
    Backend,
    Frontend,
    FrontendKind,
    Network,
    PortPlan,
    Settings,
    Source,
    Verdict,
    decide,
)
from kube_proxy_lite.render.nftables_layout import PROTOCOLS, endpoint_map

FLIPS = ("services", "services_external", "nodeports", "nodeports_external")
"""The maps that say where a connection goes; all others say how."""
INTERVALS = ("pods", "node_addresses", "service_cidrs", "sources")
"""Sets in which elements must not overlap, not even for a moment."""
CHAIN = "chain"
"""Stands for a set in what is counted."""

Slots = tuple[str, ...]


class Placed(msgspec.Struct, frozen=True, gc=False):
    """A plan, and the endpoints of its two choices by slot, as text."""

    plan: PortPlan
    cluster: Slots
    local: Slots


class Elements:
    """What some plans put into one table."""

    __slots__ = ("own", "shared", "slots")

    def __init__(self) -> None:
        self.own: dict[tuple[str, str], str] = {}
        """(set, key) → value, empty for a set's."""
        self.slots: dict[tuple[str, str], Slots] = {}
        """(map, key without the slot) → values."""
        self.shared: Counter[tuple[str, str]] = Counter()
        """(set or CHAIN, key or name) → by how many."""


def settle(wanted: Iterable[str], there: Mapping[int, str] | Slots) -> Slots:
    """Slots for `wanted`, as few as possible other than in `there` (slot → endpoint; some may be missing)."""
    new = dict.fromkeys(wanted)
    slots: list[str | None] = [None] * len(new)
    moved: list[str] = []
    for slot, endpoint in sorted(there.items()) if isinstance(there, Mapping) else enumerate(there):
        if endpoint not in new:
            continue
        del new[endpoint]
        if slot < len(slots):
            slots[slot] = endpoint
        else:
            moved.append(endpoint)
    rest = iter((*moved, *new))
    return tuple(endpoint if endpoint is not None else next(rest) for endpoint in slots)


def place_plan(
    plan: PortPlan, cluster: Mapping[int, str] | Slots = (), local: Mapping[int, str] | Slots = ()
) -> Placed:
    """The plan with its endpoints in slots, given who sits where."""
    return Placed(
        plan,
        settle(map(endpoint_text, plan.cluster), cluster),
        settle(map(endpoint_text, plan.local), local),
    )


def contribute(placed: Placed, settings: Settings, into: Elements) -> None:
    """Add what a plan puts in."""
    plan = placed.plan
    for frontend in plan.frontends:
        _add_frontend(placed, frontend, settings, into)
    for address in {backend.address for backend in (*plan.cluster, *plan.local) if backend.local}:
        text = address_text(address)
        into.shared["hairpin", f"{text} . {text}"] += 1


def base_elements(settings: Settings, version: int) -> dict[tuple[str, str], str]:
    """The elements that come from the settings."""
    sets = (
        ("pods", settings.cluster_cidrs),
        ("node_addresses", settings.node_port_addresses),
        ("service_cidrs", settings.service_cidrs),
    )
    return {(name, network_text(network)): "" for name, networks in sets for network in _disjoint(networks, version)}


def place_text(frontend: Frontend, plan: PortPlan) -> str:
    """The key of a frontend where clients knock."""
    _, number = PROTOCOLS[plan.key.protocol]
    if frontend.address is None:
        return f"{number} . {frontend.port}"
    return f"{address_text(frontend.address)} . {number} . {frontend.port}"


def slot_maps(frontend: Frontend, plan: PortPlan) -> tuple[tuple[str, str], tuple[str, str]]:
    """Where the endpoints of the choices Cluster and Local are for a frontend: (map, key without the slot) twice."""
    word, _ = PROTOCOLS[plan.key.protocol]
    if frontend.address is None:
        pool, key = "np", str(frontend.port)
    else:
        pool, key = "lb", f"{address_text(frontend.address)} . {frontend.port}"
    return (endpoint_map(pool, word), key), (endpoint_map(f"{pool}_local", word), key)


def endpoint_text(backend: Backend) -> str:
    return f"{address_text(backend.address)} . {backend.port}"


def address_text(address: Address) -> str:
    """As nft prints it: IPv6 addresses that hold an IPv4 address end in that."""
    if address.version == 6 and 0xFFFF < (number := int(address)) < 1 << 48 and number >> 32 in (0, 0xFFFF):
        last = ".".join(str(byte) for byte in address.packed[12:])
        return f"::ffff:{last}" if number >> 32 else f"::{last}"
    return str(address)


def network_text(network: Network) -> str:
    """As nft prints it: a network of one address is that address."""
    text = address_text(network.network_address)
    return text if network.prefixlen == network.max_prefixlen else f"{text}/{network.prefixlen}"


def _add_frontend(placed: Placed, frontend: Frontend, settings: Settings, into: Elements) -> None:
    plan = placed.plan
    place = place_text(frontend, plan)
    internal = frontend.kind is FrontendKind.CLUSTER_IP
    at_node = frontend.address is None
    inside = _verdict(placed, frontend, Source.NODE, settings, into)
    into.own["nodeports" if at_node else "services", place] = inside
    if frontend.local and not internal:
        outside = _verdict(placed, frontend, Source.EXTERNAL, settings, into)
        if outside != inside:
            into.own["nodeports_external" if at_node else "services_external", place] = outside
    if internal:
        into.shared["cluster_ips", place.partition(" ")[0]] += 1
    else:
        # whether or not there are endpoints, so that the first one is one element
        into.own["nodeport_masquerades" if at_node else "masquerades", place] = (
            "goto masq_node" if frontend.local else "goto masq_all"
        )
    if plan.affinity:
        into.own["nodeport_learners" if at_node else "learners", place] = f"goto learn_{plan.affinity}"
        into.shared[CHAIN, f"learn_{plan.affinity}"] += 1
    if frontend.source_ranges and not at_node:
        into.own["closed", place] = "jump guard"
        for network in frontend.source_ranges:
            into.own["sources", f"{place} . {network_text(network)}"] = ""


def _verdict(placed: Placed, frontend: Frontend, source: Source, settings: Settings, into: Elements) -> str:
    """What a map says for the frontend; the slots that it leads to are put in on the way."""
    plan = placed.plan
    verdict = decide(plan, frontend, source, settings).verdict
    if verdict is Verdict.REFUSE:
        return "goto refuse"
    if verdict is Verdict.DROP:
        return "drop"
    follows_local = frontend.local and (frontend.kind is FrontendKind.CLUSTER_IP or source is Source.EXTERNAL)
    slots = placed.local if follows_local else placed.cluster
    into.slots[slot_maps(frontend, plan)[follows_local]] = slots
    pool = ("np" if frontend.address is None else "lb") + ("_local" if follows_local else "")
    word, _ = PROTOCOLS[plan.key.protocol]
    chain = f"{pool}_{word}_{len(slots)}" + ("_sticky" if plan.affinity else "")
    into.shared[CHAIN, chain] += 1
    return f"goto {chain}"


def _disjoint(networks: tuple[Network, ...], version: int) -> Iterable[Network]:
    same: list[Network] = [network for network in networks if network.version == version]
    return ipaddress.collapse_addresses(same)  # type: ignore[type-var]
