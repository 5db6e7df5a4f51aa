"""Pods of either family and of both, over every backend: who reaches whom, and whom the server sees.

Each lab is built once, and asked about everything. What the demonstration shows of a dual-stack lab is judged here by
the same rows for the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from uuid import uuid4

import msgspec
import pytest
from rich.console import Console

from podwire.lab import cluster, demo
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, add, containers, know_each_other, nothing_is_held, on_node, status, wait
from tests.netns.lab_fixtures import Pods

V4, V6 = "10.244.0.0/16", "fd00:10:244::/56"
PATIENCE = 90.0


class Case(msgspec.Struct, frozen=True):
    """A lab: its pools, backend and segments, the device that leads to node2's and to node3's pods, and pods' MTU."""

    pod_cidr: str
    backend: str
    segments: int
    devices: tuple[str, str]
    mtu: int


CASES = {
    "IPv6 alone, VXLAN over IPv6": Case(V6, "vxlan", 1, ("pw-vxlan", "pw-vxlan"), 1430),
    "both by VXLAN over IPv4": Case(f"{V4},{V6}", "vxlan", 1, ("pw-vxlan", "pw-vxlan"), 1450),
    "both by VXLAN over IPv6": Case(f"{V6},{V4}", "vxlan", 1, ("pw-vxlan", "pw-vxlan"), 1430),
    "both directly": Case(f"{V4},{V6}", "direct", 1, ("eth0", "eth0"), 1500),
    "both directly or by VXLAN, two segments": Case(f"{V4},{V6}", "auto", 2, ("pw-vxlan", "eth0"), 1450),
}


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    assert isinstance(request.param, Case)
    return request.param


@pytest.fixture(scope="module")
def lab(case: Case) -> Iterator[LabState]:
    nodes = plan_nodes(3, case.pod_cidr, case.segments)
    state = LabState(name=f"fam-{uuid4().hex[:6]}", nodes=nodes, pod_cidr=case.pod_cidr, backend=case.backend)
    try:
        yield know_each_other(cluster.up(state))
    finally:
        cluster.down(state.name)


def test_everybody_reaches_everybody_under_the_address_that_is_right(lab: LabState) -> None:
    demo.start_outside(lab)
    with Pods(lab, demo.demo_pods()):
        stage = demo.Stage(lab, Console(quiet=True))
        rows = [demo.judge(row) for row in demo.checks(stage)]
    assert [wrong for _, wrong in rows if wrong] == []
    assert len(rows) == 12 * len(lab.families)


def test_the_way_to_a_node_is_the_backends(lab: LabState, case: Case) -> None:
    blocks = {each.name: status(lab, each.name).blocks for each in lab.nodes}
    for target, device in zip(("node2", "node3"), case.devices, strict=True):
        for block in blocks[target]:
            family = "-6" if ":" in block.cidr else "-4"
            (route,) = json.loads(on_node(lab, "node1", "ip", "-j", family, "route", "show", block.cidr).stdout)
            assert route["dev"] == device, (target, block.cidr)
    assert status(lab, "node1").peers == 2
    assert list(status(lab, "node1").notes) == []


def mtu(box: Container) -> int:
    return int(json.loads(box.run("ip", "-j", "link", "show", "eth0").stdout)[0]["mtu"])


def test_an_add_gives_an_address_of_each_family_and_del_takes_all(lab: LabState, case: Case) -> None:
    with containers(lab, "node1", "each", 1) as (box,):
        result = box.call("ADD").body
        families = sorted(6 if ":" in each["address"] else 4 for each in result["ips"])
        assert families == sorted(lab.families)
        assert {each["gw"] for each in result["routes"]} == {each["gateway"] for each in result["ips"]}
        assert mtu(box) == case.mtu == result["interfaces"][1]["mtu"]
        config = {"cniVersion": "1.1.0", "name": "podwire", "type": "podwire", "prevResult": result}
        assert box.call("CHECK", config).error == 0
        assert box.call("DEL").code == 0
        wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")


def test_the_first_packet_from_another_node_finds_a_new_pod(lab: LabState) -> None:
    """Nobody waits for duplicate address detection, and nobody needs to: not the pod, and not the bridge either."""
    with containers(lab, "node1", "new", 1) as (new,), containers(lab, "node2", "old", 1) as (old,):
        old.call("ADD")
        addresses = [each["address"].split("/")[0] for each in new.call("ADD").body["ips"]]
        for address in addresses:
            said = old.run("ping", "-n", "-c", "1", "-W", "10", address).stdout
            assert "1 received" in said, said
        for box in (new, old):
            box.call("DEL")
    for name in ("node1", "node2"):
        wait(partial(nothing_is_held, lab, name), f"{name} to be empty")


def test_a_namespace_without_ipv6_gets_it_for_its_interface(lab: LabState) -> None:
    off = "for each in all default lo; do echo 1 >/proc/sys/net/ipv6/conf/$each/disable_ipv6; done"
    with containers(lab, "node1", "off", 1) as (box,):
        assert box.run("sh", "-c", off).returncode == 0
        for each in box.call("ADD").body["ips"]:
            assert box.run("ping", "-n", "-c", "1", "-W", "10", each["gateway"]).returncode == 0
        box.call("DEL")
    wait(partial(nothing_is_held, lab, "node1"), "node1 to be empty")


def large(address: str, mtu: int) -> list[str]:
    """A ping that fills a packet of this size, and may not be cut."""
    headers = 48 if ":" in address else 28
    return ["ping", "-n", "-c", "1", "-W", "10", "-M", "do", "-s", str(mtu - headers), address]


def test_the_largest_packet_passes_whole(lab: LabState, case: Case) -> None:
    with containers(lab, "node1", "here", 1) as (here,), containers(lab, "node2", "there", 1) as (there,):
        here.call("ADD")
        for each in there.call("ADD").body["ips"]:
            assert "1 received" in here.run(*large(each["address"].split("/")[0], case.mtu)).stdout
        for box in (here, there):
            box.call("DEL")
    for name in ("node1", "node2"):
        wait(partial(nothing_is_held, lab, name), f"{name} to be empty")


def test_a_pod_has_an_address_of_each_family_or_none() -> None:
    """IPv6 has five addresses here, IPv4 plenty."""
    pools = f"{V4},fd00:10:244::/125"
    state = LabState(name=f"few-{uuid4().hex[:6]}", nodes=plan_nodes(1, pools), pod_cidr=pools)
    try:
        lab = cluster.up(state)
        with containers(lab, "node1", "few", 6) as boxes:
            assert [add(box).error for box in boxes[:5]] == [0] * 5
            refused = add(boxes[5])
            assert refused.error == 100
            assert "pool default: no address is free in this node's fd00:10:244::/125" in refused.body["msg"]
            assert [block.used for block in status(lab, "node1").blocks] == [5, 5]
            assert boxes[5].links() == {"lo"}
            said = boxes[5].call("STATUS")
            assert (said.error, "no IPv6 address is free" in said.body["msg"]) == (50, True)
            boxes[0].call("DEL")
            wait(lambda: boxes[5].call("ADD").error == 0, "an address of IPv6 to be free")
    finally:
        cluster.down(state.name)
