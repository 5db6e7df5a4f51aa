"""EndpointSlices: which pods a Service's connections may go to, kept as the pods become ready and go. Pure.

    Service's selector ─▶ pods of its namespace ─▶ endpoints, by family and by what its ports are there
                                                        │
    slices there are ──────────────────────────────────▶┴─▶ slices of at most 100, as few changed as possible

An endpoint stays in the slice that it is in; a new one goes where there is room. A pod that is not ready, or is being
deleted, stays listed, with conditions that say so: a proxy drains it. A target port that is a name is each pod's own
number, so pods that differ there are in slices of their own. Slices that somebody else manages are left alone.

Not done: mirroring of Endpoints objects (a Service without a selector takes slices), `topology-mode: Auto`.

Source: k8s.io/endpointslice (reconciler.go, utils.go, trafficdist); documentation "EndpointSlices".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from podwire.kube.objects import HEADLESS_LABEL, SERVICE_NAME_LABEL
from podwire.lab.api.fields import Object, copied, dicts
from podwire.lab.api.kinds import ENDPOINT_SLICES, SERVICES
from podwire.lab.api.services import is_headless
from podwire.lab.workloads import Action, Create, Delete, Update, is_going, is_ready, owner_reference

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
ZONE_LABEL = "topology.kubernetes.io/zone"
PER_SLICE = 100
_ENDED = ("Succeeded", "Failed")

Ports = tuple[tuple[tuple[str, Any], ...], ...]
"""The ports of a slice, as something that can be a key."""
Place = tuple[str, Ports]
"""Endpoints that may share a slice: address type, ports."""


def plan_endpoint_slices(
    service: Object, pods: Iterable[Object], zones: Mapping[str, str], slices: Iterable[Object]
) -> list[Action]:
    """What to do for one Service, given its namespace's pods and the slices that name it. `zones`: by node's name."""
    own = [each for each in slices if is_own(each) and not is_going(each)]
    if is_going(service) or not service["spec"].get("selector"):
        return []
    if service["spec"].get("type") == "ExternalName":
        return [Delete(ENDPOINT_SLICES, each) for each in own]
    wanted = wanted_endpoints(service, pods, zones)
    there: dict[Place, list[Object]] = defaultdict(list)
    for each in own:
        there[each["addressType"], _key(each.get("ports") or ())].append(each)
    actions: list[Action] = []
    for place in sorted(wanted.keys() | there.keys(), key=repr):
        actions += _fill(service, place, wanted.get(place, {}), there.get(place, []))
    return actions


def plan_stray_slices(services: Iterable[Object], slices: Iterable[Object]) -> list[Action]:
    """Deletes the slices that we made for Services that are gone."""
    there = {one["metadata"]["uid"] for one in services}
    return [
        Delete(ENDPOINT_SLICES, each)
        for each in slices
        if is_own(each)
        and not is_going(each)
        and not any(one.get("uid") in there for one in each["metadata"].get("ownerReferences") or ())
    ]


def is_own(endpoint_slice: Object) -> bool:
    """Whether this controller looks after a slice."""
    return (endpoint_slice["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER


# --- which endpoints --------------------------------------------------------------------------------------------


def wanted_endpoints(
    service: Object, pods: Iterable[Object], zones: Mapping[str, str]
) -> dict[Place, dict[str, Object]]:
    """The endpoints of a Service, by where they may be and by the pod's uid."""
    spec = service["spec"]
    selector = spec["selector"].items()
    families = spec.get("ipFamilies") or ["IPv4"]
    wanted: dict[Place, dict[str, Object]] = defaultdict(dict)
    for pod in pods:
        if not selector <= (pod["metadata"].get("labels") or {}).items() or not _counts(pod):
            continue
        ports = _key(ports_at(spec, pod))
        for address in pod["status"]["podIPs"]:
            family = "IPv6" if ":" in address["ip"] else "IPv4"
            if family in families:
                endpoint = endpoint_of(spec, pod, address["ip"], zones.get(pod["spec"]["nodeName"], ""))
                wanted[family, ports][pod["metadata"]["uid"]] = endpoint
    return wanted


def _counts(pod: Object) -> bool:
    """Whether a pod is an endpoint: it has an address, and has not ended."""
    status = pod.get("status") or {}
    return bool(status.get("podIPs") and pod["spec"].get("nodeName") and status.get("phase") not in _ENDED)


