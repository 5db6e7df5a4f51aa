"""A list of plugins as a runtime executes it, that is told of a port of the node and of limits for every pod.

ADD runs each plugin in order with the result of the one before it, DEL in reverse with the result of the ADD; the time
is the sum of the processes', without what a runtime does in between. After an ADD, beside what every contender has to
show: a connection to the pod's port of the node is taken by a listener in the pod, and there is an ifb device for it.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.contender import Added, Attached, Contender, cni_environment
from bench.process import BenchFailed, Finished, run
from bench.stage import Namespace

LIMITS = dict.fromkeys(("ingressRate", "ingressBurst", "egressRate", "egressBurst"), 800_000_000)
_NODE = "192.0.2.1"
_CONTAINER_PORT = 80
_IFB_PREFIXES = ("pwi", "bwp")
_ports = itertools.count(20_000)


class Chained(Contender):
    """A list on a node. The first plugin is as a Contender's; those `after` it are pairs (executable, capability)."""

    def __init__(
        self,
        name: str,
        node: Namespace,
        executable: Path,
        config: dict[str, Any],
        after: Sequence[tuple[Path, str]] = (),
        own: Sequence[str] = (),
    ) -> None:
        """`own` are the capabilities of the first plugin."""
        super().__init__(name, node, executable, config)
        shared = {"cniVersion": self._config["cniVersion"], "name": self._config["name"]}
        self._plugins = [(executable, tuple(own), self._config)]
        self._plugins += [(path, (capability,), shared | {"type": path.name}) for path, capability in after]
        self._asked: dict[str, Mapping[str, Any]] = {}

    def attach(self, pod: Namespace) -> Attached:
        """Attaches the pod, and looks at nothing."""
        container_id = f"{pod.name}-{os.urandom(4).hex()}"
        mapping = {"hostPort": next(_ports), "containerPort": _CONTAINER_PORT, "protocol": "tcp"}
        self._asked[container_id] = {"portMappings": [mapping], "bandwidth": LIMITS}
        ran: list[Finished] = []
        for plugin in self._plugins:
            previous = json.loads(ran[-1].stdout) if ran else None
            ran.append(self._plugin("ADD", plugin, pod, container_id, previous))
        return Attached(pod=pod, container_id=container_id, finished=_sum(ran))

    def prove(self, attached: Attached) -> Added:
        """Looks at what ADD has done. Raises BenchFailed when the pod is not attached, reached or limited."""
        added = super().prove(attached)
        port = self._asked[attached.container_id]["portMappings"][0]["hostPort"]
        with attached.pod.entered():
            server = socket.create_server(("", _CONTAINER_PORT))
        with server, self.node.entered():
            if not any(name.startswith(_IFB_PREFIXES) for _, name in socket.if_nameindex()):
                raise BenchFailed(f"{self.name}: the pod is not limited")
            with socket.create_connection((_NODE, port), 5):
                server.settimeout(5)
                server.accept()[0].close()
        return added

    def detach(self, added: Added) -> Finished:
        """Detaches the pod; nothing passes its link any more. Raises BenchFailed when something would."""
        ran = [
            self._plugin("DEL", plugin, added.pod, added.container_id, added.result)
            for plugin in reversed(self._plugins)
        ]
        self.check_dead(added)
        return _sum(ran)

    def _find_host_link(self, result: dict[str, Any]) -> str:
        """The reference's ifb device is among the interfaces of its result."""
        interfaces = [each for each in result["interfaces"] if not each["name"].startswith(_IFB_PREFIXES)]
        return super()._find_host_link(result | {"interfaces": interfaces})

    def _plugin(
        self,
        command: str,
        plugin: tuple[Path, Sequence[str], dict[str, Any]],
        pod: Namespace,
        container_id: str,
        previous: Mapping[str, Any] | None,
    ) -> Finished:
        executable, capabilities, config = plugin
        asked = {name: value for name, value in self._asked[container_id].items() if name in capabilities}
        whole = config | ({"runtimeConfig": asked} if asked else {}) | ({"prevResult": previous} if previous else {})
        environment = cni_environment(command, pod.path, container_id, executable.parent)
        with self.node.entered():
            finished = run([str(executable)], environment, json.dumps(whole).encode())
        if finished.exit_code:
            said = (finished.stdout + finished.stderr).decode(errors="replace").strip()
            raise BenchFailed(
                f"{self.name}: {command} of {executable.name} ended with {finished.exit_code}: {said[-500:]}"
            )
        return finished


def _sum(ran: Sequence[Finished]) -> Finished:
    last = ran[-1]
    return Finished(
        seconds=sum(each.seconds for each in ran),
        cpu_seconds=sum(each.cpu_seconds for each in ran),
        exit_code=0,
        stdout=last.stdout,
        stderr=last.stderr,
    )
