"""ReplicaSets: as many pods of a template as are asked for. Pure.

    pods that it controls ─▶ too few: make more      too many: delete those that are missed least      ─▶ status

A pod that does not count (workloads.is_active) is not replaced in place: a new one is made, with a new name, and so
with a new address. A pod whose labels no longer match is let go, and lives on by itself. Unlike Kubernetes, a pod
without an owner is never adopted: what somebody made by hand stays his.

Source: k8s.io/kubernetes pkg/controller/replicaset, and the order of `ActivePods` in pkg/controller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from podwire.lab.api import selectors
from podwire.lab.api.admission import copied
from podwire.lab.api.kinds import PODS, REPLICA_SETS
from podwire.lab.workloads import (
    Action,
    Create,
    Delete,
    SetStatus,
    Update,
    condition,
    is_active,
    is_available,
    is_controlled_by,
    is_going,
    is_ready,
    owner_reference,
)

Object = dict[str, Any]


def plan_replica_set(replica_set: Object, pods: Sequence[Object], now: float) -> list[Action]:
    """What to do for one ReplicaSet, given all pods of its namespace. `now` is in seconds since the epoch."""
    if is_going(replica_set):
        return []
    selector = selectors.from_object(replica_set["spec"].get("selector"))
    owned = [pod for pod in pods if is_controlled_by(pod, replica_set)]
    matching = [pod for pod in owned if selector.matches(pod)]
    actions: list[Action] = [_release(pod, replica_set) for pod in owned if not selector.matches(pod)]
    active = [pod for pod in matching if is_active(pod)]
    surplus = len(active) - int(replica_set["spec"].get("replicas", 1))
    if surplus < 0:
        actions += [Create(PODS, new_pod(replica_set), replica_set)] * -surplus
    else:
        actions += [Delete(PODS, pod, replica_set) for pod in deletion_order(active)[:surplus]]
    actions.append(SetStatus(REPLICA_SETS, replica_set, _status(replica_set, active, now)))
    return actions


def new_pod(replica_set: Object) -> Object:
    """A pod of its template; the server completes the name with five letters."""
    template = copied(replica_set["spec"]["template"])
    given = template.get("metadata") or {}
    metadata = {key: given[key] for key in ("labels", "annotations", "finalizers") if key in given}
    metadata |= {
        "generateName": f"{replica_set['metadata']['name']}-",
        "namespace": replica_set["metadata"]["namespace"],
        "ownerReferences": [owner_reference(REPLICA_SETS, replica_set)],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def deletion_order(pods: Sequence[Object]) -> list[Object]:
    """The pods, the least missed first: on no node, pending, not ready, on a crowded node, restarted, young."""
    crowd = Counter(pod["spec"].get("nodeName", "") for pod in pods)
    # The youngest first where all else is equal: `sorted` keeps the order of equals.
    young_first = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), reverse=True)

    def rank(pod: Object) -> tuple[bool, bool, bool, int, int]:
        status, node = pod.get("status") or {}, pod["spec"].get("nodeName", "")
        restarts = max((one.get("restartCount", 0) for one in status.get("containerStatuses") or ()), default=0)
        return (bool(node), status.get("phase") == "Running", is_ready(pod), -crowd[node], -restarts)

    return sorted(young_first, key=rank)


def _release(pod: Object, replica_set: Object) -> Update:
    free = copied(pod)
    uid = replica_set["metadata"]["uid"]
    references = [one for one in free["metadata"]["ownerReferences"] if one.get("uid") != uid]
    free["metadata"]["ownerReferences"] = references
    return Update(PODS, free, replica_set)


def _status(replica_set: Object, active: Sequence[Object], now: float) -> Object:
    spec = replica_set["spec"]
    patience = int(spec.get("minReadySeconds") or 0)
    labels = ((spec["template"].get("metadata") or {}).get("labels") or {}).items()
    labelled = [pod for pod in active if labels <= (pod["metadata"].get("labels") or {}).items()]
    status = {
        "replicas": len(active),
        "fullyLabeledReplicas": len(labelled),
        "readyReplicas": sum(is_ready(pod) for pod in active),
        "availableReplicas": sum(is_available(pod, patience, now) for pod in active),
        "observedGeneration": replica_set["metadata"].get("generation", 1),
    }
    failure = condition(replica_set, "ReplicaFailure")
    return status | ({"conditions": [failure]} if failure else {})
