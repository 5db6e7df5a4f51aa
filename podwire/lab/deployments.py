"""Deployments: one ReplicaSet per template, the new one growing as the old ones shrink. Pure.

    template ─hash─▶ ReplicaSet web-6f9c…            RollingUpdate   up to replicas + maxSurge pods in all,
    replicas, strategy ─▶ size of each ReplicaSet                    at least replicas - maxUnavailable available
                                                     Recreate        the old ones go first, to the last pod

A ReplicaSet keeps the template that it was made for, so going back to an old template grows the old ReplicaSet. The
name's hash is a digest of the template, of our own making: nobody may rely on another cluster's.

Not done: sharing a change of `replicas` out between old and new in the middle of a rollout (they end up at the same
sizes), and adopting ReplicaSets without an owner.

Source: k8s.io/kubernetes pkg/controller/deployment (rolling.go, sync.go, progress.go).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from podwire.lab.api.admission import copied
from podwire.lab.api.kinds import DEPLOYMENTS, REPLICA_SETS
from podwire.lab.workloads import (
    HASH_LABEL,
    Action,
    Create,
    Delete,
    SetStatus,
    Update,
    condition,
    is_controlled_by,
    is_going,
    owner_reference,
    seconds,
    timestamp,
)

Object = dict[str, Any]
REVISION = "deployment.kubernetes.io/revision"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # no vowels, so no words


class Size(msgspec.Struct, frozen=True):
    """A ReplicaSet's size: how many pods it shall have, and how many of them are available."""

    wanted: int
    available: int = 0


def plan_deployment(
    deployment: Object, replica_sets: Sequence[Object], pods: Sequence[Object], now: float
) -> list[Action]:
    """What to do for one Deployment, given its namespace's ReplicaSets and pods. `now`: seconds since the epoch."""
    if is_going(deployment):
        return []
    owned = [one for one in replica_sets if is_controlled_by(one, deployment) and not is_going(one)]
    owned.sort(key=lambda one: (one["metadata"].get("creationTimestamp", ""), revision(one), one["metadata"]["name"]))
    new = find_new(deployment, owned)
    old = [one for one in owned if one is not new]
    new_size, old_sizes = plan_sizes(deployment, new, old, pods)
    actions: list[Action] = []
    number = max([revision(one) for one in old], default=0) + 1
    if new is not None and revision(new) > number:
        number = revision(new)
    if new is None:
        if new_size is not None:
            actions.append(Create(REPLICA_SETS, new_replica_set(deployment, new_size, number), deployment))
    else:
        actions += _resize(deployment, new, new_size if new_size is not None else _wanted(new), number)
    for one, size in zip(old, old_sizes, strict=True):
        actions += _resize(deployment, one, size, revision(one))
    actions += [Delete(REPLICA_SETS, one) for one in _outdated(deployment, old)]
    if new is not None and revision(deployment) != number:
        noted = copied(deployment)
        noted["metadata"]["annotations"] = {**(noted["metadata"].get("annotations") or {}), REVISION: str(number)}
        actions.append(Update(DEPLOYMENTS, noted, deployment))
    actions.append(SetStatus(DEPLOYMENTS, deployment, _status(deployment, new, old, now)))
    return actions


# --- which ReplicaSet -------------------------------------------------------------------------------------------


def template_hash(template: Mapping[str, Any]) -> str:
    """Ten letters that stand for a pod template."""
    digest = hashlib.sha256(json.dumps(_essence(template), sort_keys=True).encode()).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:10])


def find_new(deployment: Object, owned: Sequence[Object]) -> Object | None:
    """The ReplicaSet of the Deployment's present template, or None."""
    wanted = _essence(deployment["spec"]["template"])
    return next((one for one in owned if _essence(one["spec"]["template"]) == wanted), None)


def new_replica_set(deployment: Object, replicas: int, number: int) -> Object:
    """The ReplicaSet of the Deployment's present template."""
    spec, metadata = deployment["spec"], deployment["metadata"]
    template = copied(spec["template"])
    digest = template_hash(template)
    labels = {**((template.get("metadata") or {}).get("labels") or {}), HASH_LABEL: digest}
    template["metadata"] = {**(template.get("metadata") or {}), "labels": labels}
    selector = copied(spec["selector"])
    selector["matchLabels"] = {**(selector.get("matchLabels") or {}), HASH_LABEL: digest}
    kept = {key: value for key, value in (metadata.get("annotations") or {}).items() if key != _LAST_APPLIED}
    return {
        "apiVersion": REPLICA_SETS.api_version,
        "kind": REPLICA_SETS.kind,
        "metadata": {
            "name": f"{metadata['name']}-{digest}",
            "namespace": metadata["namespace"],
            "labels": dict(labels),
            "annotations": kept | {REVISION: str(number)},
            "ownerReferences": [owner_reference(DEPLOYMENTS, deployment)],
        },
        "spec": {
            "replicas": replicas,
            "minReadySeconds": int(spec.get("minReadySeconds") or 0),
            "selector": selector,
            "template": template,
        },
    }


