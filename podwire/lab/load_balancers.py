"""Load balancers as a cloud has them: an address a Service, and a host that spreads what comes for it over the nodes.

    outside ──route 198.51.100.64/26──▶ balancer ──resilient next-hop group──▶ a node whose health check passes
       ▲                                 routes, no NAT                          the proxy there knows the address
       └───────────────────────── the answer, straight from the node ───────────┘

Two levels: the balancer chooses a node by a hash of addresses and ports, the node's proxy chooses an endpoint. The
packet's destination stays the Service's address and its source the client's, so with externalTrafficPolicy Local a pod
sees the client. The kernel of the balancer's namespace does the spreading: a next-hop group of type resilient moves a
connection to another node only when its own has left, or after it was silent for _IDLE_SECONDS. What is here decides
who has which address and who is in which group; balancing.py asks the nodes and runs `ip`. Pure.

Addresses are given once, and kept while the Service is of the type LoadBalancer; `loadBalancerIP` asks for a certain
one. Services with a loadBalancerClass are somebody else's.

Source: Linux Documentation/networking/nexthop-group-resilient.rst; Kubernetes documentation "Create an External Load
Balancer".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from podwire.lab import names
from podwire.lab.api.fields import Object
from podwire.lab.api.kinds import SERVICES
from podwire.lab.api.service_addresses import Refused, choose_address
from podwire.lab.state import NodeState
from podwire.lab.workloads import Action, SetStatus, is_going

_BUCKETS, _IDLE_SECONDS = 128, 5


# --- addresses --------------------------------------------------------------------------------------------------


def plan_balanced(service: Object, services: Iterable[Object], networks: Sequence[names.Network]) -> list[Action]:
    """The status to write for a Service among all: addresses if it wants a balancer, else none. Raises Refused."""
    had = ingress_of(service)
    if _is_foreign(service):
        return []
    if not is_balanced(service):
        return [_with_ingress(service, [])] if had else []
    own = service["metadata"]["uid"]
    taken = {ip for other in services if other["metadata"]["uid"] != own for ip in ingress_of(other)}
    given = addresses_for(service, had, taken, networks)
    return [_with_ingress(service, given)] if given != had else []


def addresses_for(service: Object, had: Sequence[str], taken: set[str], networks: Sequence[names.Network]) -> list[str]:
    """One address of each of the Service's families. Those that it had stay. Raises Refused."""
    spec, metadata = service["spec"], service["metadata"]
    asked, found = spec.get("loadBalancerIP") or "", []
    for family in spec.get("ipFamilies") or ["IPv4"]:
        version = int(family[-1])
        of_family = [network for network in networks if network.version == version]
        own = [ip for ip in had if (":" in ip) == (version == 6)]
        wanted = asked if asked and (":" in asked) == (version == 6) else ""
        if wanted and wanted not in own:
            _check(wanted, of_family, taken)
            found.append(wanted)
        elif own or not of_family:
            found += own[:1]
        else:
            seed = f"{metadata['namespace']}/{metadata['name']}"
            found.append(str(choose_address(seed, of_family, taken, "status.loadBalancer")))
    return found


def _check(asked: str, networks: Sequence[names.Network], taken: set[str]) -> None:
    try:
        inside = any(ipaddress.ip_address(asked) in network for network in networks)
    except ValueError:
        inside = False
    why = "is taken" if asked in taken else "" if inside else f"is not in {', '.join(map(str, networks))}"
    if why:
        raise Refused("spec.loadBalancerIP", f'Invalid value: "{asked}": {why}')


def is_balanced(service: Object) -> bool:
    """Whether the Service wants a balancer, and ours."""
    return service["spec"].get("type") == "LoadBalancer" and not _is_foreign(service) and not is_going(service)


def _is_foreign(service: Object) -> bool:
    return bool(service["spec"].get("loadBalancerClass"))


def ingress_of(service: Object) -> list[str]:
    """The addresses that it was given, bare."""
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return [one["ip"] for one in ingress if one.get("ip")]


def _with_ingress(service: Object, addresses: Iterable[str]) -> SetStatus:
    ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
    balancer = {"ingress": ingress} if ingress else {}
    return SetStatus(SERVICES, service, {**(service.get("status") or {}), "loadBalancer": balancer})


# --- routes -----------------------------------------------------------------------------------------------------


class Check(msgspec.Struct, frozen=True):
    """What a node is asked: a port, and a path on it."""

    port: int
    path: str


def check_of(service: Object) -> Check:
    """How a node shows that it can serve a Service."""
    port = service["spec"].get("healthCheckNodePort")
    return Check(port, "/") if port else Check(names.PROXY_HEALTH_PORT, "/healthz")


def plan_groups(
    services: Iterable[Object], nodes: Sequence[NodeState], healthy: Mapping[Check, frozenset[str]]
) -> dict[str, tuple[int, ...]]:
    """By balanced address the next hops that it is spread over, none when no node is healthy. `healthy`: node names."""
    groups = {}
    for service in services:
        good = healthy.get(check_of(service), frozenset())
        for address in ingress_of(service):
            version = 6 if ":" in address else 4
            groups[address] = tuple(hop_id(number, version) for number, node in enumerate(nodes) if node.name in good)
    return groups


def hop_id(number: int, version: int) -> int:
    """The id of the next hop to the node of this number, counted from 0, in a family."""
    return 2 * number + (1 if version == 4 else 2)


def plan_commands(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], ids: Mapping[str, int]
) -> list[str]:
    """`ip` commands that take the groups from `before` to `after`; `ids` are the groups'. A group without hops is none:
    the route over it goes with it, and the range's own, which refuses, is next."""
    commands = []
    for address in sorted(before.keys() | after.keys()):
        old, new, group = before.get(address, ()), after.get(address, ()), ids[address]
        if old == new:
            continue
        if not new:
            commands.append(f"nexthop del id {group}")
            continue
        kind = f"type resilient buckets {_BUCKETS} idle_timer {_IDLE_SECONDS}"
        commands.append(f"nexthop replace id {group} group {'/'.join(map(str, new))} {kind}")
        if not old:
            commands.append(f"route replace {address} nhid {group}")
    return commands


def plan_hops(nodes: Sequence[NodeState]) -> list[str]:
    """`ip` commands that make the next hops to the nodes, after what there was is gone."""
    hops = [
        f"nexthop add id {hop_id(number, 6 if ':' in address else 4)} via {address} dev eth0"
        for number, node in enumerate(nodes)
        for address in node.addresses
    ]
    return ["nexthop flush", *hops]
