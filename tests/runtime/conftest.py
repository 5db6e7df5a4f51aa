"""A lab of two nodes, a pod of its own on the second, and containerd where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from podwire.lab import cluster
from podwire.lab.state import LabState, plan_nodes
from tests.runtime.containerd import LOOPBACK, PATIENCE, Containerd, remove_cgroups
from tests.runtime.pods import Pods

PEER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "peer", "namespace": "default"},
    "spec": {
        "nodeName": "node2",
        "containers": [{"name": "echo", "image": "echo", "ports": [{"containerPort": 8080}]}],
    },
}


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes, and a pod of the lab's own on the second."""
    if not LOOPBACK.exists():
        pytest.skip(f"runtime: needs {LOOPBACK} (containernetworking-plugins)")
    state = LabState(name=f"runtime-{uuid4().hex[:6]}", nodes=plan_nodes(2))
    try:
        lab = cluster.up(state)
        cluster.wait_ready(lab, cluster.apply(lab, [PEER]), PATIENCE)
        yield lab
    finally:
        cluster.down(state.name)
        remove_cgroups(state.name)


@pytest.fixture(scope="module")
def runtimes(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Containerd]:
    """containerd on both nodes, with the image, by node. `lab down` ends them, as it ends what they run."""
    folder = tmp_path_factory.mktemp("image")

    def start(name: str) -> Containerd:
        runtime = Containerd(lab, name)
        runtime.start()
        runtime.load_image(folder / f"{name}.tar")
        return runtime

    names = [each.name for each in lab.nodes]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(start, names), strict=True))


@pytest.fixture
def containerd(runtimes: dict[str, Containerd]) -> Containerd:
    """containerd of the first node."""
    return runtimes["node1"]


@pytest.fixture
def pods(lab: LabState, runtimes: dict[str, Containerd]) -> Iterator[Pods]:
    """Sandboxes of one test; at its end nothing of them is left, whatever the test did to containerd or the daemon."""
    made = Pods(lab, runtimes)
    yield made
    made.restore()


@pytest.fixture
def peer(lab: LabState) -> str:
    """The address of the lab's pod."""
    (pod,) = cluster.pods(lab)
    return str(pod["status"]["podIP"])
