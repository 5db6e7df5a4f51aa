"""With `backend: auto` pods have the underlay's whole MTU until a node is reached by VXLAN, and again when none is.

One lab of three nodes: node1 and node3 on one segment, node2 on another. Pods of the first two talk while the third
comes and goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from uuid import uuid4

import pytest

from podwire.lab import cluster, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, containers, know_each_other, nothing_is_held, status, wait
from tests.netns.test_backends import addresses_of, forgets, have_mtus
from tests.netns.test_families import large
from tests.netns.traffic import Pings, traffic

POD_CIDR = "10.244.0.0/16,fd00:10:244::/56"
NEAR, FAR = ("node1", "node3"), "node2"
WHOLE, LESS = 1500, 1450


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    nodes = plan_nodes(3, POD_CIDR, segments=2)
    state = LabState(name=f"auto-{uuid4().hex[:6]}", nodes=nodes, pod_cidr=POD_CIDR, backend="auto")
    try:
        yield know_each_other(cluster.up(state))
    finally:
        cluster.down(state.name)


@contextlib.contextmanager
def two_pods(lab: LabState) -> Iterator[tuple[Container, Container, dict[int, str]]]:
    """One on each of the nodes that are near, and the addresses of the second by family."""
    with containers(lab, NEAR[0], "here", 1) as (here,), containers(lab, NEAR[1], "there", 1) as (there,):
        try:
            here.call("ADD")
            yield here, there, addresses_of(there.call("ADD").body)
        finally:
            deleted = [box.call("DEL").code for box in (here, there)]
        assert deleted == [0, 0]
    for name in NEAR:
        wait(partial(nothing_is_held, lab, name), f"{name} to be empty")


@contextlib.contextmanager
def without_the_far_node(lab: LabState) -> Iterator[None]:
    node.stop_daemon(lab, FAR)
    try:
        wait(partial(forgets, lab, FAR), f"etcd to forget {FAR}")
        yield
    finally:
        node.start_daemon(lab, FAR)
        node.wait_daemon(lab, FAR)
        know_each_other(lab)


def everything_has(lab: LabState, mtu: int, *boxes: Container) -> None:
    wanted = dict.fromkeys(("pod", "port", "pw0"), mtu) | {"pw-vxlan": LESS}
    for box in boxes:
        wait(partial(have_mtus, lab, box, wanted), f"MTU {mtu} on {box.node}")
        wait(lambda: status(lab, box.node).mtu == mtu, f"{box.node} to say so")  # noqa: B023  it is waited for here


def test_running_pods_follow_a_node_of_another_segment(lab: LabState) -> None:
    with two_pods(lab) as (here, there, addresses), Pings(here, addresses[4]) as pings:
        with traffic(here, there, addresses[6]) as talk:
            everything_has(lab, LESS, here, there)
            with without_the_far_node(lab):
                everything_has(lab, WHOLE, here, there)
                for address in addresses.values():
                    assert "1 received" in here.run(*large(address, WHOLE)).stdout
            everything_has(lab, LESS, here, there)
            assert "1 received" not in here.run(*large(addresses[4], WHOLE)).stdout
            assert talk.harm() == []
        assert pings.lost() == 0


def test_a_daemon_that_starts_without_etcd_remembers(lab: LabState) -> None:
    """Its pods never have another MTU meanwhile, and a new one has the same."""
    with two_pods(lab) as (here, there, _):
        restart_without_etcd(lab, here, LESS)
        with without_the_far_node(lab):
            everything_has(lab, WHOLE, here, there)
            restart_without_etcd(lab, here, WHOLE)


def restart_without_etcd(lab: LabState, box: Container, mtu: int) -> None:
    monitor = box.start("ip", "-o", "monitor", "link", "dev", "eth0")
    try:
        cluster.kill_etcd(lab, "etcd1")
        try:
            node.stop_daemon(lab, box.node)
            node.start_daemon(lab, box.node)
            node.wait_daemon(lab, box.node)
            with containers(lab, box.node, "new", 1) as (new,):
                assert new.call("ADD").body["interfaces"][1]["mtu"] == mtu
                assert new.call("DEL").code == 0
        finally:
            cluster.start_etcd(lab)
        others = status(lab, NEAR[1]).peers
        wait(lambda: status(lab, box.node).peers == others, "the daemon to know its peers again")
        everything_has(lab, mtu, box)
    finally:
        monitor.terminate()
        said = monitor.communicate()[0]
    assert [line for line in said.splitlines() if "mtu" in line and f"mtu {mtu} " not in line] == []
