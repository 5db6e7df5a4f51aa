"""Services as the API server makes them: defaults, what is refused, what a change takes along and what it drops. Pure.

    create   default ─▶ problems ─▶ addresses (service_addresses.py)
    update   carry_over ─▶ default ─▶ problems ─▶ addresses

A client that sends a Service without the addresses and ports that it was given means to keep them; one that makes it
another type means to give up what that type has no use for, and need not say so.

Source: k8s.io/kubernetes pkg/apis/core/v1/defaults.go, pkg/apis/core/validation (ValidateService),
pkg/registry/core/service/strategy.go (dropTypeDependentFields) and storage (patchAllocatedValues).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from podwire.lab.api.fields import Object, Problem, dicts, is_number, shown

TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
AFFINITY_SECONDS, MAX_AFFINITY_SECONDS = 10_800, 86_400
_CHOICES = {
    "type": TYPES,
    "sessionAffinity": ("None", "ClientIP"),
    "externalTrafficPolicy": ("Cluster", "Local"),
    "internalTrafficPolicy": ("Cluster", "Local"),
    "ipFamilyPolicy": ("SingleStack", "PreferDualStack", "RequireDualStack"),
    "trafficDistribution": ("PreferClose", "PreferSameZone", "PreferSameNode"),
}
_PORT_NAME = re.compile("[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LONGEST_PORT_NAME = 63
_MAX_PORT = 65535


def needs_cluster_ip(spec: Mapping[str, Any]) -> bool:
    """Whether its type has a ClusterIP, which may be None."""
    return bool(spec.get("type", "ClusterIP") != "ExternalName")


def is_headless(spec: Mapping[str, Any]) -> bool:
    """Whether it says that it wants no ClusterIP."""
    return "None" in (spec.get("clusterIP"), *(spec.get("clusterIPs") or ()))


def needs_node_ports(spec: Mapping[str, Any]) -> bool:
    """Whether its ports are given node ports."""
    kind = spec.get("type")
    return kind == "NodePort" or (kind == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is not False)


def needs_health_port(spec: Mapping[str, Any]) -> bool:
    """Whether a balancer asks nodes for its endpoints."""
    return spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"


def is_external(spec: Mapping[str, Any]) -> bool:
    """Whether clients from outside have a way in."""
    return spec.get("type") in ("NodePort", "LoadBalancer") or bool(spec.get("externalIPs"))


# --- defaults ---------------------------------------------------------------------------------------------------


def default_service(service: Object) -> None:
    """Fills in, in place, what a Service that says nothing means."""
    spec = service.get("spec")
    if not isinstance(spec, dict):
        return
    kind = spec.setdefault("type", "ClusterIP")
    if spec.setdefault("sessionAffinity", "None") == "ClientIP":
        config = spec.get("sessionAffinityConfig") or {}
        if isinstance(config, dict):
            client = {"timeoutSeconds": AFFINITY_SECONDS} | (config.get("clientIP") or {})
            spec["sessionAffinityConfig"] = {**config, "clientIP": client}
    else:
        spec.pop("sessionAffinityConfig", None)
    for port in dicts(spec.get("ports")):
        port.setdefault("protocol", "TCP")
        if "port" in port and port.get("targetPort") in (None, "", 0):
            port["targetPort"] = port["port"]
    if needs_cluster_ip(spec):
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if is_external(spec) and needs_cluster_ip(spec):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)


# --- what is refused --------------------------------------------------------------------------------------------


def service_problems(spec: Any) -> Iterator[Problem]:
    """What is wrong with a `spec` in which defaults are filled in, its addresses apart."""
    if not isinstance(spec, dict):
        yield "spec", "Required value: a service needs a spec"
        return
    for field, choices in _CHOICES.items():
        if field in spec and spec[field] not in choices:
            known = ", ".join(f'"{choice}"' for choice in choices)
            yield f"spec.{field}", f"Unsupported value: {shown(spec[field])}: supported values: {known}"
    if not isinstance(spec.get("selector") or {}, dict):
        yield "spec.selector", f"Invalid value: {shown(spec['selector'])}: must map labels to values"
    if spec.get("type") == "ExternalName":
        if not spec.get("externalName"):
            yield "spec.externalName", "Required value"
        if any(spec.get(field) for field in ("clusterIP", "clusterIPs")):
            yield "spec.clusterIPs[0]", "Invalid value: may not be set for ExternalName services"
    yield from _affinity_problems(spec)
    yield from _ports_problems(spec)
    if spec.get("externalTrafficPolicy") and not is_external(spec):
        text = (
            f"Invalid value: {shown(spec['externalTrafficPolicy'])}: may only be set for externally-accessible services"
        )
        yield "spec.externalTrafficPolicy", text
    if spec.get("healthCheckNodePort") and not needs_health_port(spec):
        text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        yield "spec.healthCheckNodePort", f"Invalid value: {spec['healthCheckNodePort']}: {text}"


def _affinity_problems(spec: Object) -> Iterator[Problem]:
    if spec.get("sessionAffinity") != "ClientIP":
        return
    config = spec.get("sessionAffinityConfig")
    seconds = (config.get("clientIP") or {}).get("timeoutSeconds") if isinstance(config, dict) else None
    if not is_number(seconds, 1, MAX_AFFINITY_SECONDS):
        at = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        yield at, f"Invalid value: {seconds}: must be greater than 0 and less than {MAX_AFFINITY_SECONDS}"


def _ports_problems(spec: Object) -> Iterator[Problem]:
    ports = dicts(spec.get("ports"))
    if not ports and needs_cluster_ip(spec) and not is_headless(spec):
        yield "spec.ports", "Required value"
    names: set[str] = set()
    places: set[tuple[str, int]] = set()
    for number, port in enumerate(ports):
        at = f"spec.ports[{number}]"
        yield from _port_problems(at, port, named=len(ports) > 1)
        if spec.get("type") == "ClusterIP" and port.get("nodePort"):
            yield f"{at}.nodePort", "Forbidden: may not be used when `type` is 'ClusterIP'"
        name, place = port.get("name") or "", (str(port.get("protocol")), port.get("port", 0))
        if name in names and name:
            yield f"{at}.name", f"Duplicate value: {shown(name)}"
        if place in places:
            yield at, f"Duplicate value: {place[0]} port {place[1]}"
        names.add(name)
        places.add(place)


def _port_problems(at: str, port: Object, *, named: bool) -> Iterator[Problem]:
    name, target = port.get("name") or "", port.get("targetPort")
    if not name and named:
        yield f"{at}.name", "Required value"
    elif name and not (isinstance(name, str) and len(name) <= _LONGEST_PORT_NAME and _PORT_NAME.fullmatch(name)):
        yield f"{at}.name", f"Invalid value: {shown(name)}: must be a lowercase RFC 1123 label"
    if not is_number(port.get("port"), 1, _MAX_PORT):
        yield f"{at}.port", f"Invalid value: {shown(port.get('port'))}: must be between 1 and {_MAX_PORT}, inclusive"
    if port.get("protocol") not in ("TCP", "UDP", "SCTP"):
        known = '"SCTP", "TCP", "UDP"'
        yield f"{at}.protocol", f"Unsupported value: {shown(port.get('protocol'))}: supported values: {known}"
    if not isinstance(target, str) and not is_number(target, 1, _MAX_PORT):
        yield f"{at}.targetPort", f"Invalid value: {shown(target)}: must be between 1 and {_MAX_PORT}, inclusive"


# --- changes ----------------------------------------------------------------------------------------------------


def carry_over(current: Object, new: Object) -> None:
    """Gives `new`, in place, what `current` was given and it does not say, and drops what its type has no use for."""
    before, after = current.get("spec"), new.get("spec")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    _drop_unused(before, after)
    if needs_cluster_ip(before) and needs_cluster_ip(after):
        if not after.get("clusterIP") and not after.get("clusterIPs"):
            after |= {field: before[field] for field in ("clusterIP", "clusterIPs") if field in before}
        for field in ("ipFamilies", "ipFamilyPolicy"):
            if not after.get(field) and field in before:
                after[field] = before[field]
    if needs_node_ports(after):
        _carry_node_ports(dicts(before.get("ports")), dicts(after.get("ports")))
    if needs_health_port(before) and needs_health_port(after) and not after.get("healthCheckNodePort"):
        after["healthCheckNodePort"] = before.get("healthCheckNodePort", 0)


def _drop_unused(before: Object, after: Object) -> None:
    def drop(*fields: str) -> None:
        for field in fields:
            if field in after and after[field] == before.get(field):
                del after[field]

    if not needs_cluster_ip(after):
        drop("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy")
    if after.get("type") not in ("NodePort", "LoadBalancer"):
        given = {_place(port): port.get("nodePort") for port in dicts(before.get("ports"))}
        for port in dicts(after.get("ports")):
            if port.get("nodePort") and given.get(_place(port)) == port["nodePort"]:
                del port["nodePort"]
    if not is_external(after):
        drop("externalTrafficPolicy")
    if after.get("type") != "LoadBalancer":
        drop("allocateLoadBalancerNodePorts", "loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges")
    if not needs_health_port(after):
        drop("healthCheckNodePort")


def _carry_node_ports(before: list[Object], after: list[Object]) -> None:
    given = {_place(port): port.get("nodePort") for port in before}
    asked = {(port.get("nodePort"), port.get("protocol", "TCP")) for port in after}
    for port in after:
        number = given.get(_place(port))
        if number and not port.get("nodePort") and (number, port.get("protocol", "TCP")) not in asked:
            port["nodePort"] = number


def _place(port: Mapping[str, Any]) -> tuple[object, object]:
    return port.get("port"), port.get("protocol", "TCP")