def ports_at(spec: Object, pod: Object) -> Iterator[Object]:
    """The Service's ports as numbers of this pod; one whose name the pod does not have is left out."""
    for port in dicts(spec.get("ports")):
        number = target_port(port, pod)
        if number is not None:
            found = {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
            yield found | ({"appProtocol": port["appProtocol"]} if port.get("appProtocol") else {})


def target_port(port: Object, pod: Object) -> int | None:
    """Where the pod takes what comes for a port of the Service; None when it has no port of that name."""
    target = str(port.get("targetPort", port["port"]))
    if target.isdigit():
        return int(target)
    for container in (*dicts(pod["spec"].get("containers")), *dicts(pod["spec"].get("initContainers"))):
        for one in dicts(container.get("ports")):
            if one.get("name") == target and one.get("protocol", "TCP") == port.get("protocol", "TCP"):
                return int(one["containerPort"])
    return None


def endpoint_of(spec: Object, pod: Object, address: str, zone: str) -> Object:
    """The entry of one address of a pod."""
    metadata, node = pod["metadata"], pod["spec"]["nodeName"]
    serving, terminating = is_ready(pod), is_going(pod)
    ready = bool(spec.get("publishNotReadyAddresses")) or (serving and not terminating)
    endpoint: Object = {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        "nodeName": node,
        "targetRef": {
            "kind": "Pod", "namespace": metadata["namespace"], "name": metadata["name"], "uid": metadata["uid"]
        },
    }  # fmt: skip
    if pod["spec"].get("hostname"):
        endpoint["hostname"] = pod["spec"]["hostname"]
    if zone:
        endpoint["zone"] = zone
    hints = hints_of(spec.get("trafficDistribution", ""), node, zone) if ready else {}
    return endpoint | ({"hints": hints} if hints else {})


def hints_of(distribution: str, node: str, zone: str) -> Object:
    """Whom an endpoint is for. Where nobody's endpoints are near, proxies take all."""
    hints: Object = {}
    if zone and distribution in ("PreferClose", "PreferSameZone", "PreferSameNode"):
        hints["forZones"] = [{"name": zone}]
    if distribution == "PreferSameNode":
        hints["forNodes"] = [{"name": node}]
    return hints


# --- in which slices --------------------------------------------------------------------------------------------


def _fill(service: Object, place: Place, wanted: Mapping[str, Object], there: Sequence[Object]) -> Iterator[Action]:
    """The slices of one place brought to `wanted`, a Mapping of pods' uids."""
    left = dict(wanted)
    kept: list[tuple[Object, list[Object]]] = []
    for each in there:
        uids = [(one.get("targetRef") or {}).get("uid") for one in each.get("endpoints") or ()]
        kept.append((each, [left.pop(uid) for uid in uids if uid in left]))
    new = list(left.values())
    for each, endpoints in sorted(kept, key=lambda pair: -len(pair[1])):
        room = PER_SLICE - len(endpoints)
        endpoints += new[:room] if endpoints or len(kept) == 1 else []
        new = new[room:] if endpoints else new
        if not endpoints:
            yield Delete(ENDPOINT_SLICES, each)
            continue
        changed = {**copied(each), "endpoints": endpoints}
        changed["metadata"]["labels"] = _labels(service)
        if changed != each:
            yield Update(ENDPOINT_SLICES, changed, service)
    for start in range(0, len(new), PER_SLICE):
        yield Create(ENDPOINT_SLICES, _new_slice(service, place, new[start : start + PER_SLICE]), None)


def _new_slice(service: Object, place: Place, endpoints: list[Object]) -> Object:
    metadata = service["metadata"]
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
        "kind": ENDPOINT_SLICES.kind,
        "metadata": {
            "generateName": f"{metadata['name']}-",
            "namespace": metadata["namespace"],
            "labels": _labels(service),
            "ownerReferences": [owner_reference(SERVICES, service)],
        },
        "addressType": place[0],
        "ports": [dict(port) for port in place[1]],
        "endpoints": endpoints,
    }


def _labels(service: Object) -> dict[str, str]:
    own = {SERVICE_NAME_LABEL: service["metadata"]["name"], MANAGED_BY: MANAGER}
    if is_headless(service["spec"]):
        own[HEADLESS_LABEL] = ""
    return {**(service["metadata"].get("labels") or {}), **own}


def _key(ports: Iterable[Object]) -> Ports:
    return tuple(sorted(tuple(sorted(port.items())) for port in ports))
