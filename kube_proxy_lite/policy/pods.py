"""What policies need to know of a pod, taken from the object once, so that the object need not be kept.

A pod that has ended (Succeeded, Failed) keeps its address in the API long after another pod has it; it is nobody here.
A pod on the node's own network has the node's address, and is part of the node. A terminating pod is a pod like any
other until it is gone.
"""

from __future__ import annotations

import ipaddress

import msgspec

from kube_proxy_lite.model import Address, Protocol
from kube_proxy_lite.policy.rules import NamedPorts
from podwire.kube.objects import Pod

CONFIG_HASH = "kubernetes.io/config.hash"
"""The annotation of a static pod: the kubelet's uid for it, where the API has another."""
_ENDED = ("Succeeded", "Failed")
_NO_LABELS: dict[str, str] = {}
_NO_PORTS: NamedPorts = {}


class PodFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that takes part in the network. `uids` are what the runtime may call it; `created` orders pods in time."""

    namespace: str
    name: str
    uid: str
    uids: frozenset[str]
    node: str
    labels: dict[str, str]
    addresses: tuple[Address, ...]
    ports: NamedPorts
    created: str

    @property
    def order(self) -> tuple[str, str]:
        """Of two pods that claim an address the later one has it."""
        return self.created, self.uid


def facts_of(pod: Pod) -> PodFacts | None:
    """What is to know of `pod`; None when it has no part in the network."""
    if pod.spec.host_network or pod.status.phase in _ENDED:
        return None
    uid = pod.metadata.uid or f"{pod.metadata.namespace}/{pod.metadata.name}"
    static = (pod.metadata.annotations or {}).get(CONFIG_HASH)
    return PodFacts(
        namespace=pod.metadata.namespace,
        name=pod.metadata.name,
        uid=uid,
        uids=frozenset({uid, static} if static else {uid}),
        node=pod.spec.node_name,
        labels=pod.metadata.labels or _NO_LABELS,
        addresses=_addresses(pod),
        ports=_ports(pod),
        created=pod.metadata.creation_timestamp or "",
    )


def _addresses(pod: Pod) -> tuple[Address, ...]:
    found = {each.ip for each in pod.status.pod_ips or ()} | {pod.status.pod_ip}
    addresses: list[Address] = []
    for text in sorted(filter(None, found)):
        try:
            addresses.append(ipaddress.ip_address(text))
        except ValueError:
            continue  # the API server lets none through, and what is no address has no packets
    return tuple(addresses)


def _ports(pod: Pod) -> NamedPorts:
    """Named ports of all containers that run beside each other: ordinary ones and sidecars."""
    sidecars = tuple(each for each in pod.spec.init_containers or () if each.restart_policy == "Always")
    found: dict[tuple[Protocol, str], set[int]] = {}
    for container in (*(pod.spec.containers or ()), *sidecars):
        for port in container.ports or ():
            if port.name and port.protocol in Protocol.__members__:
                found.setdefault((Protocol(port.protocol), port.name), set()).add(port.container_port)
    return {key: tuple(sorted(numbers)) for key, numbers in found.items()} if found else _NO_PORTS
