"""A pod's network on its node: a namespace, and what the CNI executable puts into it.

    attach   namespace ─▶ lo up ─▶ ADD            failed: DEL, namespace gone, and anew under another container id
    detach   what still runs in it ends ─▶ DEL ─▶ namespace gone

Both try for as long as it takes, with a back-off, and report what went wrong. A pod with `hostNetwork` has its node's
namespace and addresses, and nothing is done for it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from podwire.errors import PodwireError
from podwire.lab import names, process
from podwire.lab.cni import Attachment, Runtime, result_addresses
from podwire.lab.node import enter_command
from podwire.lab.state import MARK, LabState

_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 5.0
_STRAY_SECONDS = 5.0

Object = dict[str, Any]


class Sandbox:
    """The network of one pod. `report` is told a reason and a message."""

    def __init__(self, state: LabState, pod: Object, report: Callable[[str, str], None]) -> None:
        self.addresses: tuple[str, ...] = ()
        self._state = state
        self._pod = pod
        self._report = report
        self._node = state.node(pod["spec"]["nodeName"])
        self._on_host = bool(pod["spec"].get("hostNetwork"))
        self._attachment: Attachment | None = None
        self._result: Object | None = None
        metadata = pod["metadata"]
        self._netns = names.pod_namespace(state.name, metadata["namespace"], metadata["name"])

    @property
    def enter(self) -> tuple[str, ...]:
        """The words before a command that runs in the pod."""
        path = None if self._on_host else names.netns_path(self._netns)
        return tuple(enter_command(self._state, self._node.name, path))

    @property
    def node_netns(self) -> Path:
        """The namespace of the pod's node."""
        return self._state.netns(self._node.name)

    async def attach(self, ending: asyncio.Event) -> bool:
        """Gives the pod its network; False when the pod is to end before it has one."""
        if self._on_host:
            self.addresses = self._node.addresses
            return not ending.is_set()
        tries = 0
        while not ending.is_set():
            try:
                await self._make_namespace()
                self._attachment = self._new_attachment()
                self._result = await self._runtime().add(self._attachment)
                self.addresses = result_addresses(self._result)
                return True
            except (PodwireError, OSError) as error:
                self._report("FailedCreatePodSandBox", f"failed to set up the pod's network: {error}")
            await self.detach()
            await _pause(ending, tries)
            tries += 1
        return False

    async def detach(self) -> None:
        """Takes the pod's network away."""
        tries = 0
        while not self._on_host:
            try:
                await self._kill_strays()
                if self._attachment is not None:
                    await self._runtime().delete(self._attachment, self._result)
                    self._attachment = self._result = None
                await self._delete_namespace()
                return
            except (PodwireError, OSError) as error:
                self._report("FailedKillPod", f"failed to take the pod's network down: {error}")
                await asyncio.sleep(_back_off(tries))
                tries += 1

    def _runtime(self) -> Runtime:
        files, node = self._state.files, self._node.name
        bin_dir, conf_dir = files.node_path(node, "/opt/cni/bin"), files.node_path(node, "/etc/cni/net.d")
        return Runtime(enter_command(self._state, node), bin_dir, conf_dir, {MARK: self._state.name})

    async def _make_namespace(self) -> None:
        await self._delete_namespace()  # what an earlier try may have left
        await _ip("netns", "add", self._netns)
        await _ip("-n", self._netns, "link", "set", "lo", "up")

    async def _delete_namespace(self) -> None:
        if names.netns_path(self._netns).exists():
            await _ip("netns", "delete", self._netns)

    async def _kill_strays(self) -> None:
        """Ends what containers started and left behind; one of them would keep the namespace alive."""
        try:
            inode = names.netns_path(self._netns).stat().st_ino
        except FileNotFoundError:
            return
        inodes = frozenset({inode})
        await asyncio.to_thread(process.kill_all, lambda: process.in_namespaces(inodes), _STRAY_SECONDS)

    def _new_attachment(self) -> Attachment:
        container_id, metadata = secrets.token_hex(32), self._pod["metadata"]
        args = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": str(metadata["namespace"]),
            "K8S_POD_NAME": str(metadata["name"]),
            "K8S_POD_INFRA_CONTAINER_ID": container_id,
            "K8S_POD_UID": str(metadata["uid"]),
        }
        netns = str(names.netns_path(self._netns))
        return Attachment(container_id=container_id, netns=netns, args=tuple(args.items()))


async def _pause(ending: asyncio.Event, tries: int) -> None:
    try:
        async with asyncio.timeout(_back_off(tries)):
            await ending.wait()
    except TimeoutError:
        return


def _back_off(tries: int) -> float:
    return float(min(_RETRY_SECONDS * 2 ** min(tries, 10), _LONGEST_RETRY_SECONDS))


async def _ip(*words: str) -> None:
    child = await asyncio.create_subprocess_exec(
        "ip", *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await child.communicate()
    if child.returncode:
        raise PodwireError(f"ip {' '.join(words)}: {stderr.decode(errors='replace').strip()}")
