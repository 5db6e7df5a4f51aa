"""What a Service asks for: its ports in each family, and the places at which clients may knock. Pure.

A Service is read once, into an `Offer`: what it wishes for, whether or not it gets it (`claims` decides between two
that wish for the same place), and the object is let go. Which places there are:

    ClusterIP       every family that `clusterIPs` has an address of; a family without one has no other place either
    NodePort        types NodePort and LoadBalancer, where a port has a number: none is given to a load balancer with
                    allocateLoadBalancerNodePorts false
    external IP     any type
    load balancer   type LoadBalancer, addresses of the status whose ipMode is VIP or absent. With Proxy the balancer
                    wants its connections to come by it, so the node must not answer in its place

An address that is given twice, say as an external IP and by the balancer, is one place, and the balancer's: its source
ranges are the stricter word. Source ranges are for their own family; a /0 is the same as none. Where one cannot be
read and no other of the family is there, the balancer's addresses of the family are not served, since open to all is
not what was asked for.

Not for this proxy: ExternalName, headless Services, and what carries a label that names another proxy.

Source: core/v1 API reference v1.36, Service.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from sys import intern

import msgspec

from kube_proxy_lite.model import Address, Frontend, FrontendKind, Network, PortKey, Problem, Protocol
from kube_proxy_lite.validation import (
    Findings,
    read_address,
    read_name,
    read_network,
    read_port,
    read_port_name,
    read_protocol,
)
from podwire.kube.objects import HEADLESS_LABEL, PROXY_NAME_LABEL, Service, ServicePort

DEFAULT_AFFINITY_S = 10_800
MAX_AFFINITY_S = 86_400
TYPES = ("ClusterIP", "NodePort", "LoadBalancer")


class Wish(msgspec.Struct, frozen=True, gc=False):
    """One port of one family, and the frontends it would like to have, sorted."""

    key: PortKey
    frontends: tuple[Frontend, ...]


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A Service, read. `created` is when, as the API writes it; `health_port` 0 for none."""

    key: tuple[str, str]
    created: str = ""
    cluster_ips: tuple[Address, ...] = ()
    wishes: tuple[Wish, ...] = ()
    affinity: int = 0
    health_port: int = 0


class _Port(msgspec.Struct, frozen=True):
    name: str
    protocol: Protocol
    number: int
    node_port: int


