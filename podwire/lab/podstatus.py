"""A pod's status, made of what is known of its containers and its network. Pure.

Source: k8s.io/kubernetes pkg/kubelet/kubelet_pods.go (getPhase), pkg/kubelet/status/generate.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Object = dict[str, Any]


def pod_status(
    spec: Mapping[str, Any],
    known: Object,
    node_addresses: Sequence[str],
    addresses: Sequence[str],
    init: Sequence[Object],
    containers: Sequence[Object],
    begun: bool,
    now: str,
) -> Object:
    """The status that follows `known`. `init` and `containers` are entries of containerStatuses, in the spec's order.

    `begun`: every one of the containers has run. Addresses are bare, those of the pod empty while it has none.
    """
    initialized = is_initialized(spec, init)
    shown = [_shown(one, initialized) for one in containers]
    running = bool(shown) and all(one["ready"] for one in shown)
    sidecars = [
        one for entry, one in zip(spec.get("initContainers") or (), init, strict=False) if _beside(entry)
    ]  # fmt: skip
    ready = running and initialized and all(one["ready"] for one in sidecars)
    status = {key: value for key, value in known.items() if key not in ("reason", "message")} | {
        "phase": phase(spec, init, shown, begun),
        "hostIP": node_addresses[0],
        "hostIPs": [{"ip": address} for address in node_addresses],
        "containerStatuses": shown,
        "conditions": conditions(
            known.get("conditions", []), {"Initialized": initialized, "ContainersReady": ready, "Ready": ready}, now
        ),
    }
    if init:
        status["initContainerStatuses"] = [_init_shown(one) for one in init]
    if addresses:
        status |= {"podIP": addresses[0], "podIPs": [{"ip": address} for address in addresses]}
    return status


def is_initialized(spec: Mapping[str, Any], init: Sequence[Object]) -> bool:
    """Whether all init containers have done what they are there for."""
    specs = spec.get("initContainers") or ()
    return len(init) == len(specs) and all(
        one["started"] if _beside(entry) else _code(one) == 0 for entry, one in zip(specs, init, strict=True)
    )


def phase(spec: Mapping[str, Any], init: Sequence[Object], containers: Sequence[Object], begun: bool) -> str:
    """Pending, Running, Succeeded or Failed."""
    policy = spec.get("restartPolicy", "Always")
    if policy == "Never" and any(
        _code(one) for entry, one in zip(spec.get("initContainers") or (), init, strict=False) if not _beside(entry)
    ):
        return "Failed"
    codes = [_code(one) for one in containers]
    over = bool(codes) and all(code is not None for code in codes)
    if over and (policy == "Never" or (policy == "OnFailure" and not any(codes))):
        return "Failed" if any(codes) else "Succeeded"
    return "Running" if begun and is_initialized(spec, init) else "Pending"


def conditions(known: Sequence[Object], wanted: Mapping[str, bool], now: str) -> list[Object]:
    """The conditions with new values; the time of the last change stays when the value does."""
    by_type = {condition["type"]: condition for condition in known}
    for kind, holds in wanted.items():
        value = str(holds)
        if by_type.get(kind, {}).get("status") != value:
            by_type[kind] = {"type": kind, "status": value, "lastTransitionTime": now}
    return list(by_type.values())


def _shown(container: Object, initialized: bool) -> Object:
    waiting = container["state"].get("waiting") or {}
    if not initialized and waiting.get("reason") == "ContainerCreating":
        return {**container, "state": {"waiting": {"reason": "PodInitializing"}}}
    return container


def _init_shown(container: Object) -> Object:
    """An init container that has done its work counts as ready."""
    return {**container, "ready": True} if _code(container) == 0 else container


def _beside(init_container: Mapping[str, Any]) -> bool:
    return init_container.get("restartPolicy") == "Always"


def _code(container: Object) -> int | None:
    code = (container["state"].get("terminated") or {}).get("exitCode")
    return None if code is None else int(code)
