"""The demonstration: it says OK when all is well, says what is wrong when it is not, and leaves nothing either way."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from podwire.lab import cluster, demo, names, process, state, topology
from podwire.lab.state import LabState
from tests.netns.lab_fixtures import PATIENCE, Pods

NAT = "table ip wrong { chain post { type nat hook postrouting priority 300; ip daddr 10.244.0.0/16 masquerade; }; }"


def start_demo() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "podwire.lab.demo"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lab_of(demonstration: subprocess.Popen[str]) -> str:
    return f"demo-{demonstration.pid:x}"


def left_of(lab: str) -> list[object]:
    return [*topology.namespaces(lab), *process.marked(lab), *(name for name in state.labs() if name == lab)]


def test_it_shows_what_it_promises_and_ends_with_ok() -> None:
    running = start_demo()
    said, _ = running.communicate(timeout=600)
    assert running.returncode == 0, said
    assert said.rstrip().endswith("demo: OK")
    for pattern in (
        r"node3 +172\.31\.0\.13 +10\.244\.\d+\.0/24",
        r"pod → pod, across nodes +blue +(10\.244\.\d+\.\d+) +red +\1 +no",
        r"pod → another node .*masqueraded",
        r"green +node1 +10\.244\.\d+\.\d+ +\d+ ▪",
        r"Cluster +node1, 172\.31\.0\.11:3\d{4} .*✓\n *Local +node1, .* green 30 +172\.31\.0\.250 +✓",
        r"172\.31\.0\.11\.\d+ > 172\.31\.0\.12\.4789: VXLAN.*\n +IP 10\.244\.\d+\.\d+\.\d+ > 10\.244\.\d+\.\d+\.80",
        r"guest asks db: answered; with the policy: nothing comes back",
        r"fails at hop \d+, ingress policy \(node2\): .* by shop/db-from-web",
    ):
        assert re.search(pattern, said), pattern
    assert "✗" not in said
    assert "\x1b" not in said, "no colours for what is not a terminal"
    assert left_of(lab_of(running)) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_nothing(how: signal.Signals) -> None:
    running = start_demo()
    lab = lab_of(running)
    try:
        process.wait_for(lambda: bool(topology.namespaces(lab)), PATIENCE, "the lab to be built")
        running.send_signal(how)
        said, _ = running.communicate(timeout=300)
        assert (running.returncode, said.splitlines()[-1]) == (130, "demo: interrupted")
        assert left_of(lab) == []
    finally:
        running.kill()
        running.communicate()
        cluster.down(lab)


@pytest.fixture
def stage(lab: LabState) -> Iterator[demo.Stage]:
    demo.start_outside(lab)
    with Pods(lab, demo.demo_pods()):
        yield demo.Stage(lab, Console(quiet=True))


def test_it_names_the_path_that_is_wrong(stage: demo.Stage) -> None:
    demo.show_reachability(stage)
    assert stage.failures == []
    node1 = names.namespace(stage.lab.name, "node1")
    topology.run(["ip", "netns", "exec", node1, "nft", NAT])
    try:
        demo.show_reachability(stage)
    finally:
        topology.run(["ip", "netns", "exec", node1, "nft", "delete table ip wrong"])
    wrong = {failure.partition(":")[0] for failure in stage.failures}
    assert "pod → pod, across nodes" in wrong, stage.failures
    assert "hostNetwork → hostNetwork" not in wrong