def revision(obj: Object) -> int:
    """The number of the rollout that an object belongs to; 0 when it says none."""
    text = (obj["metadata"].get("annotations") or {}).get(REVISION, "")
    return int(text) if text.isdigit() else 0


def _essence(value: Any) -> Any:
    """A template by which it is compared: without the hash, and without the empty fields that typed clients write."""
    if isinstance(value, Mapping):
        inner = {key: _essence(item) for key, item in value.items() if key != HASH_LABEL}
        return {key: item for key, item in inner.items() if item not in (None, {}, [])}
    return [_essence(item) for item in value] if isinstance(value, list) else value


def _outdated(deployment: Object, old: Sequence[Object]) -> list[Object]:
    """The empty ReplicaSets beyond those that are kept for going back."""
    limit = int(deployment["spec"].get("revisionHistoryLimit", 10))
    empty = [one for one in old if _wanted(one) == 0 and (one.get("status") or {}).get("replicas", 0) == 0]
    empty.sort(key=revision)
    return empty[: max(0, len(empty) - limit)]


# --- how large --------------------------------------------------------------------------------------------------


def plan_sizes(
    deployment: Object, new: Object | None, old: Sequence[Object], pods: Sequence[Object]
) -> tuple[int | None, list[int]]:
    """How many pods the new ReplicaSet (None: leave it) and each of the old ones (oldest first) shall have."""
    spec = deployment["spec"]
    replicas, unchanged = int(spec.get("replicas", 1)), [_wanted(one) for one in old]
    if spec.get("paused"):
        return (None if new is None or any(unchanged) else replicas), unchanged
    if (spec.get("strategy") or {}).get("type") == "Recreate":
        old_left = any(is_controlled_by(pod, one) for pod in pods for one in old)
        return (None if old_left else replicas), [0] * len(old)
    surge, unavailable = limits(spec, replicas)
    new_size = None if new is None else _size(new)
    return rolling_sizes(replicas, surge, unavailable, new_size, [_size(one) for one in old])


def limits(spec: Mapping[str, Any], replicas: int) -> tuple[int, int]:
    """maxSurge and maxUnavailable in pods: percentages of `replicas`, the first rounded up, the second down."""
    rolling = (spec.get("strategy") or {}).get("rollingUpdate") or {}
    surge = _in_pods(rolling.get("maxSurge", "25%"), replicas, up=True)
    unavailable = min(_in_pods(rolling.get("maxUnavailable", "25%"), replicas, up=False), replicas)
    return surge, unavailable or (0 if surge else 1)  # both 0: nothing would ever move


def _in_pods(value: int | str, replicas: int, *, up: bool) -> int:
    if isinstance(value, str):
        percent = int(value.rstrip("%")) * replicas
        return -(-percent // 100) if up else percent // 100
    return int(value)


def rolling_sizes(
    replicas: int, surge: int, unavailable: int, new: Size | None, old: Sequence[Size]
) -> tuple[int, list[int]]:
    """The next step of a rolling update. `new` None: there is no new ReplicaSet yet. `old`: the oldest first.

    The old ones shrink by what is available beyond the least that there must be; pods of theirs that are not available
    serve nobody and go first.
    """
    wanted, old_wanted = new.wanted if new else 0, sum(one.wanted for one in old)
    room = max(0, replicas + surge - wanted - old_wanted)
    grown = replicas if wanted >= replicas else wanted + min(room, replicas - wanted)
    least = replicas - unavailable
    new_available = new.available if new else 0
    spare = wanted + old_wanted - least - max(0, wanted - new_available)
    sizes = [one.wanted for one in old]
    for index, one in enumerate(old):
        idle = min(max(0, one.wanted - one.available), max(0, spare))
        sizes[index] -= idle
        spare -= idle
    spare = new_available + sum(min(one.available, one.wanted) for one in old) - least
    for index in range(len(sizes)):
        fewer = min(sizes[index], max(0, spare))
        sizes[index] -= fewer
        spare -= fewer
    return grown, sizes


def _wanted(replica_set: Object) -> int:
    return int(replica_set["spec"].get("replicas", 1))


def _size(replica_set: Object) -> Size:
    return Size(_wanted(replica_set), int((replica_set.get("status") or {}).get("availableReplicas", 0)))


def _resize(deployment: Object, replica_set: Object, size: int, number: int) -> list[Action]:
    patience = int(deployment["spec"].get("minReadySeconds") or 0)
    changed = copied(replica_set)
    changed["spec"]["replicas"] = size
    changed["spec"]["minReadySeconds"] = patience
    changed["metadata"]["annotations"] = {**(changed["metadata"].get("annotations") or {}), REVISION: str(number)}
    if changed == replica_set:
        return []
    before, name = _wanted(replica_set), replica_set["metadata"]["name"]
    direction = "up" if size > before else "down"
    why = ("ScalingReplicaSet", f"Scaled {direction} replica set {name} from {before} to {size}")
    return [Update(REPLICA_SETS, changed, deployment, why if size != before else ("", ""))]


# --- status -----------------------------------------------------------------------------------------------------


def _status(deployment: Object, new: Object | None, old: Sequence[Object], now: float) -> Object:
    def count(replica_sets: Sequence[Object], field: str) -> int:
        return sum(int((one.get("status") or {}).get(field, 0)) for one in replica_sets)

    every = [*old, *([new] if new else [])]
    available = count(every, "availableReplicas")
    status: Object = {
        "observedGeneration": deployment["metadata"].get("generation", 1),
        "replicas": count(every, "replicas"),
        "updatedReplicas": count([new] if new else [], "replicas"),
        "readyReplicas": count(every, "readyReplicas"),
        "availableReplicas": available,
        "unavailableReplicas": max(0, sum(_wanted(one) for one in every) - available),
    }
    replicas = int(deployment["spec"].get("replicas", 1))
    _, unavailable = limits(deployment["spec"], replicas)
    if (deployment["spec"].get("strategy") or {}).get("type") == "Recreate":
        unavailable = 0
    enough = available >= replicas - unavailable
    conditions = [
        _availability(deployment, enough, now),
        *_progress(deployment, new, status, now),
    ]
    return status | {"conditions": conditions}


def is_rolled_out(deployment: Object, status: Mapping[str, Any]) -> bool:
    """Whether all pods are of the present template and available, and no others are left."""
    replicas = int(deployment["spec"].get("replicas", 1))
    counts = (status.get("updatedReplicas", 0), status.get("replicas", 0), status.get("availableReplicas", 0))
    observed = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 1)
    return observed and all(count == replicas for count in counts)


