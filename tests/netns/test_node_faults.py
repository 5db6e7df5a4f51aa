"""What a node promises when things go wrong: real daemons, real etcd, real wires, and the real executable.

One lab of two nodes serves all stories; each leaves it as it found it, and none depends on another.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import (
    add,
    add_again,
    at_once,
    containers,
    know_each_other,
    nothing_is_held,
    on_node,
    pod_links,
    status,
    wait,
)
from tests.netns.traffic import Pings, traffic

PATIENCE = 90.0
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes of which nothing is asked but their network."""
    state = LabState(name=f"faults-{uuid4().hex[:6]}", nodes=plan_nodes(2))
    try:
        yield know_each_other(cluster.up(state))
    finally:
        cluster.down(state.name)


def restart(lab: LabState, name: str) -> None:
    node.start_daemon(lab, name)
    node.wait_daemon(lab, name)


def test_two_hundred_pods_added_at_once_have_two_hundred_addresses(lab: LabState) -> None:
    with containers(lab, "node1", "a", 100) as first, containers(lab, "node2", "b", 100) as second:
        both = [each for pair in zip(first, second, strict=True) for each in pair]
        added = at_once([partial(each.call, "ADD") for each in both], workers=40)
        assert [answer.body for answer in added if answer.error] == []
        assert len({answer.address for answer in added}) == 200
        assert len(pod_links(lab, "node1")) == len(pod_links(lab, "node2")) == 100
        deleted = at_once([partial(each.call, "DEL") for each in both], workers=40)
        assert {answer.code for answer in deleted} == {0}
        for name in ("node1", "node2"):
            wait(partial(nothing_is_held, lab, name), f"all addresses and links of {name} to be free")


@pytest.mark.fault(
    "daemon killed and started again",
    promises=("running pods lose no packet", "a DEL meanwhile is queued and done", "every answer is true, or error 11"),
)
def test_a_killed_daemon_loses_no_packet_and_no_del(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "here", 3) as (talker, gone, late), containers(lab, "node2", "there", 1) as (peer,):
        at_once([partial(each.call, "ADD") for each in (talker, gone)])
        address = peer.call("ADD").address
        with Pings(talker, address) as pings:
            node.kill_daemon(lab, "node1")
            assert late.call("ADD").error == 11
            assert late.call("CHECK").error == 11
            assert late.call("STATUS").error == 50
            assert gone.call("DEL").code == 0
            assert gone.call("DEL").code == 0, "a DEL may be repeated"
            queue = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
            assert len(list(queue.glob("*.del"))) == 2
            began = time.monotonic()
            node.start_daemon(lab, "node1")
            add_again(late, record_property, began)
            wait(lambda: not list(queue.iterdir()), "the queue to be replayed")
            wait(lambda: len(pod_links(lab, "node1")) == 2, "the queued DEL to be done")
            assert pings.lost() == 0
        at_once([partial(each.call, "DEL") for each in (talker, late, peer)])
    wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")


@pytest.mark.fault(
    "daemon stopped amid ADDs",
    promises=(
        "calls in flight are finished",
        "every answer is true, or error 11",
        "nothing is held after the runtime's DEL",
    ),
)
def test_sigterm_finishes_the_calls_in_flight(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "term", 20) as boxes:
        stopping = threading.Timer(0.05, node.stop_daemon, (lab, "node1"))
        stopping.start()
        added = at_once([partial(each.call, "ADD") for each in boxes])
        stopping.join()
        succeeded = {each.name for each, answer in zip(boxes, added, strict=True) if not answer.error}
        assert {answer.error for answer in added} <= {0, 11}
        began = time.monotonic()
        restart(lab, "node1")
        with containers(lab, "node1", "after", 1) as (late,):
            add_again(late, record_property, began)
            late.call("DEL")
            wait(lambda: len(pod_links(lab, "node1")) == len(succeeded), "the wire to be gone")
        for each in boxes:
            assert ("eth0" in each.links()) == (each.name in succeeded)
        assert status(lab, "node1").blocks[0].used == len(succeeded)
        at_once([partial(each.call, "DEL") for each in boxes])
        wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")


