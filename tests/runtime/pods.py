"""Pods as a kubelet runs them: sandboxes through the Container Runtime Interface, and what is asked about them."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from podwire import netns
from podwire.errors import PodwireError
from podwire.lab import node, process
from podwire.lab.agent import daemon_status
from podwire.lab.state import LabState
from tests.runtime.agent import attachments, in_use
from tests.runtime.containerd import PATIENCE, Containerd
from tests.runtime.cri import Sandbox

NAMESPACE = "shop"
_numbers = itertools.count(1)


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that was asked for: what the kubelet calls it, where it is, and the id of its sandbox."""

    name: str
    namespace: str
    uid: str
    node: str
    sandbox: str


class Pods:
    """The pods of one test."""

    def __init__(self, lab: LabState, runtimes: Mapping[str, Containerd]) -> None:
        self.lab = lab
        self._runtimes = runtimes
        self._before = {name: in_use(lab, name) for name in runtimes}

    def run(self, node_name: str = "node1") -> Pod:
        """Runs a sandbox for a new pod. Raises grpc.RpcError when the runtime cannot."""
        name, uid = f"pod-{next(_numbers)}", str(uuid.uuid4())
        cri = self._runtimes[node_name].cri
        sandbox = cri.run(name, namespace=NAMESPACE, uid=uid, cgroup_parent=f"/{self.lab.name}")
        return Pod(name=name, namespace=NAMESPACE, uid=uid, node=node_name, sandbox=sandbox)

    def inspect(self, pod: Pod) -> Sandbox:
        """What the runtime says of the pod."""
        return self._runtimes[pod.node].cri.inspect(pod.sandbox)

    def stop(self, pod: Pod) -> None:
        """Stops the pod's sandbox."""
        self._runtimes[pod.node].cri.stop(pod.sandbox)

    def remove(self, pod: Pod) -> None:
        """Removes the pod's sandbox."""
        self._runtimes[pod.node].cri.remove(pod.sandbox)

    def attached(self, pod: Pod) -> bool:
        """Whether the daemon knows the pod. When it does not, `wait_freed` says that the link is gone, too."""
        return pod.sandbox in attachments(self.lab, pod.node)

    def wait_freed(self, node_name: str = "node1") -> None:
        """Waits until as many of the node's addresses are in use as before the test, and their links seen gone."""
        what = f"the addresses of {node_name} to come back"
        process.wait_for(lambda: in_use(self.lab, node_name) <= self._before[node_name], PATIENCE, what)

    def restore(self) -> None:
        """Starts what the test ended, and removes every sandbox."""
        for name, runtime in self._runtimes.items():
            if daemon_status(self.lab.files.ipamd_socket(name)) is None:
                node.start_daemon(self.lab, name)
                node.wait_daemon(self.lab, name)
            if not runtime.running:
                runtime.start()
            for sandbox in runtime.cri.sandboxes():
                runtime.cri.stop(sandbox)
                runtime.cri.remove(sandbox)
            self.wait_freed(name)


def pings(source: Path, address: str) -> bool:
    """Whether a packet from the network namespace `source` is answered by `address`."""
    words = ["nsenter", f"--net={source}", "--", "ping", "-n", "-c1", "-W20", address]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def opened_in(source: Path) -> Iterator[socket.socket]:
    """A UDP socket of the network namespace `source`, which is closed at the end."""
    descriptor = netns.open_netns(str(source))
    try:
        with netns.inside(descriptor):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    finally:
        os.close(descriptor)
    with made:
        made.settimeout(PATIENCE)
        yield made


def seen_by(server: Path, client: Path, address: str) -> str:
    """The address under which the namespace `server`, at `address`, sees a datagram of the namespace `client`."""
    with opened_in(server) as receiver, opened_in(client) as sender:
        receiver.bind((address, 0))
        sender.sendto(b"who am I?", receiver.getsockname())
        _, (seen, _) = receiver.recvfrom(64)
    return str(seen)


def host_links(lab: LabState, node_name: str) -> frozenset[str]:
    """The names of the node's ends of its pods' wires."""
    words = [*node.enter_command(lab, node_name), "ip", "-br", "link", "show", "type", "veth"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PodwireError(done.stderr)
    return frozenset(line.split()[0].split("@")[0] for line in done.stdout.splitlines()) - {"eth0"}


def crowd(pods: Pods, size: int) -> None:
    """Runs that many pods at once on one node, looks at them, and stops them at once."""
    with ThreadPoolExecutor(size) as kubelet:
        running = list(kubelet.map(pods.run, ["node1"] * size))
        sandboxes = list(kubelet.map(pods.inspect, running))
        known = attachments(pods.lab, "node1")
        assert len({sandbox.address for sandbox in sandboxes}) == size
        for pod, sandbox in zip(running, sandboxes, strict=True):
            attachment = known[pod.sandbox]
            assert (attachment.pod_name, attachment.addresses[0].split("/")[0]) == (pod.name, sandbox.address)
        assert pings(sandboxes[0].process_netns, sandboxes[-1].address)
        list(kubelet.map(pods.stop, running))
    assert not attachments(pods.lab, "node1")
    pods.wait_freed()
    assert not host_links(pods.lab, "node1")
