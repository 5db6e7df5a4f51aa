"""The lab's kubelets: what the store says about pods, made true in namespaces.

    store ──watch──▶ Kubelets ── one PodWorker per pod ──▶ sandbox ─▶ init containers ─▶ containers ─▶ status
                                        │ deletion        containers end ─▶ sandbox gone ─▶ object gone

Level-triggered: a worker reads the store's present state when it is woken, and an event that is lost costs nothing,
as the next list shows the same. A pod of the same name waits until the one before it is gone, since they share a
namespace's name.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from podwire.lab.api.errors import Gone, NotFound
from podwire.lab.api.kinds import CONFIG_MAPS, PODS, SECRETS
from podwire.lab.api.log import EventType
from podwire.lab.api.store import Store
from podwire.lab.container import Container, Place, now
from podwire.lab.events import record
from podwire.lab.podstatus import pod_status
from podwire.lab.probing import Prober, SocketOpener
from podwire.lab.program import plan_init_program, plan_program
from podwire.lab.sandbox import Sandbox
from podwire.lab.state import MARK, LabState

_log = logging.getLogger(__name__)
_SETTLED = ("Succeeded", "Failed")
_CONFIG_KINDS = {"ConfigMap": CONFIG_MAPS, "Secret": SECRETS}

Object = dict[str, Any]


class Kubelets:
    """The kubelets of all of a lab's nodes, in one event loop."""

    def __init__(self, state: LabState, store: Store) -> None:
        self._state = state
        self._store = store
        self._opener = SocketOpener()
        self._workers: dict[str, PodWorker] = {}  # by uid
        self._last: dict[tuple[str, str], asyncio.Task[None]] = {}  # by namespace and name

    async def run(self) -> None:
        """Follows the store for ever."""
        while True:
            try:
                present = {pod["metadata"]["uid"] for pod in self._store.list(PODS)}
                for uid, worker in self._workers.items():
                    if uid not in present:
                        worker.end()
                async for event in self._store.watch(PODS):
                    self._see(event.object, gone=event.type is EventType.DELETED)
            except Gone:  # too slow for the log: what is there now says it all
                continue

    def _see(self, pod: Object, gone: bool) -> None:
        uid = pod["metadata"]["uid"]
        worker = self._workers.get(uid)
        if worker is None and not gone and pod["spec"].get("nodeName") in {node.name for node in self._state.nodes}:
            if pod.get("status", {}).get("phase") in _SETTLED and "deletionTimestamp" not in pod["metadata"]:
                return
            worker = self._workers[uid] = PodWorker(self._state, self._store, self._opener, pod)
            key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
            task = asyncio.create_task(worker.run(self._last.get(key)), name=f"pod {key[0]}/{key[1]}")
            self._last[key] = task
            task.add_done_callback(lambda done: self._forget(uid, key, done))
        if worker is not None and (gone or "deletionTimestamp" in pod["metadata"]):
            worker.end(float(pod["metadata"].get("deletionGracePeriodSeconds", 0)))

    def _forget(self, uid: str, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._workers.pop(uid, None)
        if self._last.get(key) is task:
            del self._last[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("pod %s/%s: its worker ended", *key, exc_info=error)


class PodWorker:
    """One pod on its node, from its namespace to its end."""

    def __init__(self, state: LabState, store: Store, opener: SocketOpener, pod: Object) -> None:
        self._state = state
        self._store = store
        self._opener = opener
        self._pod = pod
        self._namespace = str(pod["metadata"]["namespace"])
        self._name = str(pod["metadata"]["name"])
        self._node = state.node(pod["spec"]["nodeName"])
        self._sandbox = Sandbox(state, pod, self._report)
        self._folder = state.files.pod_folder(self._namespace, self._name)
        self._ending = asyncio.Event()
        self._grace = 0.0
        self._init: list[Container] = []
        self._containers: list[Container] = []
        self._started = now()

    def end(self, grace_seconds: float = 0.0) -> None:
        """Asks it to take the pod down; a later call shortens the grace."""
        self._grace = min(self._grace, grace_seconds) if self._ending.is_set() else grace_seconds
        self._ending.set()

    async def run(self, predecessor: asyncio.Task[None] | None) -> None:
        """The whole life of the pod."""
        if predecessor is not None:
            await asyncio.wait([predecessor])
        keeping: asyncio.Task[None] | None = None
        try:
            if await self._sandbox.attach(self._ending):
                self._prepare_containers()
                keeping = asyncio.create_task(self._keep_containers())
                keeping.add_done_callback(self._note_failure)
                await self._ending.wait()
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.wait([keeping])
        await asyncio.gather(*(container.stop(self._grace) for container in (*self._init, *self._containers)))
        await self._sandbox.detach()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._remove_object()

    # --- the containers -----------------------------------------------------------------------------------------

    def _prepare_containers(self) -> None:
        spec, addresses = self._pod["spec"], self._sandbox.addresses
        status = self._pod.setdefault("status", {})
        status["hostIP"] = self._node.addresses[0]
        status["hostIPs"] = [{"ip": address} for address in self._node.addresses]
        self._folder.mkdir(parents=True, exist_ok=True)
        enter, mark = self._sandbox.enter, {MARK: self._state.name}
        prober = Prober(self._opener, self._sandbox.node_netns, addresses[0] if addresses else "", enter, mark)
        policy = str(spec.get("restartPolicy", "Always"))

        def made(container: Object, *, init: bool) -> Container:
            beside = is_sidecar(container)
            plan = partial(
                plan_init_program if init and not beside else plan_program,
                self._pod, container, addresses, find_object=self._find_object,
            )  # fmt: skip
            place = Place(
                enter=enter,
                log=self._folder / log_name(container["name"]),
                lab=self._state.name,
                grace_seconds=float(spec.get("terminationGracePeriodSeconds", 30)),
                changed=self._publish,
                report=self._report,
                why_not=prober.why_not,
            )
            own = "Always" if beside else "OnFailure" if init and policy == "Always" else policy
            return Container(container, plan, own, place)

        self._init = [made(one, init=True) for one in spec.get("initContainers") or ()]
        self._containers = [made(one, init=False) for one in spec["containers"]]
        self._publish()

    async def _keep_containers(self) -> None:
        """Runs the init containers to their ends, one after the other, and then all the others."""
        async with asyncio.TaskGroup() as group:
            for spec, container in zip(self._pod["spec"].get("initContainers") or (), self._init, strict=True):
                if is_sidecar(spec):
                    group.create_task(container.keep())
                    await container.settled.wait()
                    continue
                await container.keep()
                if container.ended:
                    return
            for container in self._containers:
                group.create_task(container.keep())

    def _find_object(self, kind: str, name: str) -> Object | None:
        return self._store.find(_CONFIG_KINDS[kind], name, self._namespace)

    def _note_failure(self, keeping: asyncio.Task[None]) -> None:
        if not keeping.cancelled() and (error := keeping.exception()) is not None:
            _log.error("pod %s/%s: its containers are not kept", self._namespace, self._name, exc_info=error)

    # --- what the API shows -------------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Writes the pod's status. A pod that is gone from the store needs none."""
        try:
            self._store.modify(PODS, self._name, self._namespace, self._with_status, subresource="status")
        except NotFound:
            self.end()

    def _with_status(self, pod: Object) -> Object:
        if pod["metadata"]["uid"] != self._pod["metadata"]["uid"]:
            return pod
        known = dict(pod.get("status", {})) | {"startTime": self._started}
        status = pod_status(
            self._pod["spec"], known, self._node.addresses, self._sandbox.addresses,
            [one.status() for one in self._init], [one.status() for one in self._containers],
            bool(self._containers) and all(one.begun for one in self._containers), now(),
        )  # fmt: skip
        return {**pod, "status": status}

    def _report(self, reason: str, message: str, kind: str = "Warning") -> None:
        """Says what happened: in the log, as an event, and in the status of a pod that does not run yet."""
        _log.log(logging.WARNING if kind == "Warning" else logging.INFO, "pod %s/%s: %s",
                 self._namespace, self._name, message)  # fmt: skip
        record(self._store, self._pod, reason, message, kind)
        if self._containers or self._store.find(PODS, self._name, self._namespace) is None:
            return

        def with_message(pod: Object) -> Object:
            return {**pod, "status": {**pod.get("status", {}), "reason": reason, "message": message}}

        self._store.modify(PODS, self._name, self._namespace, with_message, subresource="status")

    def _remove_object(self) -> None:
        try:
            uid = str(self._pod["metadata"]["uid"])
            if self._store.get(PODS, self._name, self._namespace)["metadata"]["uid"] == uid:
                self._store.delete(PODS, self._name, self._namespace, grace_seconds=0, uid=uid)
        except NotFound:  # someone deleted it without grace
            return


def is_sidecar(init_container: Mapping[str, Any]) -> bool:
    """Whether an init container runs beside the others instead of before them (its restartPolicy is Always)."""
    return init_container.get("restartPolicy") == "Always"


def log_name(container: str) -> str:
    """The file in the pod's folder that holds the container's output."""
    return f"{container}.log"


def log_path(state: LabState, namespace: str, pod: str, container: str) -> Path:
    """Where a container's output is."""
    return state.files.pod_folder(namespace, pod) / log_name(container)
