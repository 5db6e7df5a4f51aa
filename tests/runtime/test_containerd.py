"""A foreign runtime: Debian's containerd on a lab node, which knows Podwire by its CNI folders alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from podwire.lab import cluster, manifests, node, process
from podwire.lab.agent import daemon_status
from podwire.lab.process import Process
from podwire.lab.state import LabState, plan_nodes
from tests.runtime.image import REFERENCE, write_image

PATIENCE = 60.0
CGROUPS = Path("/sys/fs/cgroup")
SOCKET = "/run/containerd/containerd.sock"
PEER = """
apiVersion: v1
kind: Pod
metadata: {name: peer}
spec:
  nodeName: node2
  containers:
  - {name: echo, image: echo, ports: [{containerPort: 8080}]}
"""


class Containerd:
    """containerd on a node of the lab; its folders are the node's own."""

    def __init__(self, lab: LabState, name: str) -> None:
        self.lab = lab
        self.name = name
        self._process: Process | None = None

    def start(self) -> None:
        command = [*node.enter_command(self.lab, self.name), "containerd"]
        self._process = process.start(self.lab.files, f"containerd-{self.name}", command)
        process.wait_for(lambda: self.ctr("version").returncode == 0, PATIENCE, "containerd to answer")

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill(15)
        assert self._process.wait_gone(PATIENCE)

    def remove_cgroups(self) -> None:
        """runc makes a control group for the namespace of its containers, and leaves it."""
        for group in CGROUPS.glob(f"**/{self.lab.name}"):
            group.rmdir()

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs containerd's own client on the node, which is also what execs the CNI plugin."""
        client = ["ctr", "--address", SOCKET, "--namespace", self.lab.name]
        words = [*node.enter_command(self.lab, self.name), *client, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def run(self, container: str, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.ctr("run", "--cni", *options, REFERENCE, container, "/bin/sh", "-c", script)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabState]:
    """Two nodes, and a pod of the lab's own on the second."""
    state = LabState(name=f"runtime-{uuid4().hex[:6]}", nodes=plan_nodes(2))
    manifest = tmp_path_factory.mktemp("manifests") / "peer.yaml"
    manifest.write_text(PEER)
    try:
        lab = cluster.up(state)
        cluster.wait_ready(lab, cluster.apply(lab, manifests.load([manifest])), PATIENCE)
        yield lab
    finally:
        cluster.down(state.name)


@pytest.fixture(scope="module")
def containerd(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """containerd on the first node, with the image."""
    archive = tmp_path_factory.mktemp("image") / "busybox.tar"
    write_image(archive)
    runtime = Containerd(lab, "node1")
    runtime.start()
    imported = runtime.ctr("image", "import", str(archive))
    assert imported.returncode == 0, imported.stderr
    yield runtime
    runtime.stop()
    runtime.remove_cgroups()


@pytest.fixture
def peer(lab: LabState) -> str:
    """The address of the lab's pod."""
    (pod,) = cluster.pods(lab)
    return str(pod["status"]["podIP"])


def used(lab: LabState) -> int:
    """Addresses of the first node that are in use, or not yet seen free."""
    said = daemon_status(lab.files.ipamd_socket("node1"))
    assert said is not None
    return sum(block.used + block.releasing for block in said.blocks)


def test_a_container_reaches_a_pod_of_another_node_under_its_own_address(
    lab: LabState, containerd: Containerd, peer: str
) -> None:
    before = used(lab)
    script = f"ip -4 -o address show eth0; wget -q -O - http://{peer}:8080/"
    done = containerd.run("reach", script, "--rm")
    assert done.returncode == 0, done.stderr
    shown, answer = done.stdout.split("\n", 1)
    own = shown.split()[3].split("/")[0]
    said = json.loads(answer)
    assert (said["pod"], said["node"], said["client"]) == ("peer", "node2", own)
    process.wait_for(lambda: used(lab) <= before, PATIENCE, "the address to come back")


def test_containers_keep_their_network_while_containerd_and_the_daemon_restart(
    lab: LabState, containerd: Containerd, peer: str
) -> None:
    started = containerd.run("stay", "sleep 600", "--detach")
    assert started.returncode == 0, started.stderr
    probe = partial(containerd.ctr, "task", "exec", "--exec-id", "probe", "stay", "ping", "-c1", "-W2", peer)
    assert probe().returncode == 0
    containerd.stop()
    node.stop_daemon(lab, "node1")
    containerd.start()
    assert probe().returncode == 0, "the wire needs neither"
    assert containerd.ctr("task", "kill", "--signal", "SIGKILL", "stay").returncode == 0
    process.wait_for(lambda: "STOPPED" in containerd.ctr("task", "ls").stdout, PATIENCE, "the container to end")
    removed = containerd.ctr("task", "rm", "stay"), containerd.ctr("container", "rm", "stay")
    assert [each.returncode for each in removed] == [0, 0], removed
    node.start_daemon(lab, "node1")
    node.wait_daemon(lab, "node1")


def test_the_node_holds_the_conflist_that_old_runtimes_take(lab: LabState) -> None:
    folder = Path(lab.files.node_path("node1", "/etc/cni/net.d"))
    (conflist,) = folder.iterdir()
    plain = json.loads(conflist.read_text())
    assert (plain["cniVersion"], plain["cniVersions"]) == ("1.0.0", ["1.0.0", "1.1.0"])
