"""Services for the renderers' tests: a node, its clients, and every sort of frontend, in either family.

node a     10.0.0.1         pods 10.244.1.0/24       backends  local 10.244.1.3, remote 10.244.2.3
outside    192.0.2.7        ClusterIPs 10.96.0.0/16  balancer's addresses 203.0.113.0/24
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import msgspec

from kube_proxy_lite.model import (
    Address,
    Backend,
    Frontend,
    FrontendKind,
    Network,
    PortKey,
    PortPlan,
    Protocol,
    Settings,
    Source,
)

VERSIONS = (4, 6)


def address(text: str, version: int = 4) -> Address:
    """The address, or its twin in IPv6: fd00:: and the same four numbers."""
    if version == 4:
        return ipaddress.IPv4Address(text)
    a, b, c, d = text.split(".")
    return ipaddress.IPv6Address(f"fd00:{a}:{b}::{c}:{d}")


def network(text: str, version: int = 4) -> Network:
    """A network of 16 or 24 bits, or its twin in IPv6."""
    host, _, length = text.partition("/")
    if version == 4:
        return ipaddress.ip_network(text)
    return ipaddress.ip_network(f"{address(host, 6)}/{ {'8': 32, '16': 48, '24': 112, '32': 128}[length] }")


SETTINGS = Settings(
    node="a",
    cluster_cidrs=tuple(network("10.244.0.0/16", version) for version in VERSIONS),
    service_cidrs=tuple(network("10.96.0.0/16", version) for version in VERSIONS),
)
VARIANTS = {
    "pods are told by their addresses": SETTINGS,
    "pods are told by their interfaces": msgspec.structs.replace(
        SETTINGS, cluster_cidrs=(), pod_interfaces=("cali*", "pw0")
    ),
    "pods are not told": msgspec.structs.replace(SETTINGS, cluster_cidrs=()),
    "everything to ClusterIPs is masqueraded": msgspec.structs.replace(SETTINGS, masquerade_all=True),
    "everything, and pods are not told": msgspec.structs.replace(SETTINGS, masquerade_all=True, cluster_cidrs=()),
}

NODE = {
    version: frozenset(address(each, version) for each in ("10.0.0.1", "10.0.1.1", "10.244.1.1"))
    for version in VERSIONS
}
CLIENTS = {Source.POD: "10.244.1.9", Source.NODE: "10.0.0.1", Source.EXTERNAL: "192.0.2.7"}
INTERFACES = {Source.POD: "pw0", Source.NODE: "", Source.EXTERNAL: "eth0"}

LOCAL, LOCAL_2, REMOTE, REMOTE_2 = "10.244.1.3", "10.244.1.4", "10.244.2.3", "10.244.3.3"
BACKENDS = {
    "local and remote": ((LOCAL, REMOTE), (LOCAL,)),
    "none here": ((REMOTE, REMOTE_2), ()),
    "none at all": ((), ()),
    "hints chose another zone's": ((REMOTE,), (LOCAL, LOCAL_2)),
}
"""What is there: the choices Cluster and Local."""


def backend(text: str, version: int = 4, port: int = 8080) -> Backend:
    """A backend; those in 10.244.1 are on the node."""
    return Backend(address(text, version), port, text.startswith("10.244.1."))


def plan(
    name: str = "web",
    cluster: tuple[str, ...] = (LOCAL, REMOTE),
    local: tuple[str, ...] = (LOCAL,),
    *,
    version: int = 4,
    protocol: Protocol = Protocol.TCP,
    number: int = 1,
    internal_local: bool = False,
    external_local: bool = False,
    affinity: int = 0,
    ranges: tuple[str, ...] = (),
    only: tuple[FrontendKind, ...] = tuple(FrontendKind),
) -> PortPlan:
    """Service number N with a frontend of each kind in `only`: 10.96.0.N:80, node port 30000 + N, 198.51.100.N:80 and
    203.0.113.N:80, which `ranges` close."""
    kinds = {
        FrontendKind.CLUSTER_IP: (f"10.96.0.{number}", 80, internal_local, ()),
        FrontendKind.NODE_PORT: (None, 30000 + number, external_local, ()),
        FrontendKind.EXTERNAL_IP: (f"198.51.100.{number}", 80, external_local, ()),
        FrontendKind.LOAD_BALANCER: (f"203.0.113.{number}", 80, external_local, ranges),
    }
    frontends = []
    for kind in only:
        text, port, is_local, sources = kinds[kind]
        frontends.append(
            Frontend(
                kind=kind,
                address=None if text is None else address(text, version),
                port=port,
                local=is_local,
                source_ranges=tuple(network(each, version) for each in sources),
            )
        )
    return PortPlan(
        key=PortKey("default", name, "", protocol, version),
        frontends=tuple(frontends),
        cluster=tuple(sorted(backend(each, version) for each in cluster)),
        local=tuple(sorted(backend(each, version) for each in local)) if internal_local or external_local else (),
        affinity=affinity,
    )


def flows() -> Iterator[tuple[str, PortPlan, Frontend, Source]]:
    """Every family × backends × traffic policies × frontend × source, and the protocols in turn."""
    protocols = list(Protocol)
    for version in VERSIONS:
        for turn, (backends, (cluster, local)) in enumerate(BACKENDS.items()):
            for policy, internal, external in (
                ("Cluster", False, False),
                ("eTP Local", False, True),
                ("iTP Local", True, False),
            ):
                made = plan(
                    cluster=cluster,
                    local=local,
                    version=version,
                    protocol=protocols[turn % 3],
                    internal_local=internal,
                    external_local=external,
                )
                for frontend in made.frontends:
                    for source in Source:
                        yield f"v{version} {backends}, {policy}: {source} to {frontend.kind}", made, frontend, source
