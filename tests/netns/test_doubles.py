"""Records in etcd that say what is another node's own: machines that were renamed or installed anew leave such.

Two nodes of both families that reach each other directly, and a `ghost` that somebody writes into etcd.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from uuid import uuid4

import pytest
import yaml

from podwire.lab import cluster, node
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, add, containers, know_each_other, on_node, status, wait

HIDDEN = "fd00:172:31::77/64"
POOLS = "10.250.0.0/24,fd00:10:250::/56"
_SESSION = """
import asyncio, ipaddress, sys
import msgspec
from ipam_daemon.model import *
from ipam_daemon.registry import ROOT as root
from podwire.etcd import EtcdOptions, EtcdSession
ip, net = ipaddress.ip_address, ipaddress.ip_network

async def main():
    async with EtcdSession(EtcdOptions(endpoints=tuple(sys.argv[1:]))) as session:
        mine = decode((await session.get(root + "nodes/node2")).value, NodeRecord)
"""
_GHOST = """
await session.put(root + "nodes/ghost", encode(msgspec.structs.replace(mine, name="ghost", node_id="ghost", {what})))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    state = LabState(name=f"doubles-{uuid4().hex[:6]}", nodes=plan_nodes(2, POOLS), pod_cidr=POOLS, backend="auto")
    try:
        yield know_each_other(cluster.up(state))
    finally:
        cluster.down(state.name)


def etcd(lab: LabState, what: str) -> str:
    """A few lines of Python on `session`, and on node2's record as `mine`."""
    script = _SESSION + "".join(f"        {line}\n" for line in what.strip().splitlines()) + "asyncio.run(main())\n"
    done = on_node(lab, "node1", sys.executable, "-c", script, *lab.etcd_endpoints)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def ghost(lab: LabState, what: str) -> Iterator[None]:
    """A node that nobody is, with node2's record but for `what`."""
    etcd(lab, _GHOST.format(what=what))
    try:
        wait(lambda: "ghost" in said(lab, "node1") or peers(lab, "node1") == 2, "node1 to hear of it")
        yield
    finally:
        etcd(lab, 'await session.delete(root + "nodes/ghost")')
        wait(lambda: peers(lab, "node1") == peers(lab, "node2") == 1, "the nodes to have forgotten it")


def free_blocks(lab: LabState) -> list[str]:
    """A block of each family that no node has."""
    taken = {block.cidr for each in lab.nodes for block in status(lab, each.name).blocks}
    fours = (f"10.250.0.{16 * number}/28" for number in range(16))
    sixes = (f"fd00:10:250:{number:x}::/64" for number in range(1, 256))
    return [next(cidr for cidr in cidrs if cidr not in taken) for cidrs in (fours, sixes)]


def having(blocks: list[str]) -> str:
    return "blocks=(" + "".join(f"net({cidr!r})," for cidr in blocks) + ")"


def peers(lab: LabState, name: str) -> int:
    return status(lab, name).peers


def said(lab: LabState, name: str) -> str:
    return "; ".join((*status(lab, name).reasons, *status(lab, name).notes))


def restart(lab: LabState, name: str, anew: bool = False) -> None:
    """Another daemon; `anew` one that never had the routes to the other nodes, as far as it knows."""
    node.stop_daemon(lab, name)
    if anew:
        for each in lab.files.node_path(name, "/run/podwire").glob("journal.db*"):
            each.unlink()
    node.start_daemon(lab, name)
    node.wait_daemon(lab, name)


def talks(box: Container, addresses: list[str]) -> bool:
    return all(box.run("ping", "-c1", "-W1", each).returncode == 0 for each in addresses)


def routes(lab: LabState, name: str) -> str:
    return on_node(lab, name, "sh", "-c", "ip route; ip -6 route").stdout


def addresses_of(box: Container) -> list[str]:
    return [str(each["address"]).split("/")[0] for each in add(box).body["ips"]]


