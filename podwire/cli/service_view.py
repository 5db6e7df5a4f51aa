"""The cluster's Services as `podwire service` reads them: everything once from the API, and what each node makes of it.

API ──lists──▶ Cluster ──seen_by(node)──▶ kube_proxy_lite.services.Services, as that node's proxy has them
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence

import msgspec

from kube_proxy_lite.model import Address, Settings
from kube_proxy_lite.services import Services
from podwire.errors import PodwireError
from podwire.kube.objects import EndpointSlice, Node, Pod, Service, ServiceCIDR

_ENDED = ("Succeeded", "Failed")
Key = tuple[str, str]


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is, at about one moment. `settings` and `mode` are the proxy's, of the node asked about."""

    services: tuple[Service, ...] = ()
    slices: tuple[EndpointSlice, ...] = ()
    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    service_cidrs: tuple[ServiceCIDR, ...] = ()
    settings: Settings
    mode: str = "nftables"

    def seen_by(self, node: str) -> Services:
        """The Services as the proxy of a node has them."""
        seen = Services(self.settings_of(node))
        for one in self.nodes:
            seen.set_node(one)
        for service in self.services:
            seen.set_service(service)
        for each in self.slices:
            seen.set_slice(each)
        for cidr in self.service_cidrs:
            seen.set_service_cidr(cidr)
        return seen

    def settings_of(self, node: str) -> Settings:
        """The settings, for another node."""
        return msgspec.structs.replace(self.settings, node=node)

    def service(self, key: Key) -> Service:
        """The Service of that (namespace, name). Raises PodwireError."""
        for service in self.services:
            if service.key == key:
                return service
        known = ", ".join(service.key[1] for service in self.services if service.key[0] == key[0]) or "none"
        raise PodwireError(f"there is no Service {'/'.join(key)} (in that namespace: {known})")

    def pod_at(self, address: Address) -> Pod | None:
        """The pod that has the address; a hostNetwork pod has its node's, and is none."""
        return next((pod for pod in self.pods if address in addresses_of(pod) and not pod.spec.host_network), None)

    def node_at(self, address: Address) -> str:
        """The name of the node whose own address it is; empty when it is none's."""
        return next((node.metadata.name for node in self.nodes if address in node_addresses(node)), "")

    def place_of(self, address: Address) -> str:
        """Whose address it is, in words; empty when nobody knows."""
        pod, node = self.pod_at(address), self.node_at(address)
        if pod is not None:
            return f"pod {'/'.join(pod.key)} on {pod.spec.node_name}"
        return f"{node}'s own network" if node else ""


def addresses_of(pod: Pod) -> tuple[Address, ...]:
    """A pod's addresses; none when it has ended."""
    if pod.status.phase in _ENDED:
        return ()
    return _addresses([each.ip for each in pod.status.pod_ips or ()] or [pod.status.pod_ip])


def node_addresses(node: Node) -> tuple[Address, ...]:
    """A node's own addresses, as the API knows them."""
    return _addresses(
        [each.address for each in node.status.addresses or () if each.type in ("InternalIP", "ExternalIP")]
    )


def _addresses(texts: Sequence[str]) -> tuple[Address, ...]:
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(ipaddress.ip_address(text))
    return tuple(found)
