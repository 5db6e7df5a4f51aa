"""The firewall in the kernel: nft takes the text, lists it back the same, and packets do what the rules say."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.firewall import Firewall
from ipam_daemon.plan import FirewallPlan
from ipam_daemon.ruleset import desired
from tests.netns.node_fixtures import Engine, Netns, Node, engine, play, pods

PLAN = FirewallPlan(
    local_blocks=frozenset({ipaddress.ip_network("10.244.1.0/28")}),
    unmasqueraded=frozenset(map(ipaddress.ip_network, ("10.244.0.0/16", "224.0.0.0/4", "ff00::/8"))),
    vteps=frozenset(map(ipaddress.ip_address, ("192.0.2.2", "2001:db8::2"))),
    vxlan_port=4789,
)


def firewall_of(node: Netns) -> Firewall:
    return Firewall(("ip", "netns", "exec", node.name, "nft"))


DAMAGE = {
    "the whole ruleset flushed": "flush ruleset",
    "a chain flushed": "flush chain inet podwire postrouting",
    "an element deleted": "delete element inet podwire vteps4 { 192.0.2.2 }",
    "an element of somebody else": "add element inet podwire vteps4 { 198.51.100.1 }",
    "a range of somebody else": "add element inet podwire local_blocks4 { 10.9.0.1-10.9.0.5 }",
    "a set flushed": "flush set inet podwire unmasqueraded4",
    "a rule of somebody else": "add rule inet podwire vxlan_in accept",
    "the jump to the guard deleted": "flush chain inet podwire vxlan_in",
    "what pods are judged by deleted": "flush chain inet podwire vxlan_out",
}


def test_what_nft_lists_is_what_was_asked_for() -> None:
    async def story() -> None:
        async with Node() as node:
            firewall = firewall_of(node)
            assert await firewall.ensure(PLAN)
            assert await firewall.read() == desired(PLAN)
            assert not await firewall.ensure(PLAN)

    play(story)


def test_what_somebody_damaged_is_repaired() -> None:
    async def story() -> None:
        async with Node() as node:
            firewall = firewall_of(node)
            await firewall.ensure(PLAN)
            for name, script in DAMAGE.items():
                node.run("nft", "-f", "-", stdin=script)
                assert await firewall.ensure(PLAN), name
                assert await firewall.read() == desired(PLAN), name

    play(story)


def test_adjacent_blocks_stay_apart() -> None:
    """A set of intervals might merge neighbours, and a restart would then see elements that it did not make."""

    async def story() -> None:
        async with Node() as node:
            firewall = firewall_of(node)
            blocks = frozenset(ipaddress.ip_network("10.244.0.0/22").subnets(new_prefix=24))
            plan = msgspec.structs.replace(PLAN, local_blocks=blocks)
            await firewall.ensure(plan)
            assert not await firewall.ensure(plan)
            assert await firewall.ensure(PLAN)
            assert await firewall.read() == desired(PLAN)

    play(story)


def test_other_tables_are_not_touched() -> None:
    async def story() -> None:
        async with Node() as node:
            node.run(
                "nft",
                "-f",
                "-",
                stdin="table inet foreign { chain podwire { counter; }; set vteps4 { type ipv4_addr; }; }",
            )
            before = node.run("nft", "list", "table", "inet", "foreign")
            firewall = firewall_of(node)
            await firewall.ensure(PLAN)
            await firewall.ensure(msgspec.structs.replace(PLAN, vxlan_port=8472))
            assert node.run("nft", "list", "table", "inet", "foreign") == before

    play(story)


def test_a_new_version_of_the_rules_keeps_the_elements_of_peers_not_known_yet() -> None:
    async def story() -> None:
        async with Node() as node:
            firewall = firewall_of(node)
            await firewall.ensure(PLAN)
            await firewall.ensure(msgspec.structs.replace(PLAN, vxlan_port=8472, vteps=None))
            assert (await firewall.read()).elements["vteps4"] == {"192.0.2.2"}

    play(story)


BEFORE_INPUT = """
add table inet podwire
add set inet podwire vteps4 { type ipv4_addr; }
add element inet podwire vteps4 { 192.0.2.2 }
add chain inet podwire vxlan
add chain inet podwire vxlan_guard { type filter hook prerouting priority raw; policy accept; }
add chain inet podwire shape
add rule inet podwire shape counter comment "another"
add rule inet podwire vxlan ip saddr @vteps4 return
add rule inet podwire vxlan_guard udp dport 4789 jump vxlan
"""


def test_a_guard_of_a_version_before_is_gone_and_its_elements_stay() -> None:
    async def story() -> None:
        async with Node() as node:
            node.run("nft", "-f", "-", stdin=BEFORE_INPUT)
            assert await firewall_of(node).ensure(msgspec.structs.replace(PLAN, vteps=None))
            listed = node.run("nft", "list", "table", "inet", "podwire")
            assert "vxlan_guard" not in listed
            assert "192.0.2.2" in listed

    play(story)


FAILING = {
    "nft is not installed": ("/absent/nft",),
    "nft says no": ("false",),
}


@pytest.mark.parametrize("nft", FAILING.values(), ids=FAILING.keys())
def test_an_nft_that_does_not_work_is_an_error_that_is_tried_again(nft: tuple[str, ...]) -> None:
    async def story() -> None:
        with pytest.raises(PlumbingFailed, match=nft[0]):
            await Firewall(nft).ensure(PLAN)

    play(story)


# --- packets ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[tuple[Engine, Netns, Netns]]:
    """A node (192.0.2.1) with one pod (10.244.1.3) and, on its underlay, another machine (192.0.2.2)."""
    async with engine(folder) as it:
        with pods(1) as (pod,), Netns("outside") as outside:
            it.node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", outside.name)
            for machine, address in ((it.node, "192.0.2.1/24"), (outside, "192.0.2.2/24")):
                machine.ip("addr", "add", address, "dev", "under0")
                machine.ip("link", "set", "under0", "up")
                machine.ip("link", "set", "lo", "up")
            await it.add("a", pod.path)
            yield it, pod, outside


def drops(node: Netns) -> int:
    """Packets of VXLAN that were dropped: of pods, which have a counter with a name, and of strangers."""
    listed = json.loads(node.run("nft", "-j", "list", "table", "inet", "podwire"))["nftables"]
    rules = [each["rule"]["expr"] for each in listed if each.get("rule", {}).get("chain") == "vxlan"]
    counted = [each["counter"] for rule in rules for each in rule if isinstance(each.get("counter"), dict)]
    counted += [each["counter"] for each in listed if "counter" in each]
    return sum(each["packets"] for each in counted)


SEND = """import socket, sys
one = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
one.sendto(b"x", (sys.argv[1], 4789))
"""


def send_vxlan(source: Netns, address: str) -> None:
    source.run("python3", "-c", SEND, address)


def test_leaving_the_cluster_is_masqueraded_and_pod_to_pod_is_not(tmp_path: Path) -> None:
    """The other machine has no route back to the pod: without masquerade it could not answer."""

    async def story() -> None:
        async with cluster(tmp_path) as (it, pod, outside):
            assert not pod.pings("192.0.2.2", 1), "without the table there is no masquerade"
            await firewall_of(it.node).ensure(PLAN)
            assert pod.pings("192.0.2.2")
            outside.ip("addr", "add", "10.244.9.1/32", "dev", "lo")
            it.node.ip("route", "add", "10.244.9.1/32", "via", "192.0.2.2")
            assert not pod.pings("10.244.9.1", 1), "an address of the pool sees the pod's own, and knows no way back"
            outside.ip("route", "add", "10.244.1.0/28", "via", "192.0.2.1")
            assert pod.pings("10.244.9.1")

    play(story)


def test_vxlan_is_taken_from_known_nodes_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster(tmp_path) as (it, pod, outside):
            firewall = firewall_of(it.node)
            await firewall.ensure(PLAN)
            send_vxlan(outside, "192.0.2.1")
            assert drops(it.node) == 0, "192.0.2.2 is a known node"
            await firewall.ensure(msgspec.structs.replace(PLAN, vteps=frozenset()))
            send_vxlan(outside, "192.0.2.1")
            await counted(it.node, 1)
            await firewall.ensure(PLAN)
            send_vxlan(pod, "192.0.2.2")
            await counted(it.node, 2)
            send_vxlan(pod, "192.0.2.1")
            await counted(it.node, 3)
            send_vxlan(pod, "10.244.1.1")
            await counted(it.node, 4)

    play(story)


def test_a_pod_s_vxlan_to_its_node_is_dropped_however_it_comes_there(tmp_path: Path) -> None:
    """By way of a Service, to everybody on the bridge, and where somebody else has taken tracking away."""

    async def story() -> None:
        async with cluster(tmp_path) as (it, pod, _outside):
            services = """table ip services { chain in {
                type nat hook prerouting priority dstnat;
                ip daddr 10.96.0.9 udp dport 53 dnat to 192.0.2.1:4789;
                ip daddr 10.96.0.9 udp dport 54 dnat to 10.244.1.1:4789;
            }; }"""
            it.node.run("nft", "-f", "-", stdin=services)
            await firewall_of(it.node).ensure(PLAN)
            for number, port in enumerate(("53", "54"), 1):
                pod.run("python3", "-c", SEND.replace("4789", port), "10.96.0.9")
                await counted(it.node, number)
            send_vxlan(pod, "255.255.255.255")
            await counted(it.node, 3)
            nothing = "table inet theirs { chain in { type filter hook prerouting priority -350; notrack; }; }"
            it.node.run("nft", "-f", "-", stdin=nothing)
            send_vxlan(pod, "192.0.2.1")
            await counted(it.node, 4)

    play(story)


def test_vxlan_to_a_node_by_way_of_a_service_is_dropped_whoever_translates_it_first(tmp_path: Path) -> None:
    """Of several nat chains the first that translates a connection is the last that sees it."""

    async def story() -> None:
        async with cluster(tmp_path) as (it, pod, _outside):
            services = """table ip services {
                chain in {
                    type nat hook prerouting priority dstnat;
                    ip daddr 10.96.0.9 udp dport 53 dnat to 192.0.2.2:4789;
                }
                chain out { type nat hook postrouting priority srcnat - 5; masquerade; }
            }"""
            it.node.run("nft", "-f", "-", stdin=services)
            await firewall_of(it.node).ensure(PLAN)
            pod.run("python3", "-c", SEND.replace("4789", "53"), "10.96.0.9")
            await counted(it.node, 1)

    play(story)


async def counted(node: Netns, packets: int) -> None:
    """Waits until so many packets were dropped, and is sure that no more were."""
    for _ in range(2000):
        if drops(node) >= packets:
            break
        await asyncio.sleep(0.01)
    assert drops(node) == packets
