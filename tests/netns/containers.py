"""Containers without a runtime: network namespaces of a lab, attached by exec'ing the node's own CNI executable.

For tests that need many calls at once, or calls that fail: the lab's kubelet would try them again.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from podwire.lab import names, node, process, topology
from podwire.lab.agent import daemon_status
from podwire.lab.state import LabState
from podwire.v1 import agent_pb2

CONFIG = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}
WHOLE = {
    **CONFIG,
    "runtimeConfig": {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": protocol} for protocol in ("tcp", "udp")],
        "bandwidth": dict.fromkeys(("ingressRate", "ingressBurst", "egressRate", "egressBurst"), 800_000_000),
    },
}
"""Asks for ports of the node, and for limits in both directions, too."""
PATIENCE = 90.0
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What the executable printed, and how it exited."""

    code: int
    body: dict[str, Any]

    @property
    def error(self) -> int:
        """The CNI error code, 0 for success."""
        return 0 if self.code == 0 else int(self.body["code"])

    @property
    def address(self) -> str:
        """The first address of a result, bare."""
        return str(self.body["ips"][0]["address"]).split("/")[0]


@dataclass(frozen=True)
class Container:
    """A namespace that stands for a container of a node."""

    lab: LabState
    node: str
    name: str

    @property
    def netns(self) -> str:
        """The path of its namespace."""
        return str(self.lab.netns(f"box.{self.name}"))

    def call(self, command: str, config: dict[str, Any] | None = None) -> Answer:
        """Execs the CNI executable on the node."""
        files = self.lab.files
        executable = files.node_path(self.node, "/opt/cni/bin") / "podwire"
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.name,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(executable.parent),
        }
        done = subprocess.run(
            [str(executable)],
            input=json.dumps(config or CONFIG).encode(),
            env=environment,
            capture_output=True,
            check=False,
        )
        assert not done.stderr, done.stderr
        return Answer(done.returncode, json.loads(done.stdout) if done.stdout else {})

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the namespace."""
        return subprocess.run(
            ["nsenter", f"--net={self.netns}", "--", *command], capture_output=True, text=True, check=False
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command, which is in the namespace when this returns, or has ended."""
        argv, wanted = ["nsenter", f"--net={self.netns}", "--", *command], os.stat(self.netns)
        started = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        place = f"/proc/{started.pid}/ns/net"
        wait(lambda: started.poll() is not None or os.path.samestat(os.stat(place), wanted), f"{command} to be there")
        return started

    def links(self) -> set[str]:
        """The names of the namespace's interfaces."""
        return {line.split()[0].split("@")[0] for line in self.run("ip", "-br", "link").stdout.splitlines()}


@contextmanager
def containers(lab: LabState, node_name: str, prefix: str, count: int) -> Iterator[list[Container]]:
    """`count` containers of a node, each with an empty namespace; the namespaces are gone afterwards."""
    made = [Container(lab, node_name, f"{prefix}{number}") for number in range(count)]
    paths = [names.namespace(lab.name, f"box.{each.name}") for each in made]
    for path in paths:
        topology.run(["ip", "netns", "add", path])
    try:
        yield made
    finally:
        topology.delete_namespaces(paths)


def at_once(jobs: Iterable[Callable[[], T]], workers: int = 20) -> list[T]:
    """Runs all jobs, `workers` at a time; their results in order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: job(), jobs))


def status(lab: LabState, node_name: str) -> agent_pb2.GetStatusResponse:
    """What the node's daemon says."""
    said = daemon_status(lab.files.ipamd_socket(node_name))
    assert said is not None, f"no daemon on {node_name}"
    return said


def add(box: Container, config: dict[str, Any] | None = None) -> Answer:
    """An ADD, repeated while it is told to try again later, as a kubelet repeats it: a claim of a block waits for etcd
    longer than an ADD may."""
    answers = [box.call("ADD", config)]

    def is_told() -> bool:
        if answers[-1].error == 11:
            answers.append(box.call("ADD", config))
        return answers[-1].error != 11

    process.wait_for(is_told, PATIENCE, "an ADD that is told something else than to try again")
    return answers[-1]


def add_again(box: Container, record: Callable[[str, object], None], since: float) -> Answer:
    """An ADD, tried until it works, as a kubelet does; what it answered. The seconds since the fault, `since` by the
    monotonic clock, go into docs/reliability.md."""
    answers: list[Answer] = []

    def works() -> bool:
        answers.append(box.call("ADD"))
        assert answers[-1].error in (0, 11), answers[-1].body
        return answers[-1].error == 0

    process.wait_for(works, PATIENCE, "an ADD to work")
    record("add_again_s", round(time.monotonic() - since, 2))
    return answers[-1]


def know_each_other(lab: LabState) -> LabState:
    """Waits until every node reaches the pods of all others: a daemon that is ready need not have heard of them yet."""
    others = len(lab.nodes) - 1
    wait(lambda: all(status(lab, each.name).peers == others for each in lab.nodes), "the nodes to know each other")
    return lab


def pod_links(lab: LabState, node_name: str) -> set[str]:
    """The host's ends of the node's wires."""
    out = topology.run([*node.enter_command(lab, node_name), "ip", "-br", "link"])
    found = {line.split()[0].split("@")[0] for line in out.splitlines()}
    return {name for name in found if name.startswith("pw") and name not in ("pw0", "pw-vxlan")}


def on_node(lab: LabState, node_name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on the node."""
    words: Sequence[str] = [*node.enter_command(lab, node_name), *command]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def nothing_is_held(lab: LabState, node_name: str) -> bool:
    """No address is used or releasing, no wire is there."""
    blocks = status(lab, node_name).blocks
    return not any(block.used or block.releasing for block in blocks) and not pod_links(lab, node_name)


def wait(condition: Callable[[], bool], what: str) -> None:
    """Waits until a condition holds. Raises PodwireError that names `what`."""
    process.wait_for(condition, PATIENCE, what)
