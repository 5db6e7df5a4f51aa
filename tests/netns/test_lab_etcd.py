"""Three members of etcd in a lab: one dies, most die, a node is cut off from them, the store is wiped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from podwire.lab import cluster, node, process, state, status
from podwire.lab.state import LabState
from tests.etcd.guarded import need
from tests.netns.containers import add_again, at_once, containers, know_each_other, on_node
from tests.netns.containers import status as daemon
from tests.netns.lab_fixtures import fresh_name
from tests.netns.traffic import traffic

PATIENCE = 90
LOSSLESS = "running pods lose no packet"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def three() -> Iterator[LabState]:
    """Blocks of twelve pods, so that a test can make a node claim another."""
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2), etcd_members=3, pod_cidr="10.250.0.0/24"))
    try:
        yield know_each_other(made)
    finally:
        cluster.down(made.name)


@pytest.fixture
def lab(three: LabState) -> Iterator[LabState]:
    """Two nodes and three members, all well; what a test kills is started again.

    A pod of each node talk to each other all the while: whatever happens to etcd, they lose nothing. No daemon
    ends, either.
    """
    with containers(three, "node1", "talker", 1) as (talker,), containers(three, "node2", "listener", 1) as (listener,):
        assert talker.call("ADD").error == 0
        with traffic(talker, listener, listener.call("ADD").address) as through:
            yield three
            cluster.start_etcd(three)
            ended = [each.name for each in three.nodes if not lives(three, each.name)]
            for name in ended:
                node.start_daemon(three, name)
                node.wait_daemon(three, name)
            process.wait_for(partial(all_connected, three), PATIENCE, "etcd")
            assert ended == [], "a daemon outlives whatever becomes of etcd"
            assert through.harm() == []
        at_once([partial(each.call, "DEL") for each in (talker, listener)])


def lives(lab: LabState, name: str) -> bool:
    """Whether the node's daemon that was started last still runs."""
    daemon_process = process.recorded(lab.files, node.daemon_role(name))
    return daemon_process is not None and daemon_process.alive


def all_connected(lab: LabState) -> bool:
    """Whether every daemon has etcd again."""
    return all(daemon(lab, each.name).etcd.connected for each in lab.nodes)


def blocks(lab: LabState, name: str) -> list[str]:
    return [each.cidr for each in daemon(lab, name).blocks]


def running(lab: LabState) -> list[str]:
    return [member["name"] for member in status.status(lab)["etcd_members"] if member["running"]]


