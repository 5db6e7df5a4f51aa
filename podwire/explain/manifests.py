"""Manifests as users write them, made into the objects that a cluster would make of them. Pure.

    Deployment, StatefulSet, … ──template──▶ Pod            as many as replicas, two at most: a third is as the second
    Pod without status ─────────────────────▶ addresses     of POD_NETWORKS, in the order of the manifests
    Service ──selector──▶ Pods ─────────────▶ ClusterIP, EndpointSlices
    namespaces that are only named ─────────▶ Namespace     with the label that the API server gives each

What has addresses, a ClusterIP or slices already (`kubectl get -o yaml`) keeps them. Kinds that do not matter here are
passed over; an object that cannot be read is left out, and named.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from kube_proxy_lite.model import Address, Network
from podwire.explain.objects import Objects
from podwire.kube.kinds import KINDS, Kind
from podwire.kube.objects import (
    SERVICE_NAME_LABEL,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Metadata,
    Namespace,
    Node,
    Pod,
    PodIP,
    PodStatus,
    Service,
    ServicePort,
)

POD_NETWORKS = (ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10:244::/64"))
NODE_NETWORKS = (ipaddress.ip_network("198.18.0.0/15"), ipaddress.ip_network("fd00:198:18::/64"))
SERVICE_NETWORKS = (ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd00:10:96::/112"))
NAMESPACE_LABEL = "kubernetes.io/metadata.name"
WORKLOADS = {
    ("apps/v1", "Deployment"): ("spec", "template"),
    ("apps/v1", "ReplicaSet"): ("spec", "template"),
    ("apps/v1", "StatefulSet"): ("spec", "template"),
    ("apps/v1", "DaemonSet"): ("spec", "template"),
    ("v1", "ReplicationController"): ("spec", "template"),
    ("batch/v1", "Job"): ("spec", "template"),
    ("batch/v1", "CronJob"): ("spec", "jobTemplate", "spec", "template"),
}
"""Kinds that make pods, and where the pods' template is."""
_MOST = 2
_ENDED = ("Succeeded", "Failed")
_BY_NAME: Mapping[tuple[str, str], Kind[Any]] = {(kind.api_version, kind.name): kind for kind in KINDS}
Plain = dict[str, Any]


def read_objects(plain: Sequence[Plain]) -> Objects:
    """The objects of a cluster to which these manifests were applied. Never raises: see Objects.problems."""
    found: dict[str, list[Any]] = {kind.name: [] for kind in KINDS}
    problems: list[str] = []
    for one in plain:
        for kind, obj in _expand(one):
            try:
                typed = msgspec.convert(obj, kind.model)
            except msgspec.ValidationError as error:
                problems.append(f"{kind.name} {_name(obj)} is left out: {error}")
            else:
                found[kind.name].append(typed)
    namespaces = _namespaces(found)
    nodes, node_addresses = _nodes(found["Node"], found["Pod"])
    pods, invented = _addressed(found["Pod"], node_addresses)
    services = _with_cluster_ips(found["Service"])
    slices = [*found["EndpointSlice"]]
    served = {each.service for each in slices}
    for service in services:
        if service.key not in served:
            slices += _slices(service, pods)
    return Objects(
        namespaces=namespaces,
        pods=tuple(pods),
        policies=tuple(found["NetworkPolicy"]),
        services=tuple(services),
        slices=tuple(slices),
        nodes=nodes,
        invented=frozenset(invented),
        problems=tuple(problems),
    )


def _name(obj: Plain) -> str:
    metadata = obj.get("metadata") or {}
    return "/".join(filter(None, (metadata.get("namespace"), metadata.get("name"))))


# --- pods -------------------------------------------------------------------------------------------------------


