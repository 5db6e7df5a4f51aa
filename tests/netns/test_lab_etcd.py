"""Three members of etcd in a lab: one dies, most die, a node is cut off from them, the store is wiped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from podwire.lab import cluster, node, process, state, status
from podwire.lab.state import LabState
from tests.netns.containers import at_once, containers, on_node
from tests.netns.containers import status as daemon
from tests.netns.lab_fixtures import fresh_name
from tests.netns.traffic import traffic

PATIENCE = 20
LOSSLESS = "running pods lose no packet"


@pytest.fixture(scope="module")
def three() -> Iterator[LabState]:
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2), etcd_members=3))
    yield made
    cluster.down(made.name)


@pytest.fixture
def lab(three: LabState) -> Iterator[LabState]:
    """Two nodes and three members, all well; what a test kills is started again.

    A pod of each node talk to each other all the while: whatever happens to etcd, they lose nothing.
    """
    with containers(three, "node1", "talker", 1) as (talker,), containers(three, "node2", "listener", 1) as (listener,):
        assert talker.call("ADD").error == 0
        with traffic(talker, listener, listener.call("ADD").address) as through:
            yield three
            cluster.start_etcd(three)
            process.wait_for(partial(all_connected, three), PATIENCE, "etcd")
            assert through.harm() == []
        at_once([partial(each.call, "DEL") for each in (talker, listener)])


def all_connected(lab: LabState) -> bool:
    """Whether every daemon has etcd again."""
    return all(daemon(lab, each.name).etcd.connected for each in lab.nodes)


def running(lab: LabState) -> list[str]:
    return [member["name"] for member in status.status(lab)["etcd_members"] if member["running"]]


@pytest.mark.fault("one of three etcd members down", promises=("ADD, DEL and claims go on", LOSSLESS))
def test_one_member_dies_and_everything_goes_on(lab: LabState) -> None:
    with containers(lab, "node1", "one", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        assert a.call("ADD").error == 0
        cluster.kill_etcd(lab, "etcd1")
        assert running(lab) == ["etcd2", "etcd3"]
        assert b.call("ADD").error == 0
        node.stop_daemon(lab, "node1")  # its next process joins with what is left of etcd
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to find another member")
        assert [each.run("ping", "-c1", "-W2", address).returncode for each in (a, b)] == [0, 0]
        assert {each.call("DEL").code for each in (a, b, peer)} == {0}


@pytest.mark.fault(
    "two of three etcd members down", promises=("ADD and DEL go on", "all converges afterwards", LOSSLESS)
)
def test_without_a_quorum_pods_come_and_go_and_all_converges_afterwards(lab: LabState) -> None:
    with containers(lab, "node1", "two", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        for name in ("etcd2", "etcd3"):
            cluster.kill_etcd(lab, name)
        assert a.call("ADD").error == 0
        assert a.run("ping", "-c1", "-W2", address).returncode == 0
        assert a.call("DEL").code == 0
        cluster.start_etcd(lab)
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "a quorum again")
        assert b.call("ADD").error == 0
        at_once([lambda each=each: each.call("DEL") for each in (b, peer)])  # type: ignore[misc]


@pytest.mark.fault("a node cut off from etcd", promises=("its pods and its name stay", LOSSLESS))
def test_a_node_that_is_cut_off_from_etcd_keeps_its_pods_and_name(lab: LabState) -> None:
    """Cut off by a rule in its own namespace: nothing is refused, packets just vanish."""
    with containers(lab, "node1", "cut", 1) as (a,), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        block = daemon(lab, "node1").blocks[0].cidr
        drop = "table inet cut { chain o { type filter hook output priority 0; tcp dport 2379 drop; }; }"
        assert on_node(lab, "node1", "nft", drop).returncode == 0
        try:
            process.wait_for(lambda: not daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to notice")
            assert a.call("ADD").error == 0
            assert a.run("ping", "-c1", "-W2", address).returncode == 0
        finally:
            on_node(lab, "node1", "nft", "delete", "table", "inet", "cut")
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to be back")
        assert [each.cidr for each in daemon(lab, "node1").blocks] == [block]
        assert {each.call("DEL").code for each in (a, peer)} == {0}


@pytest.mark.fault("etcd wiped", promises=("nodes claim their blocks again", "no address twice", LOSSLESS))
def test_a_wiped_etcd_learns_again_what_the_nodes_have(lab: LabState) -> None:
    with containers(lab, "node1", "wipe", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        assert a.call("ADD").error == 0
        before = {each.name: [block.cidr for block in daemon(lab, each.name).blocks] for each in lab.nodes}
        for member in lab.etcd:
            cluster.kill_etcd(lab, member.name)
            subprocess.run(["rm", "-r", str(lab.files.etcd / f"{member.name}.data")], check=True)
        cluster.start_etcd(lab)
        log = lab.files.log(node.daemon_role("node1"))
        process.wait_for(
            lambda: "etcd had lost a block of this node" in log.read_text(), PATIENCE, "node1 to claim its block again"
        )
        assert b.call("ADD").error == 0
        assert a.run("ping", "-c1", "-W2", address).returncode == 0
        after = {each.name: [block.cidr for block in daemon(lab, each.name).blocks] for each in lab.nodes}
        assert after == before
        assert {each.call("DEL").code for each in (a, b, peer)} == {0}