@pytest.mark.fault("one of three etcd members down", promises=("ADD, DEL and claims go on", LOSSLESS))
def test_one_member_dies_and_everything_goes_on(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "one", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        assert a.call("ADD").error == 0
        cluster.kill_etcd(lab, "etcd1")
        killed = time.monotonic()
        assert running(lab) == ["etcd2", "etcd3"]
        assert add_again(b, record_property, killed).error == 0
        node.stop_daemon(lab, "node1")  # its next process joins with what is left of etcd
        node.start_daemon(lab, "node1")
        node.wait_daemon(lab, "node1")
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to find another member")
        assert [each.run("ping", "-c1", "-W30", address).returncode for each in (a, b)] == [0, 0]
        assert {each.call("DEL").code for each in (a, b, peer)} == {0}


@pytest.mark.fault(
    "two of three etcd members down", promises=("ADD and DEL go on", "all converges afterwards", LOSSLESS)
)
def test_without_a_quorum_pods_come_and_go_and_all_converges_afterwards(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "two", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        for name in ("etcd2", "etcd3"):
            cluster.kill_etcd(lab, name)
        assert add_again(a, record_property, time.monotonic()).error == 0
        assert a.run("ping", "-c1", "-W30", address).returncode == 0
        assert a.call("DEL").code == 0
        cluster.start_etcd(lab)
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "a quorum again")
        assert b.call("ADD").error == 0
        at_once([lambda each=each: each.call("DEL") for each in (b, peer)])  # type: ignore[misc]


@pytest.mark.fault("a node cut off from etcd", promises=("its pods and its name stay", LOSSLESS))
def test_a_node_that_is_cut_off_from_etcd_keeps_its_pods_and_name(lab: LabState, record_property: Record) -> None:
    """Cut off by a rule in its own namespace: nothing is refused, packets just vanish."""
    with containers(lab, "node1", "cut", 1) as (a,), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        before = blocks(lab, "node1")
        drop = "table inet cut { chain o { type filter hook output priority 0; tcp dport 2379 drop; }; }"
        assert on_node(lab, "node1", "nft", drop).returncode == 0
        cut = time.monotonic()
        try:
            assert add_again(a, record_property, cut).error == 0
            process.wait_for(lambda: not daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to notice")
            assert a.call("DEL").code == 0
            assert a.call("ADD").error == 0
            assert a.run("ping", "-c1", "-W30", address).returncode == 0
        finally:
            on_node(lab, "node1", "nft", "delete", "table", "inet", "cut")
        process.wait_for(lambda: daemon(lab, "node1").etcd.connected, PATIENCE, "node1 to be back")
        assert blocks(lab, "node1") == before
        assert {each.call("DEL").code for each in (a, peer)} == {0}


@pytest.mark.fault(
    "etcd's leader cut off from the other members, the daemons talk to it",
    promises=("claims go on with the majority", "no block twice", "no address twice", LOSSLESS),
)
def test_the_members_are_partitioned_and_the_daemons_go_to_the_majority(lab: LabState, record_property: Record) -> None:
    """Both nodes have twelve addresses in a block and want more, so that they claim while there are two sides."""
    need("etcdctl")
    with containers(lab, "node1", "part", 16) as ours, containers(lab, "node2", "rest", 16) as theirs:
        lead(lab, "etcd1")
        for name in ("node1", "node2"):  # a daemon that starts asks the first of its endpoints
            node.stop_daemon(lab, name)
            node.start_daemon(lab, name)
            node.wait_daemon(lab, name)
            process.wait_for(partial(asks, lab, name, "etcd1"), PATIENCE, f"{name} to ask etcd1")
        with partitioned(lab, "etcd1"):
            began = time.monotonic()
            both = [each for pair in zip(ours, theirs, strict=True) for each in pair]
            added = at_once([partial(add_again, each, lambda *_: None, began) for each in both], workers=8)
            record_property("add_again_s", round(time.monotonic() - began, 2))
            assert len({each.address for each in added}) == 32
            assert len(blocks(lab, "node1")) > 1
            majority = ("etcd2", "etcd3")
            process.wait_for(lambda: any(asks(lab, "node1", each) for each in majority), PATIENCE, "node1 to go over")
        process.wait_for(lambda: etcdctl(lab, "endpoint", "health").returncode == 0, PATIENCE, "one etcd again")
        assert set(blocks(lab, "node1")).isdisjoint(blocks(lab, "node2"))
        process.wait_for(  # a claim may be under way
            lambda: claimed(lab) == {each.name: sorted(blocks(lab, each.name)) for each in lab.nodes},
            PATIENCE,
            "etcd to say what each was told, and no more",
        )
        at_once([partial(each.call, "DEL") for each in both])


@contextmanager
def partitioned(lab: LabState, member: str) -> Iterator[None]:
    """The member and the others do not hear each other, by a rule in its own namespace; clients reach all of them."""
    drop = (
        "table inet cut { chain i { type filter hook input priority 0; tcp dport 2380 drop; tcp sport 2380 drop; };"
        " chain o { type filter hook output priority 0; tcp dport 2380 drop; tcp sport 2380 drop; }; }"
    )
    inside = ["nsenter", f"--net={lab.netns(member)}", "nft"]
    subprocess.run([*inside, drop], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "delete", "table", "inet", "cut"], check=True)


def etcdctl(lab: LabState, *words: str, at: str = "") -> subprocess.CompletedProcess[str]:
    endpoints = at or ",".join(lab.etcd_endpoints)
    command = ["env", "ETCDCTL_API=3", "etcdctl", "--endpoints", endpoints, *words]
    return subprocess.run(
        ["nsenter", f"--net={lab.netns('control')}", *command], capture_output=True, text=True, check=False
    )


def lead(lab: LabState, name: str) -> None:
    """Makes the member the leader."""

    def leads() -> bool:
        said = etcdctl(lab, "endpoint", "status", "-w", "json")
        if said.returncode != 0:  # one of them was slow
            return False
        shown = json.loads(said.stdout)
        ids = {each["Status"]["header"]["member_id"]: each["Endpoint"] for each in shown}
        (wanted,) = [each for each, url in ids.items() if url == endpoint(lab, name)]
        leader = shown[0]["Status"]["leader"]
        if leader != wanted and leader in ids:
            etcdctl(lab, "move-leader", f"{wanted:x}", at=ids[leader])
        return bool(leader == wanted)

    process.wait_for(leads, PATIENCE, f"{name} to lead")


def endpoint(lab: LabState, name: str) -> str:
    return next(member.endpoint for member in lab.etcd if member.name == name)


def asks(lab: LabState, node_name: str, member: str) -> bool:
    """Whether the node has a connection to the member."""
    said = on_node(lab, node_name, "ss", "-Htn", "state", "established", "dport", "=", ":2379").stdout
    reached = {line.split()[-1].rpartition(":")[0].strip("[]").removeprefix("::ffff:") for line in said.splitlines()}
    return any(each.address in reached for each in lab.etcd if each.name == member)


def claimed(lab: LabState) -> dict[str, list[str]]:
    """The blocks that etcd says are whose."""
    where = [word for each in lab.etcd_endpoints for word in ("--etcd", each)]
    command = [sys.executable, "-m", "podwire.cli.main", "node", "list", "-o", "json", *where]
    done = on_node(lab, "node1", *command)
    assert done.returncode == 0, done.stderr
    return {each["name"]: sorted(each["blocks"]) for each in json.loads(done.stdout)}


@pytest.mark.fault("etcd wiped", promises=("nodes claim their blocks again", "no address twice", LOSSLESS))
def test_a_wiped_etcd_learns_again_what_the_nodes_have(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "wipe", 2) as (a, b), containers(lab, "node2", "far", 1) as (peer,):
        address = peer.call("ADD").address
        assert a.call("ADD").error == 0
        before = {each.name: blocks(lab, each.name) for each in lab.nodes}
        for member in lab.etcd:
            cluster.kill_etcd(lab, member.name)
            subprocess.run(["rm", "-r", str(lab.files.etcd / f"{member.name}.data")], check=True)
        wiped = time.monotonic()
        cluster.start_etcd(lab)
        assert add_again(b, record_property, wiped).error == 0
        log = lab.files.log(node.daemon_role("node1"))
        process.wait_for(
            lambda: "etcd had lost a block of this node" in log.read_text(), PATIENCE, "node1 to claim its block again"
        )
        assert a.run("ping", "-c1", "-W30", address).returncode == 0
        after = {each.name: blocks(lab, each.name) for each in lab.nodes}
        assert after == before
        assert {each.call("DEL").code for each in (a, b, peer)} == {0}
