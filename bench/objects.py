"""Kubernetes objects of a large cluster, as its API has them. Pure.

They have what real ones carry beside what is used (uids, owners, managed fields): a decoder has to pass over it. All
addresses of pods are in PODS, those of Services in SERVICES; who runs the pods is bench/proxy_node.py.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Any

Object = dict[str, Any]

PODS = ipaddress.ip_network("10.64.0.0/10")
SERVICES = ipaddress.ip_network("172.20.0.0/16")
PORT, TARGET_PORT = 80, 8080
SERVICE_NAMESPACE = "shop"
_FIRST_POD, _FIRST_SERVICE = int(PODS.network_address) + 256, int(SERVICES.network_address) + 1
_PER_SLICE = 100  # endpoints, as the endpoint slice controller fills them
_CREATED = "2026-01-05T08:30:00Z"
_MANAGERS = {"v1": "kubectl-client-side-apply", "discovery.k8s.io/v1": "kube-controller-manager"}


def pod_address(number: int) -> str:
    """The address of the pod with this number, of a million."""
    return str(ipaddress.ip_address(_FIRST_POD + number))


def cluster_ip(number: int) -> str:
    """The address of the Service with this number, of 65,000."""
    return str(ipaddress.ip_address(_FIRST_SERVICE + number))


def service_name(number: int) -> str:
    """Its name."""
    return f"catalogue-{number:05}"


def service(number: int) -> Object:
    """A Service of one port."""
    name = service_name(number)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, SERVICE_NAMESPACE, "v1", number, {"app.kubernetes.io/name": name, "tier": "back"}),
        "spec": {
            "clusterIP": cluster_ip(number),
            "clusterIPs": [cluster_ip(number)],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP", "targetPort": TARGET_PORT}],
            "selector": {"app.kubernetes.io/name": name},
            "sessionAffinity": "None",
            "type": "ClusterIP",
        },
        "status": {"loadBalancer": {}},
    }


def slices(number: int, pods: Sequence[int]) -> list[Object]:
    """The EndpointSlices of a Service whose endpoints are the pods with these numbers."""
    parts = [pods[start : start + _PER_SLICE] for start in range(0, len(pods), _PER_SLICE)]
    return [_slice(number, part, each) for part, each in enumerate(parts)]


def _slice(number: int, part: int, pods: Sequence[int]) -> Object:
    name = service_name(number)
    labels = {
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": name,
        "tier": "back",
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            **_metadata(f"{name}-{part:05}", SERVICE_NAMESPACE, "discovery.k8s.io/v1", number, labels),
            "generateName": f"{name}-",
            "ownerReferences": [
                {"apiVersion": "v1", "blockOwnerDeletion": True, "controller": True, "kind": "Service", "name": name}
            ],
        },
        "addressType": "IPv4",
        "endpoints": [_endpoint(each) for each in pods],
        "ports": [{"name": "http", "port": TARGET_PORT, "protocol": "TCP"}],
    }


def _endpoint(pod: int) -> Object:
    return {
        "addresses": [pod_address(pod)],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": node_name(pod % 500),
        "targetRef": {"kind": "Pod", "name": f"pod-{pod}", "namespace": SERVICE_NAMESPACE, "uid": uid(pod)},
        "zone": f"zone-{pod % 3}",
    }


def node_name(number: int) -> str:
    """One of the other nodes."""
    return f"worker-{number:05}"


def node(name: str) -> Object:
    """A node."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": _metadata(name, "", "v1", 1, {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": "a"}),
        "spec": {},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }


def service_cidr() -> Object:
    """The networks of Services."""
    metadata = _metadata("kubernetes", "", "networking.k8s.io/v1", 1, {})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": metadata,
        "spec": {"cidrs": [str(SERVICES)]},
    }


def namespace(name: str, labels: dict[str, str]) -> Object:
    """A namespace."""
    metadata = _metadata(name, "", "v1", 1, {"kubernetes.io/metadata.name": name, **labels})
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata, "spec": {}, "status": {"phase": "Active"}}


def pod(name: str, where: str, on: str, number: int, labels: dict[str, str], address: str | None = None) -> Object:
    """A pod in the namespace `where` on the node `on`, with the address of its number, or another, or (empty) none."""
    address = pod_address(number) if address is None else address
    ports = [{"containerPort": TARGET_PORT, "name": "http", "protocol": "TCP"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(name, where, "v1", number, labels),
        "spec": {
            "containers": [{"image": "registry.example/shop/web:1.4.2", "name": "web", "ports": ports}],
            "nodeName": on,
            "restartPolicy": "Always",
            "serviceAccountName": "default",
        },
        "status": {
            "conditions": [{"lastTransitionTime": _CREATED, "status": "True", "type": each} for each in _CONDITIONS],
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}] if address else [],
            "startTime": _CREATED,
        },
    }


_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")


def policy(name: str, where: str, selects: dict[str, str], peers: Iterable[Object], ports: Iterable[int]) -> Object:
    """A NetworkPolicy for ingress."""
    listed = [{"port": port, "protocol": protocol} for port in ports for protocol in ("TCP", "UDP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name, where, "networking.k8s.io/v1", 1, {}),
        "spec": {
            "podSelector": {"matchLabels": selects} if selects else {},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": list(peers), "ports": listed}],
        },
    }


def _metadata(name: str, where: str, version: str, number: int, labels: dict[str, str]) -> Object:
    found: Object = {
        "name": name,
        "uid": uid(number),
        "resourceVersion": "1",
        "creationTimestamp": _CREATED,
        "labels": labels,
        "managedFields": [
            {
                "apiVersion": version,
                "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:labels": {".": {}, **{f"f:{each}": {} for each in labels}}}},
                "manager": _MANAGERS.get(version, "kubectl"),
                "operation": "Update",
                "time": _CREATED,
            }
        ],
    }
    return {**found, "namespace": where} if where else found


def uid(number: int) -> str:
    """The uid of the object with this number."""
    return f"3c0a5d1e-4b7f-4a52-9c61-{number:012x}"
