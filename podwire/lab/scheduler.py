"""The lab's scheduler: a pod that names no node goes to the one with the fewest pods that its selector allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from podwire.lab.api.errors import Conflict, Gone, NotFound
from podwire.lab.api.kinds import NODES, PODS
from podwire.lab.api.store import Store
from podwire.lab.events import record

_log = logging.getLogger(__name__)


def choose_node(
    pod: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], pods: Sequence[Mapping[str, Any]]
) -> str | None:
    """The node for `pod`, given all nodes and pods; None when no node fits. Ties go to the first in order."""
    wanted = pod["spec"].get("nodeSelector") or {}
    load = {
        str(node["metadata"]["name"]): 0
        for node in nodes
        if wanted.items() <= (node["metadata"].get("labels") or {}).items()
        and not (node.get("spec") or {}).get("unschedulable")
    }
    for other in pods:
        node = other["spec"].get("nodeName")
        if node in load and other.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            load[node] += 1
    return min(load, key=lambda name: load[name], default=None)


class Scheduler:
    """Binds pods as they come; what fits nowhere is looked at again when a node changes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def follow_pods(self) -> None:
        """Binds every pod that is made, for ever."""
        while True:
            try:
                async for event in self._store.watch(PODS):
                    self._bind(event.object["metadata"]["namespace"], event.object["metadata"]["name"])
            except Gone:
                continue

    async def follow_nodes(self) -> None:
        """Looks at the waiting pods again when a node appears or changes, for ever."""
        while True:
            try:
                async for _ in self._store.watch(NODES):
                    for pod in self._store.list(PODS):
                        self._bind(pod["metadata"]["namespace"], pod["metadata"]["name"])
            except Gone:
                continue

    def _bind(self, namespace: str, name: str) -> None:
        pod = self._store.find(PODS, name, namespace)
        if pod is None or pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]:
            return
        node = choose_node(pod, self._store.list(NODES), self._store.list(PODS))
        if node is None:
            record(self._store, pod, "FailedScheduling", "no node has the labels that the pod's nodeSelector asks for")
            return
        try:
            self._store.bind(name, namespace, node)
        except (NotFound, Conflict) as error:  # deleted or bound while we looked
            _log.info("pod %s/%s: %s", namespace, name, error)
