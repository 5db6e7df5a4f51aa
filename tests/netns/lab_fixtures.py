"""Labs for tests: one a module, with a name that no other run has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from podwire.lab import cluster, process, state, status
from podwire.lab.state import LabState
from podwire.lab.talk import Answer, ask

_numbers = itertools.count(1)
PATIENCE = 90.0  # seconds, of what takes two
Object = dict[str, Any]


def fresh_name() -> str:
    """A lab name that this run has not used, and no other run uses."""
    return f"t{os.getpid():x}-{next(_numbers)}"


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """A lab of three nodes without pods. A test deletes the pods that it makes."""
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(3)))
    yield made
    cluster.down(made.name)


def pod(name: str, *containers: Object, namespace: str = "default", **spec: Any) -> Object:
    """A Pod; without containers it is one echo server on port 80, TCP and UDP."""
    ports = [{"containerPort": 80}, {"containerPort": 80, "protocol": "UDP"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"containers": list(containers) or [{"name": "web", "image": "echo", "ports": ports}], **spec},
    }


class Pods:
    """The pods of one test: applied and ready on entry, deleted and gone on exit."""

    def __init__(self, lab: LabState, objects: Sequence[Object], wait: bool = True) -> None:
        self.lab = lab
        self._objects = list(objects)
        self._wait = wait

    def __enter__(self) -> Pods:
        try:
            names = cluster.apply(self.lab, self._objects)
            if self._wait:
                cluster.wait_ready(self.lab, names)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        cluster.wait_deleted(self.lab, cluster.delete(self.lab, self._objects))

    def object(self, name: str, namespace: str = "default") -> Object:
        """The pod as the API shows it now."""
        key = (namespace, name)
        return next(p for p in cluster.pods(self.lab) if (p["metadata"]["namespace"], p["metadata"]["name"]) == key)

    def shown(self, name: str, namespace: str = "default") -> Object:
        """The pod's entry in the lab's status."""
        return status.pod_status(self.lab, self.object(name, namespace))

    def address(self, name: str, namespace: str = "default") -> str:
        """The pod's address, bare."""
        return str(self.shown(name, namespace)["addresses"][0])

    def ask(self, source: str, address: str, port: int = 80, protocol: str = "TCP") -> Answer:
        """Asks from inside a pod; `address` may be a pod's name."""
        target = address if address[0].isdigit() else self.address(address)
        return ask(self.lab.netns("").parent / self.shown(source)["netns"], target, port, protocol)

    def until(self, what: str, holds: Any, seconds: float = PATIENCE) -> None:
        """Waits until `holds()` is true."""
        process.wait_for(holds, seconds, what)