class _Reader:
    """Reads one Service; what is passed over goes to `findings`."""

    def __init__(self, obj: Service) -> None:
        self.obj = obj
        self.spec = obj.spec
        self.findings = Findings("Service", obj.key)
        if self.spec.type not in TYPES:
            self.findings.add("spec.type", self.spec.type, "is no type of Service")
        self.balanced = self.spec.type == "LoadBalancer"
        self.external_local = self._is_local("externalTrafficPolicy", self.spec.external_traffic_policy)
        self.internal_local = self._is_local("internalTrafficPolicy", self.spec.internal_traffic_policy or "")

    def offer(self) -> Offer:
        cluster_ips = self._cluster_ips()
        ports = self._ports()
        wishes = [
            Wish(self._key(port, address.version), frontends)
            for address in cluster_ips
            for others in (self._addresses(address.version),)
            for port in ports
            for frontends in (self._frontends(port, address, others),)
        ]
        self._check_families({address.version for address in cluster_ips})
        return Offer(
            key=self.obj.key,
            created=self.obj.metadata.creation_timestamp or "",
            cluster_ips=cluster_ips,
            wishes=tuple(wishes),
            affinity=self._affinity(),
            health_port=self._health_port(),
        )

    def _is_local(self, field: str, value: str) -> bool:
        if value not in ("", "Cluster", "Local"):
            self.findings.add(f"spec.{field}", value, "is neither Cluster nor Local")
        return value == "Local"

    def _cluster_ips(self) -> tuple[Address, ...]:
        found: dict[int, Address] = {}
        for text in self.spec.cluster_ips or (self.spec.cluster_ip,):
            address = self.findings.read("spec.clusterIPs", text, read_address)
            if address is not None and found.setdefault(address.version, address) != address:
                self.findings.add("spec.clusterIPs", text, f"is a second IPv{address.version} address")
        return tuple(found[version] for version in sorted(found))

    def _ports(self) -> list[_Port]:
        found: dict[tuple[str, Protocol], _Port] = {}
        for each in self.spec.ports or ():
            port = self._port(each)
            if port is not None and found.setdefault((port.name, port.protocol), port) is not port:
                self.findings.add("spec.ports.name", each.name, "is the name of another port of this protocol, too")
        return list(found.values())

    def _port(self, each: ServicePort) -> _Port | None:
        name = self.findings.read("spec.ports.name", each.name, read_port_name)
        protocol = self.findings.read("spec.ports.protocol", each.protocol, read_protocol)
        number = self.findings.read("spec.ports.port", each.port, read_port)
        node_port = self.findings.read("spec.ports.nodePort", each.node_port, read_port) if each.node_port else None
        if name is None or protocol is None or number is None:
            return None
        return _Port(intern(name), protocol, number, (node_port or 0) if self.spec.type in TYPES[1:] else 0)

    def _key(self, port: _Port, version: int) -> PortKey:
        namespace, service = self.obj.key
        return PortKey(intern(namespace), service, port.name, port.protocol, version)

    def _addresses(self, version: int) -> list[tuple[FrontendKind, Address, tuple[Network, ...]]]:
        """The addresses of one family beside the ClusterIP; of those that are equal the last one counts."""
        found: list[tuple[FrontendKind, Address, tuple[Network, ...]]] = [
            (FrontendKind.EXTERNAL_IP, address, ())
            for address in self._read_all("spec.externalIPs", self.spec.external_ips or ())
            if address.version == version
        ]
        if not self.balanced:
            return found
        ingress = self.obj.status.load_balancer.ingress or ()
        texts = [each.ip for each in ingress if each.ip and each.ip_mode in (None, "", "VIP")]
        addresses = [
            each for each in self._read_all("status.loadBalancer.ingress.ip", texts) if each.version == version
        ]
        ranges = self._source_ranges(version) if addresses else None
        if ranges is not None:
            found += [(FrontendKind.LOAD_BALANCER, address, ranges) for address in addresses]
        return found

    def _read_all(self, field: str, texts: Iterable[str]) -> list[Address]:
        read = (self.findings.read(field, text, read_address) for text in texts)
        return [address for address in read if address is not None]

    def _source_ranges(self, version: int) -> tuple[Network, ...] | None:
        """Empty is open to all, None open to nobody."""
        texts = self.spec.load_balancer_source_ranges or ()
        read = [self.findings.read("spec.loadBalancerSourceRanges", text, read_network) for text in texts]
        of_version = [network for network in read if network is not None and network.version == version]
        if any(network.prefixlen == 0 for network in of_version):
            return ()
        if not of_version and None in read:
            return None
        return collapse(of_version)

    def _frontends(
        self,
        port: _Port,
        cluster_ip: Address,
        others: list[tuple[FrontendKind, Address, tuple[Network, ...]]],
    ) -> tuple[Frontend, ...]:
        found = {
            address: Frontend(
                kind=kind, address=address, port=port.number, local=self.external_local, source_ranges=ranges
            )
            for kind, address, ranges in others
        }
        found[cluster_ip] = Frontend(
            kind=FrontendKind.CLUSTER_IP, address=cluster_ip, port=port.number, local=self.internal_local
        )
        frontends = list(found.values())
        if port.node_port:
            frontends.append(
                Frontend(kind=FrontendKind.NODE_PORT, address=None, port=port.node_port, local=self.external_local)
            )
        return tuple(sorted(frontends))

    def _check_families(self, versions: set[int]) -> None:
        """An external IP of a family that the Service is not of; balancers may well have both."""
        for text in self.spec.external_ips or ():
            version = 6 if ":" in text else 4
            if versions and version not in versions:
                self.findings.add("spec.externalIPs", text, f"has no ClusterIP of IPv{version} beside it")

    def _affinity(self) -> int:
        if self.spec.session_affinity in ("", "None"):
            return 0
        if self.spec.session_affinity != "ClientIP":
            self.findings.add("spec.sessionAffinity", self.spec.session_affinity, "is neither ClientIP nor None")
            return 0
        config = self.spec.session_affinity_config
        seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
        if seconds is None:
            return DEFAULT_AFFINITY_S
        if not 1 <= seconds <= MAX_AFFINITY_S:
            field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
            self.findings.add(field, seconds, f"is not in 1–{MAX_AFFINITY_S}; {DEFAULT_AFFINITY_S} is taken")
            return DEFAULT_AFFINITY_S
        return seconds

    def _health_port(self) -> int:
        if not (self.balanced and self.external_local and self.spec.health_check_node_port):
            return 0
        return self.findings.read("spec.healthCheckNodePort", self.spec.health_check_node_port, read_port) or 0


def read_service(obj: Service) -> tuple[Offer | None, tuple[Problem, ...]]:
    """What the Service asks this proxy for, None when nothing; and what of it was passed over."""
    if not is_proxied(obj):
        return None, ()
    findings = Findings("Service", obj.key)
    for field, value in (("metadata.namespace", obj.metadata.namespace), ("metadata.name", obj.metadata.name)):
        if findings.read(field, value, read_name) is None:
            return None, findings.problems()
    reader = _Reader(obj)
    return reader.offer(), reader.findings.problems()


def is_proxied(obj: Service) -> bool:
    """Whether the Service has virtual addresses, and leaves them to this proxy."""
    labels = obj.metadata.labels or {}
    if PROXY_NAME_LABEL in labels or HEADLESS_LABEL in labels or obj.spec.type == "ExternalName":
        return False
    first = obj.spec.cluster_ips[0] if obj.spec.cluster_ips else obj.spec.cluster_ip
    return first not in ("", "None")


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The same addresses as disjoint networks, sorted; all of one family."""
    same: list[Network] = list(networks)
    return tuple(ipaddress.collapse_addresses(same))  # type: ignore[type-var]