@pytest.mark.fault(
    "daemon killed amid 20 ADDs",
    promises=("every answer is true, or error 11", "nothing is held after the runtime's DEL"),
)
def test_kill_in_the_middle_of_adds_leaves_nothing_that_nobody_has(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "kill", 20) as boxes:
        killing = threading.Timer(0.05, node.kill_daemon, (lab, "node1"))
        killing.start()
        added = at_once([partial(each.call, "ADD") for each in boxes])
        killing.join()
        assert {answer.error for answer in added} <= {0, 11}
        began = time.monotonic()
        restart(lab, "node1")
        with containers(lab, "node1", "after", 1) as (late,):
            add_again(late, record_property, began)
            late.call("DEL")
        deleted = at_once([partial(each.call, "DEL") for each in boxes])
        assert {answer.code for answer in deleted} == {0}
        wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")
        assert all("eth0" not in each.links() for each in boxes)
        again = at_once([partial(each.call, "ADD") for each in boxes])
        assert len({answer.address for answer in again}) == 20
        at_once([partial(each.call, "DEL") for each in boxes])


@pytest.mark.fault(
    "etcd away, daemon restarted meanwhile",
    promises=("ADD and DEL go on in the node's blocks", "running pods lose no packet"),
)
def test_pods_start_while_etcd_is_away_and_after_a_restart_without_it(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "etcd", 4) as (talker, *boxes), containers(lab, "node2", "far", 1) as (peer,):
        first, second, third = boxes
        address = peer.call("ADD").address
        assert talker.call("ADD").error == 0
        with traffic(talker, peer, address) as through:
            etcd = process.recorded(lab.files, cluster.ETCD)
            assert etcd is not None
            etcd.kill()
            assert etcd.wait_gone(PATIENCE)
            try:
                assert first.call("ADD").error == 0
                node.kill_daemon(lab, "node1")
                began = time.monotonic()
                node.start_daemon(lab, "node1")
                add_again(second, record_property, began)
                assert second.run("ping", "-c1", "-W10", address).returncode == 0, "routes to other nodes have stayed"
                assert first.call("DEL").code == 0
            finally:
                cluster.start_etcd(lab)
            wait(lambda: status(lab, "node1").etcd.connected and status(lab, "node1").peers == 1, "node1 to join again")
            assert third.call("ADD").error == 0
            assert through.harm() == []
        at_once([partial(each.call, "DEL") for each in (talker, second, third, peer)])


@pytest.mark.fault(
    "daemons of two nodes upgraded", promises=("running pods lose no packet", "rules and wires stay as they are")
)
def test_an_upgrade_with_pods_running_drops_no_packet(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "up", 2) as (talker, other), containers(lab, "node2", "stay", 1) as (peer,):
        link = talker.call("ADD").body["interfaces"][0]["name"]
        address = peer.call("ADD").address
        with Pings(talker, address) as pings:
            rules = on_node(lab, "node1", "nft", "-s", "list", "table", "inet", "podwire").stdout
            for name in ("node2", "node1"):
                node.stop_daemon(lab, name)
                began = time.monotonic()
                restart(lab, name)
            add_again(other, record_property, began)
            assert on_node(lab, "node1", "nft", "-s", "list", "table", "inet", "podwire").stdout == rules
            assert link in pod_links(lab, "node1")
            assert pings.lost() == 0
        at_once([partial(each.call, "DEL") for each in (talker, other, peer)])


