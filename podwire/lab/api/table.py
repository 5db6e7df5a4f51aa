"""What `kubectl get` prints: the server's own tables (meta/v1 Table), for those who ask with `as=Table`.

Columns with priority 1 show with `-o wide` only. Pods, nodes, services, namespaces and workloads have theirs; every
other kind has its name and age. Pure: `now` is seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from podwire.lab.api import selectors
from podwire.lab.api.kinds import (
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    NAMESPACES,
    NETWORK_POLICIES,
    NODES,
    PODS,
    REPLICA_SETS,
    SERVICES,
    Kind,
)

Object = dict[str, Any]
Row = list[Any]


def table(kind: Kind, objects: Sequence[Object], now: float, include: str = "Metadata") -> Object:
    """The Table of some objects. `include` is what each row carries besides: None, Metadata or Object."""
    columns, cells = _LAYOUTS.get(kind.key, _GENERIC)
    definitions = [
        {"name": name, "type": "string", "format": "name" if name == "Name" else "", "description": "",
         "priority": int(wide)}
        for name, wide in columns
    ]  # fmt: skip
    rows = []
    for obj in objects:
        row: Object = {"cells": cells(obj, now)}
        if include == "Object":
            row["object"] = obj
        elif include == "Metadata":
            row["object"] = {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]
            }  # fmt: skip
        rows.append(row)
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": definitions, "rows": rows
    }  # fmt: skip


def age(seconds: float) -> str:
    """A duration as kubectl writes it: 90s, 5m30s, 3h, 2d4h (k8s.io/apimachinery/pkg/util/duration HumanDuration)."""
    whole = int(seconds)
    if whole < 0:
        return "0s"
    if whole < 120:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d") if days < 2920 else f"{days // 365}y"


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large}{large_unit}{small}{small_unit}" if small else f"{large}{large_unit}"


def _age(obj: Object, now: float) -> str:
    created = obj["metadata"].get("creationTimestamp")
    return age(now - datetime.fromisoformat(created).timestamp()) if created else "<unknown>"


def _generic_cells(obj: Object, now: float) -> Row:
    return [obj["metadata"]["name"], _age(obj, now)]


def _namespace_cells(obj: Object, now: float) -> Row:
    return [obj["metadata"]["name"], (obj.get("status") or {}).get("phase", "Active"), _age(obj, now)]


def _pod_cells(pod: Object, now: float) -> Row:
    spec, status = pod["spec"], pod.get("status") or {}
    statuses = status.get("containerStatuses") or []
    ready = sum(bool(one.get("ready")) for one in statuses)
    restarts = sum(int(one.get("restartCount", 0)) for one in statuses)
    addresses = [one.get("ip", "") for one in status.get("podIPs") or []] or [status.get("podIP", "")]
    return [
        pod["metadata"]["name"], f"{ready}/{len(spec.get('containers') or [])}", _pod_status(pod), str(restarts),
        _age(pod, now), addresses[0] or "<none>", spec.get("nodeName") or "<none>",
        status.get("nominatedNodeName") or "<none>", "<none>",
    ]  # fmt: skip


def _pod_status(pod: Object) -> str:
    """The word that stands under STATUS: a reason if there is one, else the phase."""
    status = pod.get("status") or {}
    if "deletionTimestamp" in pod["metadata"]:
        return "Terminating"
    waits = _init_status(pod)
    if waits:
        return waits
    for container in status.get("containerStatuses") or ():
        for state in ("waiting", "terminated"):
            reason = ((container.get("state") or {}).get(state) or {}).get("reason")
            if reason and reason != "Completed":
                return str(reason)
    phase = status.get("reason") or status.get("phase") or "Unknown"
    return "Completed" if phase == "Succeeded" else str(phase)


def _init_status(pod: Object) -> str:
    """What stands there while init containers run: Init:1/2, or Init: and a reason. Empty when all are done."""
    status = pod.get("status") or {}
    statuses = status.get("initContainerStatuses") or []
    specs = {one.get("name"): one for one in pod["spec"].get("initContainers") or ()}
    for done, container in enumerate(statuses):
        state = container.get("state") or {}
        if (state.get("terminated") or {"exitCode": 1}).get("exitCode") == 0:
            continue
        beside = (specs.get(container.get("name")) or {}).get("restartPolicy") == "Always"
        if beside and container.get("started"):
            continue
        for word in ("terminated", "waiting"):
            reason = (state.get(word) or {}).get("reason")
            if reason and reason not in ("PodInitializing", "ContainerCreating"):
                return f"Init:{reason}"
        return f"Init:{done}/{len(pod['spec'].get('initContainers') or ())}" if "nodeName" in pod["spec"] else ""
    return ""


def _workload_texts(obj: Object) -> list[str]:
    """Containers, images and selector, for `-o wide`."""
    spec = obj.get("spec") or {}
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or []
    selector = selectors.to_text(selectors.from_object(spec.get("selector")))
    names, images = (",".join(str(one.get(key, "")) for one in containers) for key in ("name", "image"))
    return [names, images, selector or "<none>"]


def _deployment_cells(deployment: Object, now: float) -> Row:
    status = deployment.get("status") or {}
    wanted = (deployment.get("spec") or {}).get("replicas", 1)
    return [
        deployment["metadata"]["name"], f"{status.get('readyReplicas', 0)}/{wanted}",
        str(status.get("updatedReplicas", 0)), str(status.get("availableReplicas", 0)), _age(deployment, now),
        *_workload_texts(deployment),
    ]  # fmt: skip


def _replica_set_cells(replica_set: Object, now: float) -> Row:
    status = replica_set.get("status") or {}
    counts = [(replica_set.get("spec") or {}).get("replicas", 1), status.get("replicas", 0)]
    return [
        replica_set["metadata"]["name"], *(str(count) for count in (*counts, status.get("readyReplicas", 0))),
        _age(replica_set, now), *_workload_texts(replica_set),
    ]  # fmt: skip


def _node_cells(node: Object, now: float) -> Row:
    status, metadata = node.get("status") or {}, node["metadata"]
    info = status.get("nodeInfo") or {}
    ready = {one.get("status") for one in status.get("conditions") or () if one.get("type") == "Ready"}
    word = "Ready" if "True" in ready else "NotReady" if ready else "Unknown"
    if (node.get("spec") or {}).get("unschedulable"):
        word += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = sorted(key.removeprefix(prefix) for key in metadata.get("labels") or {} if key.startswith(prefix))

    def address(kind: str) -> str:
        found = (one.get("address") for one in status.get("addresses") or () if one.get("type") == kind)
        return next(found, None) or "<none>"

    return [
        metadata["name"], word, ",".join(roles) or "<none>", _age(node, now), info.get("kubeletVersion", ""),
        address("InternalIP"), address("ExternalIP"), info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>", info.get("containerRuntimeVersion") or "<unknown>",
    ]  # fmt: skip


def _service_cells(service: Object, now: float) -> Row:
    spec = service.get("spec") or {}
    kind = spec.get("type", "ClusterIP")
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    external = [*(spec.get("externalIPs") or ()), *(one.get("ip") or one.get("hostname", "") for one in ingress)]
    if kind == "ExternalName":
        external = [spec.get("externalName", "")]
    nothing = "<pending>" if kind == "LoadBalancer" else "<none>"
    ports = []
    for port in spec.get("ports") or ():
        number = f"{port.get('port')}:{port['nodePort']}" if port.get("nodePort") else port.get("port")
        ports.append(f"{number}/{port.get('protocol', 'TCP')}")
    selector = ",".join(f"{key}={value}" for key, value in (spec.get("selector") or {}).items())
    return [
        service["metadata"]["name"], kind, spec.get("clusterIP") or "<none>", ",".join(external) or nothing,
        ",".join(ports) or "<none>", _age(service, now), selector or "<none>",
    ]  # fmt: skip


def _slice_cells(endpoint_slice: Object, now: float) -> Row:
    ports = [str(port["port"]) for port in endpoint_slice.get("ports") or () if port.get("port")]
    addresses = [one for each in endpoint_slice.get("endpoints") or () for one in each.get("addresses") or ()]
    more = f" + {len(addresses) - 3} more..." if len(addresses) > 3 else ""
    return [
        endpoint_slice["metadata"]["name"], endpoint_slice.get("addressType", ""), ",".join(ports) or "<unset>",
        ",".join(addresses[:3]) + more or "<unset>", _age(endpoint_slice, now),
    ]  # fmt: skip


def _policy_cells(policy: Object, now: float) -> Row:
    selector = selectors.to_text(selectors.from_object((policy.get("spec") or {}).get("podSelector")))
    return [policy["metadata"]["name"], selector or "<none>", _age(policy, now)]


def _columns(narrow: str, wide: str = "") -> list[tuple[str, bool]]:
    return [(name, False) for name in narrow.split(",")] + [(name, True) for name in wide.split(",") if name]


_Layout = tuple[list[tuple[str, bool]], Callable[[Object, float], Row]]
_GENERIC: _Layout = (_columns("Name,Age"), _generic_cells)
_LAYOUTS: dict[tuple[str, str, str], _Layout] = {
    PODS.key: (
        _columns("Name,Ready,Status,Restarts,Age", "IP,Node,Nominated Node,Readiness Gates"), _pod_cells
    ),
    NODES.key: (
        _columns("Name,Status,Roles,Age,Version", "Internal-IP,External-IP,OS-Image,Kernel-Version,Container-Runtime"),
        _node_cells,
    ),
    SERVICES.key: (_columns("Name,Type,Cluster-IP,External-IP,Port(s),Age", "Selector"), _service_cells),
    ENDPOINT_SLICES.key: (_columns("Name,AddressType,Ports,Endpoints,Age"), _slice_cells),
    NETWORK_POLICIES.key: (_columns("Name,Pod-Selector,Age"), _policy_cells),
    NAMESPACES.key: (_columns("Name,Status,Age"), _namespace_cells),
    DEPLOYMENTS.key: (
        _columns("Name,Ready,Up-to-date,Available,Age", "Containers,Images,Selector"), _deployment_cells
    ),
    REPLICA_SETS.key: (
        _columns("Name,Desired,Current,Ready,Age", "Containers,Images,Selector"), _replica_set_cells
    ),
}  # fmt: skip
