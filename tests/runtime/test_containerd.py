"""A foreign runtime: Debian's containerd on a lab node, which knows Podwire by its CNI folders alone, run by `ctr`."""

from __future__ import annotations

import json
from functools import partial

from podwire.lab import node, process
from podwire.lab.state import LabState
from tests.runtime.agent import in_use
from tests.runtime.containerd import PATIENCE, Containerd


def test_a_container_reaches_a_pod_of_another_node_under_its_own_address(
    lab: LabState, containerd: Containerd, peer: str
) -> None:
    before = in_use(lab, "node1")
    script = f"ip -4 -o address show eth0; wget -q -O - http://{peer}:8080/"
    done = containerd.run("reach", script, "--rm")
    assert done.returncode == 0, done.stderr
    shown, answer = done.stdout.split("\n", 1)
    own = shown.split()[3].split("/")[0]
    said = json.loads(answer)
    assert (said["pod"], said["node"], said["client"]) == ("peer", "node2", own)
    process.wait_for(lambda: in_use(lab, "node1") <= before, PATIENCE, "the address to come back")


def test_containers_keep_their_network_while_containerd_and_the_daemon_restart(
    lab: LabState, containerd: Containerd, peer: str
) -> None:
    started = containerd.run("stay", "sleep 600", "--detach")
    assert started.returncode == 0, started.stderr
    probe = partial(containerd.ctr, "task", "exec", "--exec-id", "probe", "stay", "ping", "-c1", "-W20", peer)
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
    (conflist,) = lab.files.node_path("node1", "/etc/cni/net.d").iterdir()
    plain = json.loads(conflist.read_text())
    assert (plain["cniVersion"], plain["cniVersions"]) == ("1.0.0", ["1.0.0", "1.1.0"])
