"""The lab's kubelets: what the store says about pods, made true in namespaces.

    store ──watch──▶ Kubelets ── one PodWorker per pod ──▶ namespace ─▶ CNI ADD ─▶ containers ─▶ status
                                        │ deletion        containers end ─▶ CNI DEL ─▶ namespace gone ─▶ object gone

Level-triggered: a worker reads the store's present state when it is woken, and an event that is lost costs nothing,
as the next list shows the same. A pod of the same name waits until the one before it is gone, since they share a
namespace's name.

As a runtime does, a failed ADD is followed by DEL, and the next try is in a new namespace under a new container id.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from typing import Any

from podwire.errors import PodwireError
from podwire.lab import names, process
from podwire.lab.api.errors import Gone, NotFound
from podwire.lab.api.kinds import PODS
from podwire.lab.api.log import EventType
from podwire.lab.api.store import Store
from podwire.lab.cni import Attachment, Runtime, result_addresses
from podwire.lab.container import Container, now, plan_program
from podwire.lab.events import record
from podwire.lab.node import enter_command
from podwire.lab.state import MARK, LabState

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 5.0
_SETTLED = ("Succeeded", "Failed")

Object = dict[str, Any]


class Kubelets:
    """The kubelets of all of a lab's nodes, in one event loop."""

    def __init__(self, state: LabState, store: Store) -> None:
        self._state = state
        self._store = store
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
            worker = self._workers[uid] = PodWorker(self._state, self._store, pod)
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

    def __init__(self, state: LabState, store: Store, pod: Object) -> None:
        self._state = state
        self._store = store
        self._pod = pod
        self._namespace = str(pod["metadata"]["namespace"])
        self._name = str(pod["metadata"]["name"])
        self._node = state.node(pod["spec"]["nodeName"])
        self._on_host = bool(pod["spec"].get("hostNetwork"))
        self._ending = asyncio.Event()
        self._grace = 0.0
        self._attachment: Attachment | None = None
        self._result: Object | None = None
        self._addresses: tuple[str, ...] = ()
        self._containers: list[Container] = []
        self._started = now()
        self._netns_name = names.pod_namespace(state.name, self._namespace, self._name)

    def end(self, grace_seconds: float = 0.0) -> None:
        """Asks it to take the pod down; a later call shortens the grace."""
        self._grace = min(self._grace, grace_seconds) if self._ending.is_set() else grace_seconds
        self._ending.set()

    async def run(self, predecessor: asyncio.Task[None] | None) -> None:
        """The whole life of the pod."""
        if predecessor is not None:
            await asyncio.wait([predecessor])
        tasks: list[asyncio.Task[None]] = []
        try:
            if await self._attach():
                self._prepare_containers()
                tasks = [asyncio.create_task(container.keep()) for container in self._containers]
                await self._ending.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(container.stop(self._grace) for container in self._containers))
        await self._detach()
        self._remove_object()

    # --- the network --------------------------------------------------------------------------------------------

    async def _attach(self) -> bool:
        """Gives the pod its network, trying for as long as it takes; False when the pod is to end."""
        if self._on_host:
            self._addresses = self._node.addresses
            return not self._ending.is_set()
        tries = 0
        while not self._ending.is_set():
            try:
                await self._make_namespace()
                self._attachment = self._new_attachment()
                self._result = await self._runtime().add(self._attachment)
                self._addresses = result_addresses(self._result)
                return True
            except (PodwireError, OSError) as error:
                self._report("FailedCreatePodSandBox", f"failed to set up the pod's network: {error}")
            await self._detach()
            await self._pause(tries)
            tries += 1
        return False

    async def _detach(self) -> None:
        """Takes the pod's network away, trying for as long as it takes."""
        if self._on_host:
            return
        await self._kill_strays()
        tries = 0
        while self._attachment is not None:
            try:
                await self._runtime().delete(self._attachment, self._result)
                self._attachment = self._result = None
            except (PodwireError, OSError) as error:
                self._report("FailedKillPod", f"failed to take the pod's network down: {error}")
                await asyncio.sleep(_back_off(tries))
                tries += 1
        await self._delete_namespace()

    def _runtime(self) -> Runtime:
        files, node = self._state.files, self._node.name
        bin_dir, conf_dir = files.node_path(node, "/opt/cni/bin"), files.node_path(node, "/etc/cni/net.d")
        return Runtime(enter_command(self._state, node), bin_dir, conf_dir, {MARK: self._state.name})

    async def _make_namespace(self) -> None:
        await self._delete_namespace()  # what an earlier try may have left
        await _ip("netns", "add", self._netns_name)
        await _ip("-n", self._netns_name, "link", "set", "lo", "up")

    async def _delete_namespace(self) -> None:
        if names.netns_path(self._netns_name).exists():
            await _ip("netns", "delete", self._netns_name)

    async def _kill_strays(self) -> None:
        """Ends what containers started and left behind; one of them would keep the namespace alive."""
        try:
            inode = names.netns_path(self._netns_name).stat().st_ino
        except FileNotFoundError:
            return
        pids = frozenset({inode})
        await asyncio.to_thread(process.kill_all, lambda: process.in_namespaces(pids), 5.0)

    def _new_attachment(self) -> Attachment:
        container_id = secrets.token_hex(32)
        args = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": self._namespace,
            "K8S_POD_NAME": self._name,
            "K8S_POD_INFRA_CONTAINER_ID": container_id,
            "K8S_POD_UID": str(self._pod["metadata"]["uid"]),
        }
        netns = str(names.netns_path(self._netns_name))
        return Attachment(container_id=container_id, netns=netns, args=tuple(args.items()))

    async def _pause(self, tries: int) -> None:
        try:
            async with asyncio.timeout(_back_off(tries)):
                await self._ending.wait()
        except TimeoutError:
            return

    # --- the containers -----------------------------------------------------------------------------------------

    def _prepare_containers(self) -> None:
        spec = self._pod["spec"]
        self._pod.setdefault("status", {})["hostIP"] = self._node.addresses[0]
        netns = None if self._on_host else names.netns_path(self._netns_name)
        enter = enter_command(self._state, self._node.name, netns)
        folder = self._state.files.pod_folder(self._namespace, self._name)
        folder.mkdir(parents=True, exist_ok=True)
        if spec.get("initContainers"):
            self._report("InitContainersSkipped", "the lab does not run init containers")
        for container in spec["containers"]:
            program = plan_program(self._pod, container, self._addresses)
            for warning in program.warnings:
                self._report("ContainerChanged", f"container {container['name']}: {warning}")
            log = folder / f"{container['name']}.log"
            policy = spec.get("restartPolicy", "Always")
            made = Container(container, program, enter, log, policy, self._state.name, self._publish)
            self._containers.append(made)
        self._publish()

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
        status = dict(pod.get("status", {}))
        status |= {
            "phase": self._phase(),
            "hostIP": self._node.addresses[0],
            "hostIPs": [{"ip": address} for address in self._node.addresses],
            "startTime": self._started,
            "containerStatuses": [container.status() for container in self._containers],
        }
        if self._addresses:
            status |= {"podIP": self._addresses[0], "podIPs": [{"ip": address} for address in self._addresses]}
        ready = bool(self._containers) and all(container.ready for container in self._containers)
        kinds = {"Initialized": True, "ContainersReady": ready, "Ready": ready}
        status["conditions"] = _conditions(status.get("conditions", []), kinds)
        for field in ("reason", "message"):
            status.pop(field, None)
        return {**pod, "status": status}

    def _phase(self) -> str:
        codes = [container.ended for container in self._containers]
        if codes and all(code is not None for code in codes):
            policy = self._pod["spec"].get("restartPolicy", "Always")
            if policy == "Never" or (policy == "OnFailure" and not any(codes)):
                return "Failed" if any(codes) else "Succeeded"
        return "Running" if codes and all(container.begun for container in self._containers) else "Pending"

    def _report(self, reason: str, message: str) -> None:
        """Says that something went wrong: in the log, as an event, and in the status of a pod that does not run yet."""
        _log.warning("pod %s/%s: %s", self._namespace, self._name, message)
        record(self._store, self._pod, reason, message)
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


def _conditions(known: list[Object], wanted: Mapping[str, bool]) -> list[Object]:
    """The conditions with new values; the time of the last change stays when the value does."""
    by_type = {condition["type"]: condition for condition in known}
    for kind, holds in wanted.items():
        value = str(holds)
        if by_type.get(kind, {}).get("status") != value:
            by_type[kind] = {"type": kind, "status": value, "lastTransitionTime": now()}
    return list(by_type.values())


def _back_off(tries: int) -> float:
    return float(min(_RETRY_SECONDS * 2 ** min(tries, 10), _LONGEST_RETRY_SECONDS))


async def _ip(*words: str) -> None:
    child = await asyncio.create_subprocess_exec(
        "ip", *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await child.communicate()
    if child.returncode:
        raise PodwireError(f"ip {' '.join(words)}: {stderr.decode(errors='replace').strip()}")
