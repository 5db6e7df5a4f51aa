"""What the controllers of workloads share: who owns what, when a pod counts, and what can be done. Pure.

    objects ─▶ plan_deployment / plan_replica_set / plan_orphans ─▶ Actions ─▶ controllers.py carries them out

A plan is a function of the objects as they are and of the time, and of nothing else. Carried out in part or twice it
does no harm: the next plan starts from what is there then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from podwire.lab.api.kinds import DEPLOYMENTS, PODS, REPLICA_SETS, Kind

Object = dict[str, Any]
HASH_LABEL = "pod-template-hash"
_SETTLED = ("Succeeded", "Failed")


class Create(msgspec.Struct, frozen=True):
    """Make this object; `owner` is who the event is about, None where it is worth none."""

    kind: Kind
    obj: Object
    owner: Object | None = None


class Update(msgspec.Struct, frozen=True):
    """Replace an object by this one, unless it has changed since; `why` (reason, message) becomes the owner's event."""

    kind: Kind
    obj: Object
    owner: Object
    why: tuple[str, str] = ("", "")


class SetStatus(msgspec.Struct, frozen=True):
    """Give an object this status; nothing happens when it has it."""

    kind: Kind
    obj: Object
    status: Object


class Delete(msgspec.Struct, frozen=True):
    """Remove an object, if it is still the one of that uid."""

    kind: Kind
    obj: Object
    owner: Object | None = None


Action = Create | Update | SetStatus | Delete


# --- owners -----------------------------------------------------------------------------------------------------


def owner_reference(kind: Kind, owner: Object) -> Object:
    """The `ownerReferences` entry of what `owner` controls."""
    metadata = owner["metadata"]
    return {
        "apiVersion": kind.api_version, "kind": kind.kind, "name": metadata["name"], "uid": metadata["uid"],
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def controller_of(obj: Object) -> Object | None:
    """The reference to whoever controls the object, or None."""
    references = obj["metadata"].get("ownerReferences") or ()
    return next((one for one in references if one.get("controller")), None)


def is_controlled_by(obj: Object, owner: Object) -> bool:
    """Whether `owner` controls the object."""
    reference = controller_of(obj)
    return reference is not None and reference.get("uid") == owner["metadata"]["uid"]


def plan_orphans(deployments: Sequence[Object], replica_sets: Sequence[Object], pods: Sequence[Object]) -> list[Action]:
    """Deletes what belonged to a Deployment or ReplicaSet that is gone: a deletion goes on to what its object owned."""
    there = {one["metadata"]["uid"] for one in (*deployments, *replica_sets)}
    actions: list[Action] = []
    for kind, objects in ((REPLICA_SETS, replica_sets), (PODS, pods)):
        for obj in objects:
            reference = controller_of(obj)
            if reference is None or is_going(obj) or reference.get("uid") in there:
                continue
            if any(_refers_to(reference, owner) for owner in (DEPLOYMENTS, REPLICA_SETS)):
                actions.append(Delete(kind, obj))
    return actions


def _refers_to(reference: Mapping[str, Any], kind: Kind) -> bool:
    return (reference.get("apiVersion"), reference.get("kind")) == (kind.api_version, kind.kind)


# --- pods -------------------------------------------------------------------------------------------------------


def is_going(obj: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in obj["metadata"]


def is_active(pod: Object) -> bool:
    """Whether the pod counts: it has not ended, and is not being deleted."""
    return not is_going(pod) and (pod.get("status") or {}).get("phase") not in _SETTLED


def condition(obj: Object, name: str) -> Object:
    """The condition of that type, empty when there is none."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == name), {})


def is_ready(pod: Object) -> bool:
    """Whether its Ready condition holds."""
    return bool(condition(pod, "Ready").get("status") == "True")


def is_available(pod: Object, min_ready_seconds: int, now: float) -> bool:
    """Whether it has been ready for that long."""
    if not is_ready(pod):
        return False
    since = condition(pod, "Ready").get("lastTransitionTime")
    return not min_ready_seconds or (since is not None and now - seconds(since) >= min_ready_seconds)


# --- times ------------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """A Kubernetes time as seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def timestamp(now: float) -> str:
    """Seconds since the epoch as Kubernetes writes a time."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
