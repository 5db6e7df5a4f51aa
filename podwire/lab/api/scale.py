"""The scale subresource (autoscaling/v1 Scale): how many replicas an object wants and has. Pure.

It is how `kubectl scale` changes a number without knowing the kind.
"""

from __future__ import annotations

from typing import Any

from podwire.lab.api import selectors
from podwire.lab.api.admission import copied
from podwire.lab.api.errors import Invalid
from podwire.lab.api.kinds import Kind

Object = dict[str, Any]
_SHARED = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")


def scale_of(obj: Object) -> Object:
    """The Scale of an object that has `spec.replicas`."""
    selector = selectors.to_text(selectors.from_object(obj["spec"].get("selector")))
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: obj["metadata"][key] for key in _SHARED if key in obj["metadata"]},
        "spec": {"replicas": obj["spec"].get("replicas", 1)},
        "status": {"replicas": (obj.get("status") or {}).get("replicas", 0), "selector": selector},
    }


def scaled(kind: Kind, obj: Object, scale: Object) -> Object:
    """The object as its Scale wants it, with the Scale's resourceVersion. Raises Invalid."""
    replicas = (scale.get("spec") or {}).get("replicas", 0)
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
        name = obj["metadata"]["name"]
        problem = f"Invalid value: {replicas}: must be a number from 0 on"
        details = {"name": name, "kind": kind.kind, "causes": [{"field": "spec.replicas", "message": problem}]}
        raise Invalid(f'Scale "{name}" is invalid: spec.replicas: {problem}', details)
    wanted = copied(obj)
    wanted["spec"]["replicas"] = replicas
    metadata = scale.get("metadata") or {}
    for field in ("uid", "resourceVersion"):
        if metadata.get(field):
            wanted["metadata"][field] = metadata[field]
    return wanted