def second_daemon(lab: LabState, folder: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Runs a daemon on node2 that calls itself as `changes` say, until it gives up."""
    config = node.daemon_config(lab, lab.node("node2"))
    config |= {"runDir": str(folder / "run"), "stateDir": str(folder / "state"), "httpListen": ""}
    file = folder / "ipamd.yaml"
    file.write_text(yaml.safe_dump(config | changes))
    command = [*node.enter_command(lab, "node2"), *node.PYTHON, "-m", "ipam_daemon.main", "--config", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.fault("one node name on two machines", promises=("the second refuses and says why",))
def test_a_node_name_that_is_live_is_refused(lab: LabState, tmp_path: Path) -> None:
    refused = second_daemon(lab, tmp_path, node="node1")
    assert refused.returncode == 1
    assert "'node1' is in use by machine" in refused.stderr
    assert "172.31.0.11" in refused.stderr
    assert status(lab, "node1").ready, "the one that has the name goes on"


@pytest.mark.fault("two daemons on one node", promises=("the second refuses and says why",))
def test_a_second_daemon_on_a_node_is_refused(lab: LabState, tmp_path: Path) -> None:
    refused = second_daemon(lab, tmp_path, runDir=str(lab.files.node_path("node2", "/run/podwire")))
    assert refused.returncode == 1
    assert "one daemon runs on this node already" in refused.stderr


def test_a_configuration_that_differs_from_the_clusters_is_refused(lab: LabState, tmp_path: Path) -> None:
    refused = second_daemon(lab, tmp_path, node="node9", pools=[{"cidr": "10.244.0.0/16", "blockSize": 26}])
    assert refused.returncode == 1
    assert "pools[0].blockSize is 26" in refused.stderr


@pytest.mark.fault("garbage on the daemon's socket", promises=("ADD and DEL go on",))
def test_garbage_on_the_socket_hurts_nobody(lab: LabState, record_property: Record) -> None:
    path = str(lab.files.ipamd_socket("node1"))
    for junk in (b"", b"\0" * 100_000, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            try:
                client.sendall(junk)
            except (BrokenPipeError, ConnectionResetError):
                continue  # the daemon has seen enough
    began = time.monotonic()
    with containers(lab, "node1", "junk", 1) as (box,):
        add_again(box, record_property, began)
        box.call("DEL")


def test_the_largest_packet_of_a_pod_fits_through_the_tunnel(lab: LabState) -> None:
    with containers(lab, "node1", "mtu", 1) as (box,), containers(lab, "node2", "big", 1) as (peer,):
        box.call("ADD")
        address = peer.call("ADD").address
        headers, vxlan = 28, 50  # IP and ICMP; outer IP, UDP, VXLAN, inner Ethernet
        largest = 1500 - vxlan - headers
        assert box.run("ping", "-c1", "-W10", "-M", "do", "-s", str(largest), address).returncode == 0
        too_large = box.run("ping", "-c1", "-W2", "-M", "do", "-s", str(largest + 1), address)
        assert too_large.returncode != 0
        assert "mtu=1450" in too_large.stderr + too_large.stdout
        at_once([partial(each.call, "DEL") for each in (box, peer)])


@pytest.mark.fault("tunnel, rules and bridge address deleted by hand", promises=("they are put back",))
def test_what_somebody_deleted_is_put_back(lab: LabState) -> None:
    with containers(lab, "node1", "mend", 1) as (box,), containers(lab, "node2", "other", 1) as (peer,):
        box.call("ADD")
        address = peer.call("ADD").address
        node.stop_daemon(lab, "node1")  # one that looks just now would put back what is missed below
        on_node(lab, "node1", "ip", "link", "delete", "pw-vxlan")
        on_node(lab, "node1", "nft", "delete", "table", "inet", "podwire")
        on_node(lab, "node1", "ip", "address", "flush", "dev", "pw0")
        assert box.run("ping", "-c1", "-W1", address).returncode != 0
        restart(lab, "node1")
        wait(lambda: box.run("ping", "-c1", "-W1", address).returncode == 0, "the tunnel to be mended")
        assert "masquerade" in on_node(lab, "node1", "nft", "list", "table", "inet", "podwire").stdout
        at_once([partial(each.call, "DEL") for each in (box, peer)])


@pytest.mark.fault(
    "pool exhausted",
    promises=("the error names pool and numbers", "a failed ADD leaves no wire", "ADD works once there is an address"),
)
def test_a_full_pool_says_so_and_recovers(record_property: Record) -> None:
    state = LabState(name=f"full-{uuid4().hex[:6]}", nodes=plan_nodes(1), pod_cidr="10.250.0.0/28")
    try:
        lab = cluster.up(state)
        with containers(lab, "node1", "full", 10) as boxes:
            added = [add(each) for each in boxes]
            assert [answer.error for answer in added] == [0] * 8 + [100] * 2
            assert "pool default" in added[8].body["msg"]
            assert "8 used, 0 releasing, 0 cooling, 8 reserved" in added[8].body["msg"]
            assert "no free block" in added[8].body["msg"]
            assert boxes[8].call("STATUS").error == 50
            assert "eth0" not in boxes[8].links()
            boxes[0].call("DEL")
            began = time.monotonic()
            wait(lambda: boxes[8].call("STATUS").code == 0, "the address to be seen free")
            again = add_again(boxes[8], record_property, began)
            assert again.address == added[0].address, "one that cools is used before none is"
            at_once([partial(each.call, "DEL") for each in boxes])
            wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")
    finally:
        cluster.down(state.name)


@pytest.mark.fault("a queued DEL replayed after a later ADD", promises=("the later ADD stays",))
def test_a_del_that_was_queued_before_an_add_does_not_undo_it(lab: LabState) -> None:
    with containers(lab, "node1", "order", 1) as (box,):
        node.kill_daemon(lab, "node1")
        assert box.call("DEL").code == 0
        queue = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
        (queued,) = queue.iterdir()
        saved = queued.read_bytes()
        restart(lab, "node1")
        assert box.call("ADD").error == 0
        queued.write_bytes(saved)  # as if the executable had been slow to write it
        wait(lambda: not queued.exists(), "the replay")
        assert "eth0" in box.links()
        box.call("DEL")
