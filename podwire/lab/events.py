"""Kubernetes Events of the lab's own making: `kubectl describe` and `kubectl get events` say what went wrong."""

from __future__ import annotations

import hashlib
from typing import Any

from podwire.lab.api.errors import ApiError
from podwire.lab.api.kinds import BUILTIN
from podwire.lab.api.store import Store
from podwire.lab.container import now

_EVENTS = next(kind for kind in BUILTIN if kind.kind == "Event")


def record(store: Store, about: dict[str, Any], reason: str, message: str, kind: str = "Warning") -> None:
    """Records an event about an object; one that says the same again is counted, not repeated."""
    metadata = about["metadata"]
    namespace = metadata.get("namespace", "default")
    digest = hashlib.sha256(f"{metadata.get('uid')}{reason}{message}".encode()).hexdigest()[:16]
    name = f"{metadata['name']}.{digest}"
    known = store.find(_EVENTS, name, namespace)
    event = known or {
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": about.get("apiVersion", "v1"),
            "kind": about.get("kind", "Pod"),
            "namespace": namespace,
            "name": metadata["name"],
            "uid": metadata.get("uid", ""),
        },
        "reason": reason,
        "message": message,
        "type": kind,
        "source": {"component": "podwire-lab"},
        "firstTimestamp": now(),
        "count": 0,
    }
    event |= {"lastTimestamp": now(), "count": event["count"] + 1}
    try:
        store.update(_EVENTS, event) if known else store.create(_EVENTS, event)
    except ApiError:  # its namespace is going away, and its events with it
        return