def test_a_machine_that_was_installed_anew_under_another_name_is_a_node(lab: LabState) -> None:
    blocks = free_blocks(lab)
    with ghost(lab, having(blocks)):
        restart(lab, "node2", anew=True)
        wait(lambda: status(lab, "node2").ready, "node2 to be ready beside what is said to be at its address")
        assert not any(cidr in routes(lab, "node2") for cidr in blocks)
        assert "`podwire node forget`" in said(lab, "node2")
        assert "ghost" in said(lab, "node2")
        with containers(lab, "node1", "far", 1) as (far,), containers(lab, "node2", "near", 1) as (near,):
            there = addresses_of(near)
            addresses_of(far)
            wait(lambda: talks(far, there), "pods to reach each other")
            for each in (far, near):
                each.call("DEL")
    assert "ghost" not in said(lab, "node2")


def test_nobody_elses_record_takes_a_nodes_pods_from_it(lab: LabState) -> None:
    with containers(lab, "node2", "near", 1) as (near,):
        there = addresses_of(near)
        with ghost(lab, 'addresses=(ip("172.31.0.66"), ip("fd00:172:31::66"))'):
            wait(lambda: "ghost" in said(lab, "node2"), "node2 to say what it thinks of it")
            restart(lab, "node2")
            wait(lambda: peers(lab, "node2") >= 1, "node2 to know of node1")
            assert "not as it should be" not in said(lab, "node2"), "nor does it try"
            for block in status(lab, "node2").blocks:
                assert f"{block.cidr} dev pw0" in routes(lab, "node2")
            for each in there:
                assert on_node(lab, "node2", "ping", "-c1", "-W2", each).returncode == 0
        near.call("DEL")


def test_a_route_that_the_kernel_refuses_keeps_no_pod_waiting(lab: LabState) -> None:
    """The next hop is an address of the node that it does not tell anybody of."""
    on_node(lab, "node2", "ip", "addr", "add", HIDDEN, "dev", "eth0", "nodad", "preferred_lft", "0")
    try:
        four, six = free_blocks(lab)
        with ghost(lab, f'addresses=(ip("172.31.0.77"), ip("fd00:172:31::77")), {having([four, six])}'):
            restart(lab, "node2", anew=True)
            wait(lambda: status(lab, "node2").ready, "node2 to be ready")
            wait(lambda: f"route {six}: EINVAL" in said(lab, "node2"), "node2 to say what is not there")
            assert f"{four} via 172.31.0.77" in routes(lab, "node2"), "all else is"
            with containers(lab, "node2", "near", 1) as (near,):
                addresses_of(near)
                near.call("DEL")
        wait(lambda: "EINVAL" not in said(lab, "node2"), "node2 to be content")
    finally:
        on_node(lab, "node2", "ip", "addr", "del", HIDDEN, "dev", "eth0")


def test_a_node_that_is_given_another_name_takes_its_blocks_along(lab: LabState) -> None:
    file = lab.files.node_path("node2", "/etc/podwire") / "ipamd.yaml"
    before = file.read_text()
    own = {block.cidr for block in status(lab, "node2").blocks}
    with containers(lab, "node1", "far", 1) as (far,), containers(lab, "node2", "near", 1) as (near,):
        there = addresses_of(near)
        addresses_of(far)
        try:
            for name, former in (("renamed", "node2"), ("node2", "renamed")):
                file.write_text(yaml.safe_dump(yaml.safe_load(before) | {"node": name}))
                restart(lab, "node2")
                wait(partial(has_all, lab, name, own), f"the blocks to be {name}'s")
                assert {block.cidr for block in status(lab, "node2").blocks} == own
                done = forget(lab, former)
                assert done.returncode == 0, done.stderr
                assert "released" not in done.stdout, "they are the node's under its new name"
                wait(partial(talks, far, there), f"{name}'s pods to be reached")
        finally:
            file.write_text(before)
        for each in (far, near):
            each.call("DEL")


def has_all(lab: LabState, name: str, blocks: set[str]) -> bool:
    """Whether etcd says that these blocks are the node's."""
    held = "[item.key for item in items if decode(item.value, Block).node == '{name}']"
    what = f'items = (await session.get_prefix(root + "blocks/")).items\nprint(*{held.format(name=name)})'
    return {key.partition("blocks/")[2] for key in etcd(lab, what).split()} == blocks


def forget(lab: LabState, name: str) -> subprocess.CompletedProcess[str]:
    config = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
    words = ("node", "forget", name, "--yes", "--config", str(config))
    return on_node(lab, "node1", sys.executable, "-m", "podwire.cli.main", *words)
