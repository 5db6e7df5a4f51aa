"""`podwire node clean`: what the daemon has put on a node goes, and nothing else, and never while a pod hangs on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from uuid import uuid4

import pytest

from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import WHOLE, containers, on_node, pod_links, status

PATIENCE = 90.0
FOREIGN = """
table inet somebody { chain c { counter; }; }
table bridge somebody { chain c { counter; }; }
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    state = LabState(name=f"clean-{uuid4().hex[:6]}", nodes=plan_nodes(2), backend="auto")
    try:
        lab = cluster.up(state)
        process.wait_for(lambda: status(lab, "node1").peers == 1, PATIENCE, "the nodes to know each other")
        yield lab
    finally:
        cluster.down(state.name)


def clean(lab: LabState) -> subprocess.CompletedProcess[str]:
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    return on_node(lab, "node1", sys.executable, "-m", "podwire.cli.main", "node", "clean", "--config", str(config))


def said(lab: LabState, *command: str) -> str:
    done = on_node(lab, "node1", *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_node_that_is_given_up_is_as_it_was_before(lab: LabState) -> None:
    own = {"lo", "eth0", "theirs"}
    said(lab, "ip", "link", "add", "theirs", "type", "bridge")
    said(lab, "ip", "route", "add", "198.51.100.0/24", "dev", "eth0", "proto", "80")
    said(lab, "sh", "-c", f"echo '{FOREIGN}' | nft -f -")
    with containers(lab, "node1", "pod", 2) as (box, late):
        assert box.call("ADD", WHOLE).error == 0
        refused = clean(lab)
        assert "one daemon runs on this node already" in refused.stderr
        node.stop_daemon(lab, "node1")
        refused = clean(lab)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "1 wires are attached" in refused.stderr
        assert "podwire/pod0/eth0" in refused.stderr
        assert len(pod_links(lab, "node1")) == 3, "a wire and its two queues"
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
        assert box.call("DEL").error == 0
        node.stop_daemon(lab, "node1")
        done = clean(lab)
        assert done.returncode == 0, done.stderr
        assert "link pw0" in done.stdout
        assert "nft table bridge podwire" in done.stdout
        assert "route 10.244." in done.stdout
        links = {line.split()[0].split("@")[0] for line in said(lab, "ip", "-br", "link").splitlines()}
        assert links == own
        assert said(lab, "nft", "list", "tables").split("\n") == ["table inet somebody", "table bridge somebody", ""]
        assert said(lab, "ip", "route", "show", "proto", "80").split() == [
            "198.51.100.0/24",
            "dev",
            "eth0",
            "scope",
            "link",
        ]
        assert clean(lab).stdout == "nothing of the daemon is left on this node\n"
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
        assert late.call("ADD").error == 0, "a node that is taken on again"
        assert late.call("DEL").error == 0


def test_a_bridge_that_others_use_stays(lab: LabState) -> None:
    process.wait_for(lambda: not pod_links(lab, "node1"), PATIENCE, "the wires of others to be gone")
    said(lab, "ip", "link", "add", "vm0", "type", "veth", "peer", "name", "vm1")
    try:
        said(lab, "ip", "link", "set", "vm0", "master", "pw0")
        node.stop_daemon(lab, "node1")
        refused = clean(lab)
        assert refused.returncode == 1
        assert "vm0" in refused.stderr
        said(lab, "ip", "link", "show", "pw0")
    finally:
        said(lab, "ip", "link", "del", "vm0")
    node.start_daemon(lab, "node1")
    node.wait_daemon(lab, "node1")
