"""Services, EndpointSlices and Nodes for tests, made from JSON as the API writes it; endpoints in a few words.

"1 here zone:a"     10.244.0.1 (or fd44::1), ready, on this node, hinted for zone a
"2 draining"        serving while it terminates
unready · dead (terminates and no longer serves) · published (terminates and is ready all the same) · bare (says
nothing of its conditions) · node:NAME (hinted for that node)
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from kube_proxy_lite.model import Backend, PortKey, PortPlan, Protocol, Settings
from kube_proxy_lite.services import Services
from podwire.kube.objects import SERVICE_NAME_LABEL, EndpointSlice, Node, Service, ServiceCIDR

HERE = "node-a"
CLUSTER_IP = {4: "10.96.0.10", 6: "fd96::10"}
EXTERNAL_IP = {4: "192.0.2.10", 6: "2001:db8::10"}
VIP = {4: "198.51.100.10", 6: "2001:db8:1::10"}

CONDITIONS: dict[str, dict[str, bool]] = {
    "bare": {},
    "unready": {"ready": False, "serving": False, "terminating": False},
    "draining": {"ready": False, "serving": True, "terminating": True},
    "dead": {"ready": False, "serving": False, "terminating": True},
    "published": {"ready": True, "serving": False, "terminating": True},
}


def service(name: str = "web", version: int = 4, status: Iterable[Any] = (), **spec: Any) -> Service:
    """A Service of one port, 80, with a ClusterIP of the family; `spec` as the API spells it, `status` its ingress.

    `labels` and `created` go to the metadata.
    """
    metadata = {
        "namespace": spec.pop("namespace", "default"),
        "name": name,
        "labels": spec.pop("labels", {}),
        "creationTimestamp": spec.pop("created", "2026-01-01T00:00:00Z"),
    }
    ports = [{"port": 80, "protocol": "TCP"}]
    whole = {"type": "ClusterIP", "clusterIPs": [CLUSTER_IP[version]], "ports": ports, **spec}
    ingress = {"loadBalancer": {"ingress": list(status)}}
    return msgspec.convert({"metadata": metadata, "spec": whole, "status": ingress}, Service)


def endpoint(words: str, version: int = 4) -> dict[str, Any]:
    """An endpoint as the API writes it."""
    number, *rest = words.split()
    flags = {word for word in rest if ":" not in word}
    hints = {kind: [word[5:] for word in rest if word.startswith(kind)] for kind in ("zone:", "node:")}
    (state,) = flags - {"here"} or {""}
    return {
        "addresses": [address(int(number), version)],
        "conditions": CONDITIONS.get(state, {"ready": True, "serving": True, "terminating": False}),
        "nodeName": HERE if "here" in flags else "node-b",
        "hints": {
            "forZones": [{"name": name} for name in hints["zone:"]],
            "forNodes": [{"name": name} for name in hints["node:"]],
        },
    }


def address(number: int, version: int = 4) -> str:
    """The address of the pod with that number."""
    return f"10.244.{number >> 8}.{number & 255}" if version == 4 else f"fd44::{number:x}"


def slice_of(*endpoints: str, name: str = "web-1", of: str = "web", version: int = 4, **rest: Any) -> EndpointSlice:
    """A slice of those endpoints, which listen on 8080."""
    body = {
        "metadata": {
            "namespace": rest.pop("namespace", "default"),
            "name": name,
            "labels": {SERVICE_NAME_LABEL: of, **rest.pop("labels", {})},
        },
        "addressType": f"IPv{version}",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [endpoint(words, version) for words in endpoints],
        **rest,
    }
    return msgspec.convert(body, EndpointSlice)


def node(name: str = HERE, zone: str | None = None, addresses: Iterable[str] = (), cidrs: Iterable[str] = ()) -> Node:
    """A Node object."""
    body = {
        "metadata": {"name": name, "labels": {} if zone is None else {"topology.kubernetes.io/zone": zone}},
        "spec": {"podCIDRs": list(cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": each} for each in addresses]},
    }
    return msgspec.convert(body, Node)


def service_cidr(name: str, *cidrs: str) -> ServiceCIDR:
    """A ServiceCIDR object."""
    return msgspec.convert({"metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}}, ServiceCIDR)


def services(*objects: Service | EndpointSlice | Node) -> Services:
    """The state that knows those."""
    state = Services(Settings(node=HERE))
    for obj in objects:
        match obj:
            case Service():
                state.set_service(obj)
            case EndpointSlice():
                state.set_slice(obj)
            case Node():
                state.set_node(obj)
    return state


def key(
    service: str = "web", port: str = "", version: int = 4, protocol: str = "TCP", namespace: str = "default"
) -> PortKey:
    """The key of one port."""
    return PortKey(namespace, service, port, Protocol(protocol), version)


def the_plan(state: Services, of: PortKey | None = None) -> PortPlan:
    """The plan of that port, of `web`'s only one when none is named."""
    plan = state.plan(of or key())
    assert plan is not None
    return plan


def places(plan: PortPlan | None) -> list[str]:
    """Its frontends as text: kind address:port, and `local` or the source ranges where there are some."""
    return list(_places(plan)) if plan else []


def _places(plan: PortPlan) -> Iterator[str]:
    for frontend in plan.frontends:
        at = f"{frontend.address or '*'} {frontend.port}"
        local = " local" if frontend.local else ""
        ranges = " from " + ",".join(map(str, frontend.source_ranges)) if frontend.source_ranges else ""
        yield f"{frontend.kind} {at}{local}{ranges}"


def numbers(backends: Iterable[Backend]) -> list[int]:
    """Which pods those are."""
    return [
        int(backend.address) - int(ipaddress.ip_address(address(0, backend.address.version))) for backend in backends
    ]