def _availability(deployment: Object, enough: bool, now: float) -> Object:
    if enough:
        reason, message = "MinimumReplicasAvailable", "Deployment has minimum availability."
    else:
        reason, message = "MinimumReplicasUnavailable", "Deployment does not have minimum availability."
    return _condition(deployment, "Available", str(enough), reason, message, now)


def _progress(deployment: Object, new: Object | None, status: Object, now: float) -> list[Object]:
    """The Progressing condition; as it was while the Deployment is paused."""
    known = condition(deployment, "Progressing")
    if deployment["spec"].get("paused"):
        return [_condition(deployment, "Progressing", "Unknown", "DeploymentPaused", "Deployment is paused", now)]
    name = new["metadata"]["name"] if new else ""
    if new is not None and is_rolled_out(deployment, status):
        text = f'ReplicaSet "{name}" has successfully progressed.'
        return [_condition(deployment, "Progressing", "True", "NewReplicaSetAvailable", text, now)]
    before = deployment.get("status") or {}
    moved = any(
        status[field] > before.get(field, 0) for field in ("updatedReplicas", "readyReplicas", "availableReplicas")
    ) or status["replicas"] - status["updatedReplicas"] < before.get("replicas", 0) - before.get("updatedReplicas", 0)
    if known.get("reason") == "NewReplicaSetAvailable" and status["replicas"] == status["updatedReplicas"]:
        return [known]  # the rollout is done; a pod that fails later does not begin it anew
    begun = status["observedGeneration"] != before.get("observedGeneration") or known.get("reason") in (
        None, "NewReplicaSetAvailable", "DeploymentPaused",
    )  # fmt: skip
    deadline = int(deployment["spec"].get("progressDeadlineSeconds", 600))
    if not (moved or begun):
        late = now - seconds(known["lastUpdateTime"]) > deadline
        if known.get("status") == "False" or late:
            text = f'ReplicaSet "{name}" has timed out progressing.'
            return [_condition(deployment, "Progressing", "False", "ProgressDeadlineExceeded", text, now)]
        return [known]
    text = f'ReplicaSet "{name}" is progressing.' if new else "The new ReplicaSet is being made."
    reason = "ReplicaSetUpdated" if new else "NewReplicaSetCreated"
    return [{**_condition(deployment, "Progressing", "True", reason, text, now), "lastUpdateTime": timestamp(now)}]


def _condition(deployment: Object, name: str, value: str, reason: str, message: str, now: float) -> Object:
    """A condition; one that says what it said before keeps its times."""
    known = condition(deployment, name)
    if (known.get("status"), known.get("reason"), known.get("message")) == (value, reason, message):
        return known
    since = known["lastTransitionTime"] if known.get("status") == value else timestamp(now)
    return {
        "type": name, "status": value, "reason": reason, "message": message, "lastUpdateTime": timestamp(now),
        "lastTransitionTime": since,
    }  # fmt: skip
