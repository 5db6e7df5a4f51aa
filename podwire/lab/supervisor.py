"""The process that holds a lab's control plane: API server, scheduler, controllers, kubelets, nodes. One event loop.

It listens twice: on a loopback port of the machine, for kubectl and the `podwire lab` command, and in the lab's
control namespace, for what runs on the lab's nodes. The second socket is opened inside that namespace and then served
from outside: a socket belongs to the namespace that it was made in. What it holds is in memory: when it dies the pods
live on, and nobody looks after them; `podwire lab down` cleans up all the same.

    python -m podwire.lab.supervisor LAB
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path

import msgspec

from podwire import logs, netns
from podwire.lab import names, state
from podwire.lab.agent import daemon_status
from podwire.lab.api.errors import NotFound
from podwire.lab.api.kinds import NODES, SERVICE_CIDRS
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store
from podwire.lab.balancing import Balancer
from podwire.lab.container import now, previous_log
from podwire.lab.controllers import Controllers
from podwire.lab.kubelet import Kubelets, log_path
from podwire.lab.scheduler import Scheduler
from podwire.lab.state import LabState, NodeState

_log = logging.getLogger(__name__)
_NODE_LOOK_SECONDS = 3.0
_NODE_SILENT_SECONDS = 2.0  # a daemon that says nothing for so long is not ready


class ApiAddress(msgspec.Struct, frozen=True):
    """Where the API server listens: for the machine, and for the lab's nodes."""

    url: str
    lab_url: str


def listen(lab: LabState) -> tuple[list[socket.socket], ApiAddress]:
    """The API server's two listening sockets. Only before other threads run: it enters a namespace."""
    descriptor = netns.open_netns(str(lab.netns("control")))
    try:
        with netns.inside(descriptor):
            family = socket.AF_INET6 if ":" in lab.control_address else socket.AF_INET
            inner = socket.create_server((lab.control_address, names.API_PORT), family=family)
    finally:
        os.close(descriptor)
    outer = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{outer.getsockname()[1]}"
    return [inner, outer], ApiAddress(url, f"http://{names.url_host(lab.control_address)}:{names.API_PORT}")


def node_object(node: NodeState) -> dict[str, object]:
    """The Node as its kubelet registers it, not ready yet."""
    addresses = [{"type": "InternalIP", "address": address} for address in node.addresses]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux"}},
        "spec": {},
        "status": {"addresses": [*addresses, {"type": "Hostname", "address": node.name}]},
    }


async def watch_node(lab: LabState, store: Store, node: NodeState) -> None:
    """Keeps the Node's Ready condition at what its daemon says, as a kubelet does with its runtime's network."""
    known: tuple[bool, str] | None = None
    while True:
        status = await asyncio.to_thread(daemon_status, lab.files.ipamd_socket(node.name), _NODE_SILENT_SECONDS)
        ready = status is not None and status.ready
        message = "the daemon does not answer" if status is None else ", ".join(status.reasons)
        if (ready, message) != known:
            known = (ready, message)
            _set_ready(store, node.name, ready, message)
        await asyncio.sleep(_NODE_LOOK_SECONDS if ready else _NODE_LOOK_SECONDS / 10)


def _set_ready(store: Store, node: str, ready: bool, message: str) -> None:
    condition = {
        "type": "Ready",
        "status": str(ready),
        "reason": "KubeletReady" if ready else "KubeletNotReady",
        "message": message or "the node's network is ready",
        "lastTransitionTime": now(),
    }

    def change(obj: dict[str, object]) -> dict[str, object]:
        status = obj.get("status")
        return {**obj, "status": {**(status if isinstance(status, dict) else {}), "conditions": [condition]}}

    with contextlib.suppress(NotFound):  # someone deleted the Node; the node itself goes on
        store.modify(NODES, node, "", change, subresource="status")


def find_log(lab: LabState, namespace: str, pod: str, container: str, previous: bool) -> Path:
    """Where the output of a container is, or that of its run before the last restart."""
    path = log_path(lab, namespace, pod, container)
    return previous_log(path) if previous else path


async def serve(lab: LabState, sockets: list[socket.socket], address: ApiAddress) -> None:
    """Runs the control plane until it is cancelled. Its address is written once it answers."""
    store = Store(first_version=time.time_ns() // 1_000_000)  # above all that an earlier supervisor has given out
    for node in lab.nodes:
        store.create(NODES, node_object(node))
    store.create(SERVICE_CIDRS, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": list(lab.service_cidrs)}})
    async with contextlib.AsyncExitStack() as stack:
        for listener in sockets:  # an application belongs to one of aiohttp's runners, the store to all
            server = ApiServer(store, find_log=partial(find_log, lab))
            await stack.enter_async_context(server.serving(listener=listener))
        state.write_atomically(lab.files.api, msgspec.json.encode(address))
        scheduler = Scheduler(store)
        async with asyncio.TaskGroup() as group:
            group.create_task(Kubelets(lab, store).run())
            group.create_task(scheduler.follow_pods())
            group.create_task(scheduler.follow_nodes())
            balanced = [names.BALANCED[family] for family in lab.families]
            group.create_task(Controllers(store, balanced=balanced).run())
            group.create_task(Balancer(lab, store).run())
            for node in lab.nodes:
                group.create_task(watch_node(lab, store, node))


def main() -> None:
    """Serves the lab that the one argument names."""
    logs.configure("info")
    if sys.version_info < (3, 12):  # where a thread waits for each child
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    lab = state.load(sys.argv[1])
    sockets, address = listen(lab)
    asyncio.run(serve(lab, sockets, address))


if __name__ == "__main__":
    main()
