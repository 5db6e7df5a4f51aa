"""The other nodes in the kernel: read back, brought to the plan, and packets that find their way."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import pytest

from ipam_daemon.allocator import Layout
from ipam_daemon.devices import Devices
from ipam_daemon.errors import EntriesRefused, PlumbingFailed
from ipam_daemon.model import BackendType, Block, ClusterConfig, NodeRecord, Pool
from ipam_daemon.peer_table import PeerTable, Touched
from ipam_daemon.peers import Peers
from ipam_daemon.plan import PeersPlan, RoutePlan, plan_node, plan_peers, plan_record
from tests.netns.node_fixtures import Node, eventually, play

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
    plan = plan_node(CONFIG, record(number), [block(number)], 1500)
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
    "a place for whatever nobody knows": "bridge fdb append 00:00:00:00:00:00 dev pw-vxlan dst 192.0.2.98",
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


def test_several_places_for_whatever_nobody_knows_are_gone_at_once() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            for last in (98, 99):
                node.run(*f"bridge fdb append 00:00:00:00:00:00 dev pw-vxlan dst 192.0.2.{last}".split())
            assert await apply(node, peers, plan_peers([record(2)]), resync=True) == 4
            assert state(node) == of(2)

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


def test_a_route_waits_for_its_neighbour_and_is_made_when_that_is_there() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            plan = plan_peers([record(2), record(3)])
            lacking = msgspec.structs.replace(plan, neighbours={VTEP_3: plan.neighbours[VTEP_3]})
            with pytest.raises(
                PlumbingFailed, match=r"route 10\.244\.2\.0/24: its gateway 10\.244\.2\.2 has no neighb"
            ):
                await apply(node, peers, lacking, resync=True)
            assert state(node)[0] == of(3)[0]
            touched = Touched(neighbours=frozenset(plan.neighbours))
            assert await node.thread.run(peers.apply, plan, touched) == 2, "what was refused is still pending"
            assert state(node) == of(2, 3)

    play(story)


SOMEBODYS = {
    "by another gateway": "route add 10.244.2.0/24 via 192.0.2.50 dev under0 proto static",
    "to nowhere": "route add blackhole 10.244.2.0/24",
    "to a bridge of somebody's": "route add 10.244.2.0/24 dev under0 scope link",
}


@pytest.mark.parametrize("name", SOMEBODYS)
def test_a_route_of_somebody_else_to_a_peers_block_stays_and_is_told_of(name: str) -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            node.ip(*SOMEBODYS[name].split())
            before = [each for each in node.json("route") if each["dst"] == "10.244.2.0/24"]
            for _ in range(2):  # when the daemon starts, and when it tries again
                with pytest.raises(EntriesRefused, match=r"^route 10\.244\.2\.0/24: there is one already"):
                    await apply(node, peers, plan_peers([record(2), record(3)]), resync=True)
            await apply(node, peers, plan_peers([record(3)]))
            assert [each for each in node.json("route") if each["dst"] == "10.244.2.0/24"] == before
            assert state(node) == of(3)
            node.ip("route", "del", "10.244.2.0/24")
            await apply(node, peers, plan_peers([record(2), record(3)]))
            assert state(node) == of(2, 3)

    play(story)


VTEP_3 = ipaddress.ip_address("10.244.3.2")


def test_every_entry_that_was_refused_is_named_and_none_of_the_others() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            good = plan_peers([record(number) for number in range(2, 202)])
            bad = {
                ipaddress.ip_network(f"10.245.{n}.0/24"): RoutePlan(
                    gateway=UNREACHABLE, device="pw-vxlan", onlink=False
                )
                for n in range(5)
            }
            with pytest.raises(PlumbingFailed) as caught:
                await apply(node, peers, msgspec.structs.replace(good, routes={**bad, **good.routes}), resync=True)
            told = str(caught.value)
            assert [f"route 10.245.{n}.0/24: ENETUNREACH" in told for n in range(5)] == [True] * 3 + [False] * 2
            assert told.endswith("(and 2 more)")
            assert state(node) == of(*range(2, 202))
            assert await apply(node, peers, good) == 0

    play(story)


UNREACHABLE = ipaddress.ip_address("203.0.113.9")


# --- only what changed --------------------------------------------------------------------------------------------


def test_what_was_touched_is_all_that_is_looked_at() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            table = PeerTable("node-1", plan_peers)

            async def become(*records: NodeRecord) -> int:
                table.update({each.name: each for each in records})
                changed = await node.thread.run(peers.apply, table.peers, table.touched)
                table.settle()
                return changed

            await node.thread.run(peers.resync)
            assert await become(record(2), record(3)) == 6
            assert await become(record(2), record(3), record(4)) == 3
            assert await become(record(2, "192.0.2.77"), record(3), record(4)) == 1
            assert await become(record(3), record(4)) == 3
            assert await become(record(3), record(4)) == 0
            assert state(node) == of(3, 4)
            assert await apply(node, peers, table.peers, resync=True) == 0

    play(story)


def test_a_device_that_was_made_anew_gets_all_of_them_again() -> None:
    async def story() -> None:
        async with node_1() as (node, peers):
            plan = plan_peers([record(2), record(3)])
            await apply(node, peers, plan, resync=True)
            node.ip("link", "del", "pw-vxlan")
            await ensure_devices(node, 1)
            assert await node.thread.run(peers.apply, plan, Touched()) == 6
            assert state(node) == of(2, 3)

    play(story)


@pytest.mark.parametrize("count", [1, 128, 129, 5000])
def test_many_peers(count: int) -> None:
    """Everything is there, another daemon finds it right, and all but one leave."""

    async def story() -> None:
        async with node_1() as (node, peers):
            many = [crowd(number) for number in range(count)]
            plan = plan_peers(many)
            assert await apply(node, peers, plan, resync=True) == 3 * count
            assert await node.thread.run(peers.read) == plan
            again = Peers(node.thread)
            assert await apply(node, again, plan, resync=True) == 0
            assert [len(words) for words in state(node)] == [count] * 3
            assert await apply(node, again, plan_peers(many[:1])) == 3 * (count - 1)
            assert await node.thread.run(again.read) == plan_peers(many[:1])

    play(story)


def crowd(number: int) -> NodeRecord:
    """One of many nodes, at an address of 198.18.0.0/15, with a block of 10.0.0.0/9."""
    cidr = ipaddress.ip_network((0x0A000000 + (number << 8), 24))
    name = f"node-{number}"
    one = Block(cidr=cidr, pool="default", node=name, node_id="i", generation=1)
    return plan_record(name, "i", 1, (ipaddress.ip_address(0xC6120000 + number),), [one], "0.1")


# --- both families, and without VXLAN -----------------------------------------------------------------------------


DUAL = ClusterConfig(pools=(*CONFIG.pools, Pool(cidr=ipaddress.ip_network("fd00::/48"))))


def dual_block(number: int, version: int) -> Block:
    cidr = ipaddress.ip_network(f"10.244.{number}.0/24" if version == 4 else f"fd00:0:0:{number}::/64")
    return msgspec.structs.replace(block(number), cidr=cidr)


def dual_record(number: int, underlay: int, versions: Sequence[int]) -> NodeRecord:
    """node-<number>, with blocks of the families `versions`, over an underlay of one family."""
    address = ipaddress.ip_address(f"192.0.2.{number}" if underlay == 4 else f"2001:db8::{number}")
    return plan_record(f"node-{number}", "i", 1, (address,), [dual_block(number, each) for each in versions], "0.1")


async def dual_devices(node: Node, number: int, underlay: int, versions: Sequence[int]) -> None:
    mine = dual_record(number, underlay, versions)
    plan = plan_node(DUAL, mine, [dual_block(number, each) for each in versions], 1500)
    devices = Devices(node.thread)
    await node.thread.run(devices.ensure_bridge, plan.bridge)
    await node.thread.run(devices.ensure_vxlan, plan.vxlan)


def join_underlay(one: Node, two: Node) -> None:
    """A wire between two nodes, under0 at each end, with addresses of both families."""
    one.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", two.name)
    for number, node in enumerate((one, two), 1):
        node.ip("addr", "add", f"192.0.2.{number}/24", "dev", "under0")
        node.ip("addr", "add", f"2001:db8::{number}/64", "dev", "under0", "nodad")
        node.ip("link", "set", "under0", "up")


FAMILIES = {
    "IPv4 over IPv4": (4, (4,)),
    "IPv6 over IPv4": (4, (6,)),
    "IPv4 over IPv6": (6, (4,)),
    "both over IPv4": (4, (4, 6)),
    "both over IPv6": (6, (4, 6)),
}


@pytest.mark.parametrize(("underlay", "versions"), FAMILIES.values(), ids=FAMILIES.keys())
def test_two_nodes_of_any_family_reach_each_other(underlay: int, versions: Sequence[int]) -> None:
    async def story() -> None:
        async with Node("n1") as one, Node("n2") as two:
            join_underlay(one, two)
            for number, node in enumerate((one, two), 1):
                await dual_devices(node, number, underlay, versions)
                peers, plan = Peers(node.thread), plan_peers([dual_record(3 - number, underlay, versions)])
                assert await apply(node, peers, plan, resync=True) == 1 + 2 * len(versions)
                assert await node.thread.run(peers.read) == plan
                assert await apply(node, Peers(node.thread), plan, resync=True) == 0
            for version in versions:
                gateway = str(Layout.of(dual_block(2, version).cidr).gateway)
                await eventually(partial(one.pings, gateway, 1))
            await apply(one, peers := Peers(one.thread), plan_peers([]), resync=True)
            assert await one.thread.run(peers.read) == plan_peers([])

    play(story)


ON_LINK = {ipaddress.ip_network("192.0.2.0/24"): "under0", ipaddress.ip_network("2001:db8::/64"): "under0"}


def dual_at(number: int) -> NodeRecord:
    """node-<number> with both families, on the underlay, too."""
    addresses = (ipaddress.ip_address(f"192.0.2.{number}"), ipaddress.ip_address(f"2001:db8::{number}"))
    return msgspec.structs.replace(dual_record(number, 4, (4, 6)), addresses=addresses)


def routes_by(node: Node, device: str) -> set[str]:
    """Our routes over a device: block → gateway."""
    found = [each for v in "46" for each in node.json(f"-{v}", "route", "show", "dev", device, "proto", "80")]
    return {f"{each['dst']} via {each['gateway']}" for each in found}


def test_a_backend_is_changed_and_back() -> None:
    """One replacement a route, so that no block is without one in between."""
    over, direct = plan_peers([dual_at(2)]), plan_peers([dual_at(2)], BackendType.DIRECT, ON_LINK)
    plain = {"10.244.2.0/24 via 192.0.2.2", "fd00:0:0:2::/64 via 2001:db8::2"}
    tunnelled = {"10.244.2.0/24 via 10.244.2.2", "fd00:0:0:2::/64 via fd00:0:0:2::2"}

    async def story() -> None:
        async with Node("n1") as one, Node("n2") as two:
            join_underlay(one, two)
            await dual_devices(one, 1, 4, (4, 6))
            peers = Peers(one.thread, pools=[pool.cidr for pool in DUAL.pools])
            for _ in range(2):
                await apply(one, peers, over, resync=True)
                assert (routes_by(one, "pw-vxlan"), routes_by(one, "under0")) == (tunnelled, set())
                assert await apply(one, peers, direct) == 5, "two routes, and the entries that they no longer need"
                assert (routes_by(one, "pw-vxlan"), routes_by(one, "under0")) == (set(), plain)
                assert await one.thread.run(peers.read) == direct
                assert await apply(one, peers, direct, resync=True) == 0
            await apply(one, Peers(one.thread, pools=[pool.cidr for pool in DUAL.pools]), plan_peers([]), resync=True)
            assert routes_by(one, "under0") == set(), "another daemon knows them for ours"

    play(story)


FOREIGN = {
    "of another protocol, in a pool": "route add 10.244.77.0/24 via 192.0.2.50 dev under0 proto static",
    "of our protocol, in no pool": "route add 198.51.100.0/24 via 192.0.2.50 dev under0 proto 80",
    "of our protocol, wider than a pool": "route add 10.0.0.0/8 via 192.0.2.50 dev under0 proto 80",
    "of our protocol, in another table": "route add 10.244.77.0/24 via 192.0.2.50 dev under0 proto 80 table 77",
    "with a metric": "route add 10.244.2.0/24 via 192.0.2.50 dev under0 proto 80 metric 50",
    "a neighbour that is not permanent": "neigh add 10.244.77.2 lladdr 02:00:00:00:00:01 dev pw-vxlan nud reachable",
    "a neighbour of another device": "neigh add 10.244.2.2 lladdr 02:00:00:00:00:01 dev under0 nud permanent",
}


@pytest.mark.parametrize("command", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_foreign_stays(command: str) -> None:
    async def story() -> None:
        async with node_1() as (node, _):
            node.ip(*command.split())
            before = foreign(node)
            for plan in (plan_peers([record(2)]), plan_peers([])):
                await apply(node, Peers(node.thread, pools=[pool.cidr for pool in CONFIG.pools]), plan, resync=True)
            assert foreign(node) == before

    def foreign(node: Node) -> list[str]:
        shown = node.ip("route", "show", "table", "all"), node.ip("neigh", "show", "nud", "all")
        lines = [line for text in shown for line in text.splitlines() if "02:00:00:00:00:01" in line or ".50 " in line]
        assert lines, "the foreign entry is there"
        return [" ".join(line.split()[:5]) for line in lines]  # without what the kernel changes by itself

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
