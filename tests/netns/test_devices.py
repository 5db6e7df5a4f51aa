"""Bridge and VXLAN device: brought to their plan, mended when somebody changed them, left alone when they are right."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.devices import Devices
from ipam_daemon.errors import PlumbingFailed, TryAgainLater
from ipam_daemon.plan import BridgePlan, VxlanPlan
from ipam_daemon.underlay import default_addresses, find_underlay
from tests.netns.node_fixtures import Node, bridge_plan, engine, play, pods

BRIDGE = bridge_plan(ipaddress.ip_network("10.244.1.0/24"))
VXLAN = VxlanPlan(
    name="pw-vxlan",
    vni=7,
    port=4789,
    local=ipaddress.ip_address("192.0.2.1"),
    mac="0a:58:0a:f4:01:02",
    mtu=1450,
    addresses=(ipaddress.ip_interface("10.244.1.2/32"),),
)
POOLS = (ipaddress.ip_network("10.244.0.0/16"), ipaddress.ip_network("fd00:10:244::/48"))
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/pw0/send_redirects": "0",
}


def words(line: str) -> list[str]:
    return line.split()


async def bridge(node: Node, plan: BridgePlan = BRIDGE) -> list[str]:
    return await node.thread.run(Devices(node.thread).ensure_bridge, plan)


async def vxlan(node: Node, plan: VxlanPlan = VXLAN) -> list[str]:
    return await node.thread.run(Devices(node.thread).ensure_vxlan, plan)


async def sysctl(node: Node, name: str) -> str:
    return (await node.thread.run(Path(f"/proc/sys/{name}").read_text)).strip()


def test_a_bridge_as_planned() -> None:
    async def story() -> None:
        async with Node() as node:
            assert await bridge(node)
            (link,) = node.json("addr", "show", "dev", "pw0")
            assert (link["address"], link["mtu"], link["linkinfo"]["info_kind"]) == (BRIDGE.mac, 1450, "bridge")
            assert "UP" in link["flags"]
            assert [(each["local"], each["prefixlen"]) for each in link["addr_info"] if each["family"] == "inet"] == [
                ("10.244.1.1", 24)
            ]
            data = link["linkinfo"]["info_data"]
            assert (data["nf_call_iptables"], data["nf_call_ip6tables"]) == (1, 1)
            for name, value in SYSCTLS.items():
                assert await sysctl(node, name) == value, name
            assert await bridge(node) == [], "a restart changes nothing"

    play(story)


def test_same_node_traffic_crosses_the_firewall_by_the_bridges_own_switch(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            assert await sysctl(it.node, "net/bridge/bridge-nf-call-iptables") == "0"
            with pods(2) as (a, b):
                await it.add("a", a.path)
                await it.add("b", b.path)
                assert a.pings("10.244.1.4")
                it.node.run(
                    "nft",
                    "-f",
                    "-",
                    stdin="table ip t { chain f { type filter hook forward priority 0; policy drop; }; }",
                )
                assert not a.pings("10.244.1.4", 1), "the node's firewall says no"
                it.node.ip("link", "set", "pw0", "type", "bridge", "nf_call_iptables", "0")
                assert a.pings("10.244.1.4"), "without the switch the firewall is not asked"
                assert await bridge(it.node, bridge_plan(it.cidr)) == ["set nf_call_iptables of pw0"]
                assert not a.pings("10.244.1.4", 1)

    play(story)


CHANGES = {
    "down": (["link set pw0 down"], ["set state of pw0"]),
    "another MTU": (["link set pw0 mtu 1500"], ["set mtu of pw0"]),
    "another MAC": (["link set pw0 address 02:00:00:00:00:01"], ["set address of pw0"]),
    "without its address": (["addr flush dev pw0"], ["added 10.244.1.1/24 to pw0"]),
    "its address with another prefix length": (
        ["addr flush dev pw0", "addr add 10.244.1.1/16 dev pw0"],
        ["added 10.244.1.1/24 to pw0"],
    ),
    "gone": (["link del pw0"], ["made bridge pw0", "set state of pw0", "added 10.244.1.1/24 to pw0"]),
    "not asking for the firewall": (
        ["link set pw0 type bridge nf_call_ip6tables 0"],
        ["set nf_call_iptables of pw0"],
    ),
}


@pytest.mark.parametrize(("commands", "done"), CHANGES.values(), ids=CHANGES.keys())
def test_a_bridge_that_somebody_changed_is_mended(commands: list[str], done: list[str]) -> None:
    async def story() -> None:
        async with Node() as node:
            await bridge(node)
            for line in commands:
                node.ip(*words(line))
            assert await bridge(node) == done
            assert await bridge(node) == []

    play(story)


BOTH = msgspec.structs.replace(
    BRIDGE, addresses=(*BRIDGE.addresses, ipaddress.ip_interface("fd00:10:244:1::1/64")), pools=POOLS
)
SIX_ROUTE = "fd00:10:244:1::/64 dev pw0 proto kernel metric 256 pref medium"
FOUR_ROUTE = "10.244.1.0/24 dev pw0 proto kernel scope link src 10.244.1.1"
ROUTES = {  # what somebody does → what is put back, and what there is beside the two of ours afterwards
    "the one of IPv4 deleted": (["route del 10.244.1.0/24 dev pw0"], "4", set()),
    "the one of IPv6 deleted": (["route del fd00:10:244:1::/64 dev pw0"], "6", set()),
    "both deleted": (["-4 route flush dev pw0 proto kernel", "-6 route del fd00:10:244:1::/64 dev pw0"], "46", set()),
    "another in the place of IPv4's": (
        ["route replace 10.244.1.0/24 via 192.0.2.9"],
        "4",
        {"10.244.1.0/24 via 192.0.2.9 dev under0"},
    ),
    "another in the place of IPv6's": (
        ["route replace fd00:10:244:1::/64 via 2001:db8::9 metric 256"],
        "6",
        set(),
    ),
    "one by hand over the same bridge": (
        ["route replace 10.244.1.0/24 dev pw0"],
        "4",
        {"10.244.1.0/24 dev pw0 scope link"},
    ),
    "one of another metric that only looks like the kernel's": (
        ["route del fd00:10:244:1::/64 dev pw0", "route add fd00:10:244:1::/64 dev pw0 proto kernel metric 1024"],
        "6",
        {"fd00:10:244:1::/64 dev pw0 proto kernel metric 1024 pref medium"},
    ),
    "others of another metric": (
        ["route add 10.244.1.0/24 via 192.0.2.9 metric 7", "route add fd00:10:244:1::/64 via 2001:db8::9 metric 1024"],
        "",
        {
            "10.244.1.0/24 via 192.0.2.9 dev under0 metric 7",
            "fd00:10:244:1::/64 via 2001:db8::9 dev under0 metric 1024 pref medium",
        },
    ),
}


@pytest.mark.parametrize(("commands", "back", "others"), ROUTES.values(), ids=ROUTES.keys())
def test_the_routes_to_the_nodes_own_pods_are_put_back(commands: list[str], back: str, others: set[str]) -> None:
    def routes(node: Node) -> set[str]:
        lines = [line for family in ("-4", "-6") for line in node.ip(family, "route").splitlines()]
        return {
            " ".join(line.replace("linkdown", "").split()) for line in lines if "10:244:1::" in line or ".244." in line
        }

    done = {
        "4": "put back the route to 10.244.1.0/24 on pw0",
        "6": "put back the route to fd00:10:244:1::/64 on pw0",
    }

    async def story() -> None:
        async with Node() as node:
            for line in (
                "link add under0 type veth peer name under1",
                "link set under0 up",
                "link set under1 up",
                "addr add 192.0.2.1/24 dev under0",
                "addr add 2001:db8::1/64 dev under0 nodad",
            ):
                node.ip(*words(line))
            assert not any("route" in each for each in await bridge(node, BOTH)), "the kernel makes them by itself"
            assert routes(node) == {FOUR_ROUTE, SIX_ROUTE}
            for line in commands:
                node.ip(*words(line))
            assert await bridge(node, BOTH) == [done[each] for each in back]
            assert routes(node) == {FOUR_ROUTE, SIX_ROUTE} | others
            for address in ("10.244.1.7", "fd00:10:244:1::7"):
                assert node.json("route", "get", address)[0]["dev"] == "pw0"
            assert await bridge(node, BOTH) == []
            node.ip("addr", "add", "198.51.100.1/24", "dev", "pw0")  # with its last address the bridge loses all routes
            for interface in BOTH.addresses:
                node.ip("addr", "del", str(interface), "dev", "pw0")
            assert routes(node) == others, "they go with their addresses, as the kernel's own"

    play(story)


def test_a_vxlan_device_as_planned() -> None:
    async def story() -> None:
        async with Node() as node:
            assert await vxlan(node)
            (link,) = node.json("addr", "show", "dev", "pw-vxlan")
            assert (link["address"], link["mtu"]) == (VXLAN.mac, 1450)
            data = link["linkinfo"]["info_data"]
            assert (data["id"], data["port"], data["local"], data["learning"]) == (7, 4789, "192.0.2.1", False)
            assert [(each["local"], each["prefixlen"]) for each in link["addr_info"] if each["family"] == "inet"] == [
                ("10.244.1.2", 32)
            ]
            assert await vxlan(node) == [], "a restart changes nothing"

    play(story)


SHAPES = {
    "another VNI": {"vni": 8},
    "another port": {"port": 8472},
    "another underlay address": {"local": ipaddress.ip_address("192.0.2.9")},
    "an underlay of IPv6": {"local": ipaddress.ip_address("2001:db8::1")},
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES.keys())
def test_a_vxlan_device_of_another_shape_is_made_anew(change: dict[str, object]) -> None:
    async def story() -> None:
        async with Node() as node:
            await vxlan(node)
            plan = msgspec.structs.replace(VXLAN, **change)
            assert (await vxlan(node, plan))[:2] == ["removed pw-vxlan, which had another shape", "made pw-vxlan"]
            assert await vxlan(node, plan) == []

    play(story)


def test_another_mtu_is_set_in_place() -> None:
    async def story() -> None:
        async with Node() as node:
            await vxlan(node)
            assert await vxlan(node, msgspec.structs.replace(VXLAN, mtu=1400)) == ["set mtu of pw-vxlan"]

    play(story)


def test_a_node_whose_first_block_is_another_has_one_vtep_a_family() -> None:
    def at(number: int) -> VxlanPlan:
        vteps = tuple(
            ipaddress.ip_interface(text) for text in (f"10.244.{number}.2/32", f"fd00:10:244:{number}::2/128")
        )
        return msgspec.structs.replace(VXLAN, addresses=vteps, pools=POOLS)

    def addresses(node: Node) -> set[str]:
        (link,) = node.json("addr", "show", "dev", "pw-vxlan")
        return {each["local"] for each in link["addr_info"]}

    async def story() -> None:
        async with Node() as node:
            await vxlan(node, at(1))
            node.ip("addr", "add", "203.0.113.9/32", "dev", "pw-vxlan")
            others = addresses(node) - {"10.244.1.2", "fd00:10:244:1::2"}
            assert any(each.startswith("fe80::") for each in others)
            assert await vxlan(node, at(9)) == [
                "added 10.244.9.2/32 to pw-vxlan",
                "added fd00:10:244:9::2/128 to pw-vxlan",
                "removed 10.244.1.2/32 from pw-vxlan",
                "removed fd00:10:244:1::2/128 from pw-vxlan",
            ]
            assert addresses(node) == {"10.244.9.2", "fd00:10:244:9::2"} | others, "of no pool: somebody else's"
            assert await vxlan(node, at(9)) == []
            node.ip("addr", "del", "203.0.113.9/32", "dev", "pw-vxlan")
            for gateway, source in (("10.244.1.2", "10.244.9.2"), ("fd00:10:244:1::2", "fd00:10:244:9::2")):
                node.ip("route", "add", f"{gateway}0", "via", gateway, "dev", "pw-vxlan", "onlink")
                assert node.json("route", "get", f"{gateway}0")[0]["prefsrc"] == source, "of what the node sends"

    play(story)


def test_a_device_of_our_name_and_another_kind_is_refused() -> None:
    async def story() -> None:
        async with Node() as node:
            node.ip("link", "add", "pw0", "type", "veth", "peer", "name", "pw-vxlan")
            with pytest.raises(PlumbingFailed, match="pw0 exists and is a veth, expected a bridge; it is not ours"):
                await bridge(node)
            with pytest.raises(PlumbingFailed, match="pw-vxlan exists and is a veth, expected a vxlan"):
                await vxlan(node)
            assert node.links() == {"pw0", "pw-vxlan"}

    play(story)


OTHERS = {  # somebody's VXLAN device, and the plan that it is in the way of
    "VNI and port": ("id 7 dstport 4789 local 192.0.2.7", {}),
    "of IPv6": ("id 7 dstport 4789 local 2001:db8::7", {"local": ipaddress.ip_address("2001:db8::1")}),
}


@pytest.mark.parametrize(("other", "change"), OTHERS.values(), ids=OTHERS.keys())
def test_who_has_a_vni_and_its_port_is_named(other: str, change: dict[str, object]) -> None:
    async def story() -> None:
        async with Node() as node:
            node.ip(*words(f"link add early type vxlan id 8 {other[5:]}"))
            node.ip(*words(f"link add other type vxlan {other}"))
            with pytest.raises(PlumbingFailed, match=r"VNI 7, UDP port 4789.*EEXIST: other has these"):
                await vxlan(node, msgspec.structs.replace(VXLAN, **change))
            assert node.links() == {"early", "other"}

    play(story)


def test_one_vni_over_both_families_is_two() -> None:
    async def story() -> None:
        async with Node() as node:
            node.ip(*words("link add other type vxlan id 7 dstport 4789 local 2001:db8::7"))
            assert "made pw-vxlan" in await vxlan(node)

    play(story)


def shown(node: Node) -> tuple[object, ...]:
    """The VXLAN device as it is, with what leads over it."""
    (link,) = node.json("addr", "show", "dev", "pw-vxlan")
    data = {key: link["linkinfo"]["info_data"][key] for key in ("id", "port", "local")}
    return (link["ifindex"], link["flags"], link["addr_info"], data, node.ip("route", "show", "dev", "pw-vxlan"))


TAKEN = {  # another shape, who is in its way, and what the refusal says
    "another VNI": ({"vni": 8}, "id 8 dstport 4789", "VNI 8, UDP port 4789.*EEXIST: other has these"),
    "another port": ({"port": 8472}, "id 7 dstport 8472", "VNI 7, UDP port 8472.*EEXIST: other has these"),
    "another port, which a program has": ({"port": 8472}, "", "VNI 7, UDP port 8472.*EADDRINUSE"),
    "another family": (
        {"local": ipaddress.ip_address("2001:db8::1")},
        "id 7 dstport 4789 local 2001:db8::7",
        "VNI 7, UDP port 4789.*EEXIST: other has these",
    ),
}


@pytest.mark.parametrize(("change", "other", "refusal"), TAKEN.values(), ids=TAKEN.keys())
def test_a_shape_that_cannot_be_had_leaves_the_one_that_there_is(
    change: dict[str, object], other: str, refusal: str
) -> None:
    async def story() -> None:
        async with Node() as node:
            await vxlan(node)
            node.ip(*words("route add 10.244.2.0/24 via 10.244.2.2 dev pw-vxlan onlink"))
            before = shown(node)
            with ExitStack() as held:
                if other:
                    node.ip(*words(f"link add other type vxlan {other}"))
                else:
                    program = await node.thread.run(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
                    held.enter_context(program)
                    program.bind(("", 8472))
                plan = msgspec.structs.replace(VXLAN, **change)
                for _ in range(2):
                    with pytest.raises(PlumbingFailed, match=refusal):
                        await vxlan(node, plan)
                    assert shown(node) == before
                    assert node.links() - {"other"} == {"pw-vxlan"}
            if other:
                node.ip("link", "del", "other")
            assert (await vxlan(node, plan))[:2] == ["removed pw-vxlan, which had another shape", "made pw-vxlan"]
            assert node.links() == {"pw-vxlan"}
            assert await vxlan(node, plan) == []

    play(story)


def test_what_a_killed_daemon_left_while_it_replaced_the_device_goes() -> None:
    async def story() -> None:
        async with Node() as node:
            node.ip(*words("link add pw-vxlan-new type vxlan id 7 dstport 4789 local 192.0.2.1"))
            done = await vxlan(node)
            assert done[:2] == ["removed pw-vxlan-new, which was left over", "made pw-vxlan"]
            assert node.links() == {"pw-vxlan"}

    play(story)


def test_the_underlay() -> None:
    async def story() -> None:
        async with Node() as node:
            assert await node.thread.run(default_addresses, node.thread) == ()
            node.ip("link", "add", "under0", "mtu", "1400", "type", "veth", "peer", "name", "under1")
            for line in ("link set under0 up", "link set under1 up", "addr add 192.0.2.1/24 dev under0"):
                node.ip(*words(line))
            assert await node.thread.run(default_addresses, node.thread) == ()
            node.ip("route", "add", "default", "via", "192.0.2.254")
            (address,) = await node.thread.run(default_addresses, node.thread)
            assert str(address) == "192.0.2.1"
            found = await node.thread.run(find_underlay, node.thread, (address,))
            assert (found.mtu, list(found.devices.values())) == (1400, ["under0"])
            assert found.on_link == {ipaddress.ip_network("192.0.2.0/24"): "under0"}
            with pytest.raises(TryAgainLater, match=r"no interface of this node has the node address 192\.0\.2\.7"):
                await node.thread.run(find_underlay, node.thread, (ipaddress.ip_address("192.0.2.7"),))

    play(story)


def test_the_source_of_the_default_route_goes_before_the_first_address() -> None:
    async def story() -> None:
        async with Node() as node:
            for line in (
                "link add under0 type veth peer name under1",
                "link set under0 up",
                "addr add 192.0.2.1/24 dev under0",
                "addr add 192.0.2.5/24 dev under0",
                "route add default via 192.0.2.254 src 192.0.2.5",
            ):
                node.ip(*words(line))
            assert [str(a) for a in await node.thread.run(default_addresses, node.thread)] == ["192.0.2.5"]

    play(story)