def _expand(obj: Plain) -> Iterator[tuple[Kind[Any], Plain]]:
    """The objects that matter here, with their namespaces: itself, the pods of a workload, or nothing."""
    place = (obj["apiVersion"], obj["kind"])
    metadata = dict(obj["metadata"])
    metadata.setdefault("name", f"{metadata.get('generateName', '')}1")
    kind = _BY_NAME.get(place)
    if kind is not None:
        if kind.namespaced:
            metadata["namespace"] = metadata.get("namespace") or "default"
        yield kind, {**obj, "metadata": metadata}
    elif place in WORKLOADS:
        template: Any = obj
        for step in WORKLOADS[place]:
            template = template.get(step) if isinstance(template, dict) else None
        if isinstance(template, dict):
            yield from ((_BY_NAME["v1", "Pod"], pod) for pod in _of_workload(obj, metadata, template))


def _of_workload(obj: Plain, metadata: Plain, template: Plain) -> Iterator[Plain]:
    replicas = obj["spec"].get("replicas", 1)
    if obj["kind"] == "DaemonSet":
        replicas = _MOST
    first = 0 if obj["kind"] == "StatefulSet" else 1
    own = template.get("metadata") or {}
    if not isinstance(own, dict):
        own = {"labels": own}  # which is wrong in a way that will be named
    for number in range(first, first + min(replicas if isinstance(replicas, int) else 1, _MOST)):
        about = {
            "name": f"{metadata['name']}-{number}",
            "namespace": metadata.get("namespace") or "default",
            "labels": own.get("labels"),
            "annotations": own.get("annotations"),
        }
        yield {"metadata": about, "spec": template.get("spec") or {}}


def _addressed(pods: Sequence[Pod], nodes: Mapping[str, tuple[Address, ...]]) -> tuple[list[Pod], list[Address]]:
    """The pods, all with addresses, and those that were made up."""
    taken = {each for pod in pods for each in _addresses(pod)}
    fresh = zip(*(_hosts(network, taken, 10) for network in POD_NETWORKS), strict=False)
    made: list[Pod] = []
    invented: list[Address] = []
    for pod in pods:
        if _addresses(pod) or pod.status.phase in _ENDED:
            made.append(pod)
            continue
        if pod.spec.host_network:
            addresses = nodes[_node_of(pod)]
        else:
            addresses = next(fresh)
            invented += addresses
        ips = tuple(PodIP(ip=str(each)) for each in addresses)
        status = PodStatus(phase=pod.status.phase or "Running", pod_ip=ips[0].ip, pod_ips=ips)
        made.append(msgspec.structs.replace(pod, status=status))
    return made, invented


def _addresses(pod: Pod) -> list[Address]:
    texts = {pod.status.pod_ip, *(each.ip for each in pod.status.pod_ips or ())} - {""}
    return [ipaddress.ip_address(text) for text in sorted(texts) if _is_address(text)]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _hosts(network: Network, taken: set[Address], first: int) -> Iterator[Address]:
    """Addresses of a network that nobody has, from its `first` on."""
    for number in range(first, network.num_addresses - 1):
        address = network[number]
        if address not in taken:
            yield address


def _node_of(pod: Pod) -> str:
    """The node of a pod that has its node's network; one of its own where the manifest names none."""
    return pod.spec.node_name or f"node of {'/'.join(pod.key)}"


def _nodes(given: Sequence[Node], pods: Sequence[Pod]) -> tuple[tuple[Node, ...], dict[str, tuple[Address, ...]]]:
    """The nodes, and the addresses of each, made up where nobody says them."""
    addresses: dict[str, tuple[Address, ...]] = {}
    for node in given:
        texts = [each.address for each in node.status.addresses or () if each.type == "InternalIP"]
        addresses[node.metadata.name] = tuple(ipaddress.ip_address(text) for text in texts if _is_address(text))
    taken = {each for found in addresses.values() for each in found}
    fresh = zip(*(_hosts(network, taken, 1) for network in NODE_NETWORKS), strict=False)
    for pod in pods:
        if pod.spec.host_network and not addresses.get(_node_of(pod)):
            addresses[_node_of(pod)] = next(fresh)
    return tuple(given), addresses


