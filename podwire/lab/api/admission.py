"""What the server makes of an object before it keeps it: defaults filled in, and the few checks that save a search.

Only what would otherwise fail later and further from its cause is checked: names, labels, containers and their ports,
the fields of a pod that cannot change. Messages follow the API's own form, `field: Invalid value: "x": what is right`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from podwire.lab.api import selectors
from podwire.lab.api.errors import BadRequest, Invalid
from podwire.lab.api.fields import Object, Problem, copied, dicts, shown
from podwire.lab.api.kinds import DEPLOYMENTS, NODES, PODS, REPLICA_SETS, SERVICES, Kind
from podwire.lab.api.services import carry_over, default_service, service_problems

__all__ = ["Object", "copied"]  # `fields` has them; they are asked for here as well

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME_RULES: dict[str, tuple[re.Pattern[str], int, str]] = {
    "subdomain": (
        re.compile(rf"{_LABEL}(\.{_LABEL})*"), 253,
        "a lowercase RFC 1123 subdomain: a-z, 0-9, '-' and '.', starting and ending alphanumeric, at most 253 long",
    ),
    "label": (
        re.compile(_LABEL), 63,
        "a lowercase RFC 1123 label: a-z, 0-9 and '-', starting and ending alphanumeric, at most 63 long",
    ),
    "service": (
        re.compile("[a-z]([-a-z0-9]*[a-z0-9])?"), 63,
        "an RFC 1035 label: a-z, 0-9 and '-', starting with a letter and ending alphanumeric, at most 63 long",
    ),
    "segment": (re.compile(r"(?!\.{1,2}$)[^/%]+"), 253, "one path segment: no '/' or '%', not '.' or '..'"),
}  # fmt: skip
_LABEL_KEY = re.compile(rf"({_LABEL}(\.{_LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile("([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_PROBE_DEFAULTS = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
_PERCENT = re.compile("[0-9]+%")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_SERVER_OWNED = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "name",
                 "namespace", "resourceVersion", "generateName", "selfLink")  # fmt: skip
_CHANGEABLE_POD_FIELDS = ("activeDeadlineSeconds", "terminationGracePeriodSeconds", "tolerations", "schedulingGates")

# --- new objects, and changed ones ------------------------------------------------------------------------------


def for_create(kind: Kind, obj: Object) -> Object:
    """The object as it will be kept, but for what the store itself says (uid, time, version). Raises Invalid."""
    new = _typed(kind, copied(obj))
    if kind.status and kind is not NODES:  # a node registers with its status; others get theirs from who watches them
        new.pop("status", None)
    metadata = new["metadata"]
    for field in ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"):
        metadata.pop(field, None)
    metadata["generation"] = 1
    default(kind, new)
    check(kind, new)
    return new


def for_update(kind: Kind, current: Object, proposed: Object, subresource: str = "") -> Object:
    """What `current` becomes when `proposed` is sent for it, or for its `status`. Raises Invalid."""
    if subresource == "status":
        return {**copied(current), "status": copied(proposed.get("status") or {})}
    new = _typed(kind, copied(proposed))
    if kind.status:
        new.pop("status", None)
        if "status" in current:
            new["status"] = copied(current["status"])
    metadata = new["metadata"]
    for field in _SERVER_OWNED:
        metadata.pop(field, None)
        if field in current["metadata"]:
            metadata[field] = current["metadata"][field]
    if kind is SERVICES:
        carry_over(current, new)
    default(kind, new)
    check(kind, new)
    if kind is PODS:
        _check_pod_change(current, new)
    if kind in (DEPLOYMENTS, REPLICA_SETS) and current["spec"].get("selector") != new["spec"].get("selector"):
        raise invalid(kind, new, [("spec.selector", "Invalid value: field is immutable")])
    if _desired(new) != _desired(current):
        metadata["generation"] = current["metadata"].get("generation", 1) + 1
    return new


def _typed(kind: Kind, obj: Object) -> Object:
    obj["apiVersion"], obj["kind"] = kind.api_version, kind.kind
    if not isinstance(obj.get("metadata"), dict):
        raise invalid(kind, obj, [("metadata", "Required value: an object needs metadata with a name")])
    obj["metadata"].pop("managedFields", None)  # field owners are not tracked: see patch.apply_patch
    return obj


def _desired(obj: Object) -> Object:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}


# --- defaults ---------------------------------------------------------------------------------------------------


def default(kind: Kind, obj: Object) -> None:
    """Fills in, in place, what readers of a kind rely on."""
    fill = _DEFAULTS.get(kind.key)
    if fill is not None:
        fill(obj)


def merged_by(kind: Kind, obj: Object) -> None:
    """Fills in, in place, what lists are merged by in a part of an object: a port that says no protocol means TCP."""
    spec = obj.get("spec")
    if not isinstance(spec, dict):
        return
    if kind in (DEPLOYMENTS, REPLICA_SETS):
        template = spec.get("template")
        spec = template.get("spec") if isinstance(template, dict) else None
    if kind is SERVICES:
        _default_ports(spec)
    elif kind in (PODS, DEPLOYMENTS, REPLICA_SETS) and isinstance(spec, dict):
        for _, container in _containers(spec):
            _default_ports(container)


def _default_ports(holder: Any) -> None:
    for port in dicts(holder.get("ports")):
        port.setdefault("protocol", "TCP")


def _default_pod(pod: Object) -> None:
    _default_pod_spec(pod.get("spec"))
    if isinstance(pod.get("spec"), dict):
        pod.setdefault("status", {}).setdefault("phase", "Pending")


def _default_pod_spec(spec: Any) -> None:
    if not isinstance(spec, dict):
        return
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("serviceAccountName", "default")
    for _, container in _containers(spec):
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            _default_probe(container.get(kind))
        for port in dicts(container.get("ports")):
            port.setdefault("protocol", "TCP")
            if spec.get("hostNetwork") and "containerPort" in port:
                port.setdefault("hostPort", port["containerPort"])


def _default_probe(probe: Any) -> None:
    if not isinstance(probe, dict):
        return
    for field, value in _PROBE_DEFAULTS.items():
        probe[field] = probe.get(field) or value
    if isinstance(probe.get("httpGet"), dict):
        probe["httpGet"].setdefault("path", "/")
        probe["httpGet"].setdefault("scheme", "HTTP")


def _default_replica_set(replica_set: Object) -> None:
    spec = replica_set.get("spec")
    if not isinstance(spec, dict):
        return
    spec.setdefault("replicas", 1)
    template = spec.get("template")
    if isinstance(template, dict):
        if not isinstance(template.get("metadata"), dict):
            template["metadata"] = {}
        template["metadata"].pop("creationTimestamp", None)  # null in what `kubectl create --dry-run -o yaml` writes
        _default_pod_spec(template.get("spec"))


def _default_deployment(deployment: Object) -> None:
    _default_replica_set(deployment)
    spec = deployment.get("spec")
    if not isinstance(spec, dict):
        return
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    strategy = spec.setdefault("strategy", {})
    if isinstance(strategy, dict) and strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        if isinstance(rolling, dict):
            rolling.setdefault("maxSurge", "25%")
            rolling.setdefault("maxUnavailable", "25%")


def _default_namespace(namespace: Object) -> None:
    namespace.setdefault("status", {}).setdefault("phase", "Active")


_DEFAULTS: dict[tuple[str, str, str], Callable[[Object], None]] = {
    PODS.key: _default_pod,
    SERVICES.key: default_service,
    DEPLOYMENTS.key: _default_deployment,
    REPLICA_SETS.key: _default_replica_set,
    ("", "v1", "namespaces"): _default_namespace,
}


# --- checks -----------------------------------------------------------------------------------------------------


def check(kind: Kind, obj: Object) -> None:
    """Raises Invalid with every problem found."""
    problems = list(_metadata_problems(kind, obj["metadata"]))
    if kind is PODS:
        problems += _pod_problems(obj.get("spec"))
    if kind in (DEPLOYMENTS, REPLICA_SETS):
        problems += _workload_problems(obj.get("spec"))
    if kind is SERVICES:
        problems += service_problems(obj.get("spec"))
    if problems:
        raise invalid(kind, obj, problems)


def _metadata_problems(kind: Kind, metadata: Mapping[str, Any]) -> Iterator[Problem]:
    name = metadata.get("name")
    rule, length, right = NAME_RULES[kind.name_rule]
    if not name:
        yield "metadata.name", "Required value: name or generateName is required"
    elif not isinstance(name, str) or len(name) > length or not rule.fullmatch(name):
        yield "metadata.name", f"Invalid value: {shown(name)}: must be {right}"
    for field in ("labels", "annotations"):
        values = metadata.get(field)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            yield f"metadata.{field}", f"Invalid value: {shown(values)}: must map keys to text"
            continue
        for key, value in values.items():
            if not _LABEL_KEY.fullmatch(key):
                yield (
                    f"metadata.{field}",
                    f"Invalid value: {shown(key)}: must be a name of at most 63 characters, or prefix/name",
                )
            if not isinstance(value, str):
                yield (
                    f"metadata.{field}",
                    f"Invalid value: {shown(value)}: {key} must be text: quote numbers and booleans",
                )
            elif field == "labels" and not _LABEL_VALUE.fullmatch(value):
                yield (
                    "metadata.labels",
                    f"Invalid value: {shown(value)}: {key} must be at most 63 of A-Za-z0-9-_., its ends alphanumeric",
                )


def _workload_problems(spec: Any) -> Iterator[Problem]:
    if not isinstance(spec, dict):
        yield "spec", "Required value: this needs a spec with a selector and a template"
        return
    for field, value in (("replicas", spec.get("replicas", 1)), ("minReadySeconds", spec.get("minReadySeconds", 0))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            yield f"spec.{field}", f"Invalid value: {shown(value)}: must be a number from 0 on"
    template = spec.get("template")
    if not isinstance(template, dict):
        yield "spec.template", "Required value: pods are made from a template"
        return
    for field, what in _pod_problems(template.get("spec")):
        yield f"spec.template.{field}", what
    inner = template.get("spec")
    policy = inner.get("restartPolicy", "Always") if isinstance(inner, dict) else "Always"
    if policy != "Always":
        yield "spec.template.spec.restartPolicy", f'Unsupported value: {shown(policy)}: supported values: "Always"'
    selector = spec.get("selector")
    if not isinstance(selector, dict) or not (selector.get("matchLabels") or selector.get("matchExpressions")):
        yield "spec.selector", "Required value: the pods are found by matchLabels or matchExpressions"
        return
    try:
        matches = selectors.from_object(selector).matches(template)
    except (BadRequest, KeyError, TypeError, AttributeError) as error:
        yield "spec.selector", f"Invalid value: {error}"
        return
    if not matches:
        labels = (template.get("metadata") or {}).get("labels") or {}
        yield "spec.template.metadata.labels", f"Invalid value: {labels}: `selector` does not match template `labels`"
    yield from _strategy_problems(spec.get("strategy"))


def _strategy_problems(strategy: Any) -> Iterator[Problem]:
    if strategy is None:
        return
    kinds = ("RollingUpdate", "Recreate")
    if not isinstance(strategy, dict) or strategy.get("type") not in kinds:
        yield "spec.strategy.type", f"Unsupported value: supported values: {', '.join(kinds)}"
        return
    rolling = strategy.get("rollingUpdate") or {}
    for field in ("maxSurge", "maxUnavailable"):
        value = rolling.get(field, 0)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 0) and not (
            isinstance(value, str) and _PERCENT.fullmatch(value)
        ):
            at = f"spec.strategy.rollingUpdate.{field}"
            yield at, f"Invalid value: {shown(value)}: must be a number from 0 on, or a percentage such as 25%"


def _pod_problems(spec: Any) -> Iterator[Problem]:
    if not isinstance(spec, dict):
        yield "spec", "Required value: a pod needs a spec with containers"
        return
    if not spec.get("containers") or not isinstance(spec["containers"], list):
        yield "spec.containers", "Required value: a pod needs at least one container"
    names: set[str] = set()
    rule, length, right = NAME_RULES["label"]
    for where, container in _containers(spec):
        name = container.get("name")
        if not name:
            yield f"{where}.name", "Required value: a container needs a name"
        elif not isinstance(name, str) or len(name) > length or not rule.fullmatch(name):
            yield f"{where}.name", f"Invalid value: {shown(name)}: must be {right}"
        elif name in names:
            yield f"{where}.name", f"Duplicate value: {shown(name)}: containers of a pod need names of their own"
        else:
            names.add(name)
        yield from _port_problems(where, container)
    if spec.get("restartPolicy", "Always") not in ("Always", "OnFailure", "Never"):
        yield (
            "spec.restartPolicy",
            f'Unsupported value: {shown(spec["restartPolicy"])}: supported values: "Always", "OnFailure", "Never"',
        )


def _port_problems(where: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    for number, port in enumerate(dicts(container.get("ports"))):
        at = f"{where}.ports[{number}]"
        if "containerPort" not in port:
            yield f"{at}.containerPort", "Required value: a port needs a number from 1 to 65535"
        for field in ("containerPort", "hostPort"):
            value = port.get(field, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65535:
                yield (
                    f"{at}.{field}",
                    f"Invalid value: {shown(value)}: must be a number between 1 and 65535, inclusive",
                )
        if port.get("protocol", "TCP") not in _PROTOCOLS:
            yield (
                f"{at}.protocol",
                f'Unsupported value: {shown(port["protocol"])}: supported values: "TCP", "UDP", "SCTP"',
            )


def _check_pod_change(current: Object, new: Object) -> None:
    before, after = _fixed_pod_fields(current["spec"]), _fixed_pod_fields(new["spec"])
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        raise invalid(PODS, new, [
            (f"spec.{key}", "Forbidden: a pod's spec cannot change but for container images, tolerations, "
             "activeDeadlineSeconds and terminationGracePeriodSeconds: delete the pod and create it anew")
            for key in changed
        ])  # fmt: skip


def _fixed_pod_fields(spec: Object) -> Object:
    fixed = {key: value for key, value in spec.items() if key not in _CHANGEABLE_POD_FIELDS}
    for field in ("containers", "initContainers"):
        if isinstance(spec.get(field), list):
            fixed[field] = [{k: v for k, v in one.items() if k != "image"} for one in dicts(spec[field])]
    return fixed


def _containers(spec: Mapping[str, Any]) -> Iterator[tuple[str, Object]]:
    """Each container with its path in the pod."""
    for field in ("initContainers", "containers"):
        for number, container in enumerate(dicts(spec.get(field))):
            yield f"spec.{field}[{number}]", container


def invalid(kind: Kind, obj: Object, problems: list[Problem]) -> Invalid:
    """The error that says what is wrong with an object."""
    metadata = obj.get("metadata")
    name = metadata.get("name", "") if isinstance(metadata, dict) else ""
    said = [f"{field}: {what}" for field, what in problems]
    causes = [{"field": field, "message": what} for field, what in problems]
    text = said[0] if len(said) == 1 else f"[{', '.join(said)}]"
    details = {"name": name, "kind": kind.kind, "group": kind.group, "causes": causes}
    return Invalid(f'{kind.kind} "{name}" is invalid: {text}', details)
