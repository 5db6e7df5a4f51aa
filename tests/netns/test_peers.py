"""The other nodes in the kernel: read back, brought to the plan, and packets that find their way."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ipam_daemon.devices import Devices
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool
from ipam_daemon.peers import Peers
from ipam_daemon.plan import PeersPlan, RoutePlan, plan_node, plan_peers, plan_record
from tests.netns.node_fixtures import Node, play

CONFIG = ClusterConfig(pools=(Pool(cidr=ipaddress.ip_network("10.244.0.0/16")),))


def block(number: int) -> Block:
    cidr = ipaddress.ip_network(f"10.244.{number}.0/24")
    return Block(cidr=cidr, pool="default", node=f"node-{number}", node_id="i", generation=1)


def record(number: int, address: str = "", *extra: int) -> NodeRecord:
    """The record of node-<number>, at 192.0.2.<number> unless given; with the blocks <number> and `extra`."""
    addresses = (ipaddress.ip_address(address or f"192.0.2.{number}"),)
    return plan_record(f"node-{number}", "i", 1, addresses, [block(each) for each in (number, *extra)], "0.1")


@asynccontextmanager
async def node_1() -> AsyncIterator[tuple[Node, Peers]]:
    """A node with its devices and an underlay address."""
    async with Node() as node:
        node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under1")
        for words in ("link set under1 up", "link set under0 up", "addr add 192.0.2.1/24 dev under0"):
            node.ip(*words.split())
        await ensure_devices(node, 1)
        yield node, Peers(node.thread)


async def ensure_devices(node: Node, number: int) -> None:
    plan = plan_node(CONFIG, record(number), [block(number)], (), 1500)
    devices = Devices(node.thread)
    await node.thread.run(devices.ensure_bridge, plan.bridge)
    await node.thread.run(devices.ensure_vxlan, plan.vxlan)


async def apply(node: Node, peers: Peers, plan: PeersPlan, resync: bool = False) -> int:
    if resync:
        await node.thread.run(peers.resync)
    return await node.thread.run(peers.apply, plan)


def state(node: Node) -> tuple[set[str], set[str], set[str]]:
    """Routes, neighbours and FDB entries of the VXLAN device, as words."""
    routes = {f"{r['dst']} via {r['gateway']}" for r in node.json("route", "show", "dev", "pw-vxlan") if "gateway" in r}
    neighbours = {
        f"{n['dst']} {n['lladdr']}" for n in node.json("neigh", "show", "dev", "pw-vxlan", "nud", "permanent")
    }
    lines = [line.split() for line in node.run("bridge", "fdb", "show", "dev", "pw-vxlan").splitlines()]
    fdb = {f"{words[0]} {words[words.index('dst') + 1]}" for words in lines if "dst" in words}
    return routes, neighbours, fdb


def of(*numbers: int) -> tuple[set[str], set[str], set[str]]:
    """What `state` shows for peers of these numbers."""
    return (
        {f"10.244.{n}.0/24 via 10.244.{n}.2" for n in numbers},
        {f"10.244.{n}.2 0a:58:0a:f4:{n:02x}:02" for n in numbers},
        {f"0a:58:0a:f4:{n:02x}:02 192.0.2.{n}" for n in numbers},
    )


def test_peers_join_and_leave() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            assert await apply(node, peers, plan_peers([record(2), record(3)]), resync=True) == 6
            assert state(node) == of(2, 3)
            assert await apply(node, peers, plan_peers([record(2), record(3)])) == 0
            assert await apply(node, peers, plan_peers([record(3)])) == 3
            assert state(node) == of(3)

    play(story)


def test_a_peer_that_moves_keeps_its_route() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            await apply(node, peers, plan_peers([record(2)]), resync=True)
            assert await apply(node, peers, plan_peers([record(2, "192.0.2.77")])) == 1
            assert state(node)[2] == {"0a:58:0a:f4:02:02 192.0.2.77"}
            assert await apply(node, peers, plan_peers([record(2, "192.0.2.77")]), resync=True) == 0

    play(story)


def test_a_second_block_is_one_more_route() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            await apply(node, peers, plan_peers([record(2)]), resync=True)
            assert await apply(node, peers, plan_peers([record(2, "", 9)])) == 1
            assert state(node)[0] == {"10.244.2.0/24 via 10.244.2.2", "10.244.9.0/24 via 10.244.2.2"}

    play(story)


def test_another_daemon_changes_nothing_that_is_right_and_removes_who_left_meanwhile() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            await apply(node, peers, plan_peers([record(2), record(3)]), resync=True)
            assert await apply(node, Peers(node.thread), plan_peers([record(2), record(3)]), resync=True) == 0
            assert await apply(node, Peers(node.thread), plan_peers([record(3)]), resync=True) == 3
            assert state(node) == of(3)

    play(story)


DAMAGE = {
    "a route deleted": "ip route del 10.244.2.0/24",
    "a route changed": "ip route replace 10.244.2.0/24 via 10.244.3.2 dev pw-vxlan onlink proto 80",
    "a neighbour deleted": "ip neigh del 10.244.2.2 dev pw-vxlan",
    "a neighbour changed": "ip neigh replace 10.244.2.2 lladdr 02:00:00:00:00:01 dev pw-vxlan nud permanent",
    "a neighbour that is not permanent": "ip neigh replace 10.244.2.2 lladdr 0a:58:0a:f4:02:02 dev pw-vxlan nud stale",
    "an FDB entry deleted": "bridge fdb del 0a:58:0a:f4:02:02 dev pw-vxlan dst 192.0.2.2",
    "an FDB entry changed": "bridge fdb replace 0a:58:0a:f4:02:02 dev pw-vxlan dst 192.0.2.99",
    "an FDB entry too many": "bridge fdb append 02:00:00:00:00:01 dev pw-vxlan dst 192.0.2.99",
    "a second place for a peer": "bridge fdb append 0a:58:0a:f4:02:02 dev pw-vxlan dst 192.0.2.99",
    "the device down, its routes gone": "ip link set pw-vxlan down",
    "the device deleted": "ip link del pw-vxlan",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_somebody_damaged_is_repaired(damage: str) -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            plan = plan_peers([record(2), record(3)])
            await apply(node, peers, plan, resync=True)
            node.run(*damage.split(), check=False)
            await ensure_devices(node, 1)
            await apply(node, peers, plan, resync=True)
            assert state(node) == of(2, 3)
            assert await apply(node, peers, plan, resync=True) == 0

    play(story)


def test_routes_and_neighbours_of_others_are_not_touched() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            node.ip("route", "add", "198.51.100.0/24", "via", "192.0.2.50")
            node.ip("route", "add", "198.51.101.0/24", "via", "192.0.2.50", "proto", "80")
            node.ip("neigh", "add", "192.0.2.50", "lladdr", "02:00:00:00:00:50", "dev", "under0", "nud", "permanent")
            before = node.ip("route"), node.ip("neigh", "show", "dev", "under0")
            await apply(node, peers, plan_peers([record(2)]), resync=True)
            await apply(node, peers, plan_peers([]), resync=True)
            assert (node.ip("route"), node.ip("neigh", "show", "dev", "under0")) == before

    play(story)


def test_without_its_device_it_is_to_be_tried_again() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            node.ip("link", "del", "pw-vxlan")
            with pytest.raises(PlumbingFailed, match="pw-vxlan is gone"):
                await apply(node, peers, plan_peers([record(2)]), resync=True)

    play(story)


def test_one_entry_that_the_kernel_refuses_does_not_stop_the_others() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            bad = PeersPlan(
                neighbours=plan_peers([record(2)]).neighbours,
                fdb=plan_peers([record(2)]).fdb,
                routes={
                    ipaddress.ip_network("10.244.8.0/24"): RoutePlan(
                        gateway=ipaddress.ip_address("10.244.1.2"), device="pw-vxlan"
                    ),
                    **plan_peers([record(2)]).routes,
                },
            )
            with pytest.raises(PlumbingFailed, match=r"route 10\.244\.8\.0/24"):
                await apply(node, peers, bad, resync=True)
            assert state(node)[0] == of(2)[0]
            assert await apply(node, peers, plan_peers([record(2)]), resync=True) >= 0
            assert state(node) == of(2)

    play(story)


def test_two_nodes_reach_each_other() -> None:
    async def story() -> None:
        async with Node("n1") as one, Node("n2") as two:
            one.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", two.name)
            for number, node in enumerate((one, two), 1):
                node.ip("addr", "add", f"192.0.2.{number}/24", "dev", "under0")
                node.ip("link", "set", "under0", "up")
                await ensure_devices(node, number)
            await asyncio.gather(
                apply(one, Peers(one.thread), plan_peers([record(2)]), resync=True),
                apply(two, Peers(two.thread), plan_peers([record(1)]), resync=True),
            )
            assert one.pings("10.244.2.1")
            assert two.pings("10.244.1.1")

    play(story)