def _namespaces(found: Mapping[str, Sequence[Any]]) -> tuple[Namespace, ...]:
    """Every namespace that is there or named, with the label that says its name."""
    given: dict[str, Namespace] = {each.metadata.name: each for each in found["Namespace"]}
    named = [each.metadata.namespace for objects in found.values() for each in objects if each.metadata.namespace]
    for name in dict.fromkeys(named):
        given.setdefault(name, Namespace(metadata=Metadata(name=name)))
    return tuple(
        msgspec.structs.replace(
            each,
            metadata=msgspec.structs.replace(
                each.metadata, labels={**(each.metadata.labels or {}), NAMESPACE_LABEL: name}
            ),
        )
        for name, each in given.items()
    )


# --- Services ---------------------------------------------------------------------------------------------------


def _with_cluster_ips(services: Sequence[Service]) -> list[Service]:
    taken = {ipaddress.ip_address(each) for one in services for each in _cluster_ips(one) if _is_address(each)}
    fresh = {network.version: _hosts(network, taken, 10) for network in SERVICE_NETWORKS}
    made = []
    for service in services:
        if _cluster_ips(service) or service.spec.type == "ExternalName":
            made.append(service)
            continue
        families = service.spec.ip_families or ("IPv4",)
        addresses = tuple(str(next(fresh[6 if family == "IPv6" else 4])) for family in families)
        spec = msgspec.structs.replace(
            service.spec, cluster_ip=addresses[0], cluster_ips=addresses, ip_families=families
        )
        made.append(msgspec.structs.replace(service, spec=spec))
    return made


def _cluster_ips(service: Service) -> tuple[str, ...]:
    return service.spec.cluster_ips or ((service.spec.cluster_ip,) if service.spec.cluster_ip else ())


def _slices(service: Service, pods: Sequence[Pod]) -> Iterator[EndpointSlice]:
    """What the endpoint controller would write: a slice a family and set of ports."""
    selector = service.spec.selector
    if not selector:
        return
    chosen: dict[tuple[int, tuple[EndpointPort, ...]], list[Endpoint]] = {}
    for pod in pods:
        labels = pod.metadata.labels or {}
        if pod.metadata.namespace != service.metadata.namespace or pod.status.phase in _ENDED:
            continue
        if any(labels.get(key) != value for key, value in selector.items()):
            continue
        ports = tuple(found for port in service.spec.ports or () if (found := _target(port, pod)) is not None)
        conditions = EndpointConditions(ready=pod.status.phase == "Running")
        for address in _addresses(pod):
            endpoint = Endpoint(addresses=(str(address),), conditions=conditions, node_name=pod.spec.node_name or None)
            chosen.setdefault((address.version, ports), []).append(endpoint)
    for number, ((version, ports), endpoints) in enumerate(chosen.items(), start=1):
        yield EndpointSlice(
            metadata=Metadata(
                name=f"{service.metadata.name}-{number}",
                namespace=service.metadata.namespace,
                labels={SERVICE_NAME_LABEL: service.metadata.name},
            ),
            address_type=f"IPv{version}",
            endpoints=tuple(endpoints),
            ports=ports,
        )


def _target(port: ServicePort, pod: Pod) -> EndpointPort | None:
    """The port of a pod that a Service's port leads to; None when the pod has none of that name."""
    wanted = port.target_port if port.target_port not in (None, 0, "") else port.port
    if isinstance(wanted, str) and wanted.isdigit():
        wanted = int(wanted)
    if isinstance(wanted, str):
        containers = pod.spec.containers or ()
        numbers = [
            each.container_port
            for container in containers
            for each in container.ports or ()
            if each.name == wanted and each.protocol == port.protocol
        ]
        if not numbers:
            return None
        wanted = numbers[0]
    return EndpointPort(name=port.name, port=wanted, protocol=port.protocol)
