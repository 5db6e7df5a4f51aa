"""What the node stands on: found, watched, and prepared for what the node is going to do with it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipam_daemon import faults
from ipam_daemon.dataplane import DataPlane
from ipam_daemon.devices import Devices
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.model import Pool
from ipam_daemon.settings import Settings
from ipam_daemon.underlay import Underlay, UnderlayWatch, default_addresses, find_underlay, look_at_addresses
from podwire.etcd.options import EtcdOptions
from tests.netns.node_fixtures import Node, bridge_plan, engine, key, play, pods

POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"))
NO_ETCD = EtcdOptions(endpoints=("http://127.0.0.1:1",))
SIX = bridge_plan(ipaddress.ip_network("fd00:10:244:1::/64"))


UNDERLAY = (
    "link add under0 type veth peer name under1",
    "link set under0 up",
    "link set under1 up",
    "addr add 192.0.2.1/24 dev under0",
    "addr add 2001:db8::1/64 dev under0 nodad",
)


@asynccontextmanager
async def node(*more: str) -> AsyncIterator[Node]:
    """A node with an underlay of both families on `under0`."""
    async with Node() as made:
        for words in (*UNDERLAY, *more):
            made.ip(*words.split())
        yield made


def text(addresses: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]) -> list[str]:
    return [str(address) for address in addresses]


FOUND = {
    "one of each family": (
        ["route add default via 192.0.2.254", "route add default via 2001:db8::fe"],
        ["192.0.2.1", "2001:db8::1"],
    ),
    "IPv6 alone": (["route add default via 2001:db8::fe"], ["2001:db8::1"]),
    "over a router's link-local address": (["route add default via fe80::1 dev under0"], ["2001:db8::1"]),
    "not one that is going": (
        [
            "addr change 2001:db8::1/64 dev under0 preferred_lft 0",
            "addr add 2001:db8::7/64 dev under0 nodad",
            "route add default via 2001:db8::fe",
        ],
        ["2001:db8::7"],
    ),
    "nothing without a default route": ([], []),
}


@pytest.mark.parametrize(("more", "found"), FOUND.values(), ids=FOUND.keys())
def test_the_addresses_that_a_node_finds(more: list[str], found: list[str]) -> None:
    async def story() -> None:
        async with node(*more) as it:
            assert text(await it.thread.run(default_addresses, it.thread)) == found

    play(story)


def test_two_that_look_at_once_find_each_address_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            for words in (*UNDERLAY, "route add default via 192.0.2.254", "route add default via 2001:db8::fe"):
                it.node.ip(*words.split())
            plane = DataPlane(
                settings=Settings(node="node-1", etcd=NO_ETCD, pools=(POOL,)),
                attachments=it.attachments,
                thread=it.node.thread,
                wires=it.wires,
                metrics=it.metrics,
                changed=asyncio.Event().set,
            )
            await asyncio.gather(plane.find_addresses(), plane.find_addresses())
            assert text(plane.addresses) == ["192.0.2.1", "2001:db8::1"]
            plane.close()

    play(story)


def test_networks_and_mtu_are_of_the_interfaces_with_the_nodes_addresses() -> None:
    async def story() -> None:
        async with node("link add other type veth peer name other1", "addr add 198.51.100.1/24 dev other") as it:
            both = (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1"))
            found = await it.thread.run(find_underlay, it.thread, both)
            assert {str(each) for each in found.on_link} == {"192.0.2.0/24", "2001:db8::/64"}
            assert (set(found.on_link.values()), found.mtu) == ({"under0"}, 1500)
            it.ip("link", "set", "other", "mtu", "1300")
            both = (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("198.51.100.1"))
            assert (await it.thread.run(find_underlay, it.thread, both)).mtu == 1300, "the smallest"

    play(story)


ON_LO = {  # more of the node → its MTU, and who is beside it
    "packets leave by the default route's interface": (
        ["link set under0 mtu 1400", "route add default via 192.0.2.254"],
        (1400, set()),
    ),
    "nobody knows by which": ([], (0, set())),
    "another interface has it, too": (
        ["link add other type veth peer name other1", "addr add 198.51.100.1/32 dev other", "link set other mtu 1300"],
        (1300, {"198.51.100.1/32"}),
    ),
    "and one that is up": (
        [
            "link add aside type veth peer name aside1",
            "addr add 198.51.100.1/32 dev aside",
            "link set aside mtu 1200",
            "addr add 198.51.100.1/32 dev under0",
        ],
        (1500, {"198.51.100.1/32"}),
    ),
    "several have it, the first does": (
        [
            "addr add 198.51.100.1/24 dev under0",
            "link add other type veth peer name other1",
            "link set other1 up",
            "link set other up mtu 1300",
            "addr add 198.51.100.1/32 dev other",
        ],
        (1500, {"198.51.100.0/24"}),
    ),
}


@pytest.mark.parametrize(("more", "found"), ON_LO.values(), ids=ON_LO.keys())
def test_a_node_address_on_lo(more: list[str], found: tuple[int, set[str]]) -> None:
    async def story() -> None:
        async with node("link set lo up", "addr add 198.51.100.1/32 dev lo", *more) as it:
            underlay = await it.thread.run(find_underlay, it.thread, (ipaddress.ip_address("198.51.100.1"),))
            assert (underlay.mtu, {str(each) for each in underlay.on_link}) == found
            if underlay.mtu:
                bridge = bridge_plan(ipaddress.ip_network("10.244.1.0/24"), underlay.mtu)
                assert await it.thread.run(Devices(it.thread).ensure_bridge, bridge)

    play(story)


def test_no_mtu_is_larger_than_a_packet() -> None:
    async def story() -> None:
        async with node("link set under0 mtu 65535", "link set lo up", "addr add 198.51.100.1/32 dev lo") as it:
            both = (ipaddress.ip_address("198.51.100.1"), ipaddress.ip_address("192.0.2.1"))
            assert (await it.thread.run(find_underlay, it.thread, both)).mtu == 65535

    play(story)


STANDING = {  # what is done before → whether the address is held, of a node that searches and of one that was told
    "there": ([], (True, True)),
    "gone": (["addr del 2001:db8::1/64 dev under0"], (False, False)),
    "deprecated": (["addr change 2001:db8::1/64 dev under0 preferred_lft 0"], (False, True)),
    "not yet unique": (
        ["addr del 2001:db8::1/64 dev under0", "link set under1 down", "addr add 2001:db8::1/64 dev under0"],
        (True, True),
    ),
}


@pytest.mark.parametrize(("more", "held"), STANDING.values(), ids=STANDING.keys())
def test_how_it_stands_with_an_address(more: list[str], held: tuple[bool, bool]) -> None:
    async def story() -> None:
        async with node(*more) as it:
            for searches, is_held in zip((True, False), held, strict=True):
                found = await it.thread.run(look_at_addresses, it.thread, searches)
                assert (ipaddress.ip_address("2001:db8::1") in found.held) == is_held

    play(story)


def test_word_comes_of_the_underlay_and_of_nothing_else() -> None:
    async def story() -> None:
        async with node() as it:
            told = asyncio.Event()
            watch = UnderlayWatch(it.thread, told.set)
            try:
                found: Underlay = await it.thread.run(find_underlay, it.thread, (ipaddress.ip_address("192.0.2.1"),))
                assert await watch.follow(found.devices)
                assert not await watch.follow(found.devices), "the same as before"
                for words in ("link add other type veth peer name other1", "link set other up", "link del other"):
                    it.ip(*words.split())
                it.ip("addr", "add", "198.51.100.1/24", "dev", "lo")
                await asyncio.sleep(0.1)
                assert not told.is_set(), "a pod that comes and goes wakes nobody"
                for words in ("link set under0 mtu 1400", "addr add 192.0.2.7/24 dev under0", "link set under0 down"):
                    it.ip(*words.split())
                    await asyncio.wait_for(told.wait(), 90)
                    await asyncio.sleep(0.1)
                    told.clear()
            finally:
                watch.close()

    play(story)


async def sysctl(it: Node, path: str, value: str = "") -> str:
    file = Path(f"/proc/sys/net/{path}")
    if value:
        await it.thread.run(file.write_text, value)
    return (await it.thread.run(file.read_text)).strip()


ACCEPT = {  # accept_ra and forwarding before → accept_ra afterwards
    "it listened": ("1", "0", "2"),
    "it did not": ("0", "0", "0"),
    "it would have gone on to": ("2", "0", "2"),
    "it forwarded, and so had stopped": ("1", "1", "1"),
}


@pytest.mark.parametrize(("accept", "forwarding", "then"), ACCEPT.values(), ids=ACCEPT.keys())
def test_a_node_that_begins_to_forward_still_hears_its_routers(accept: str, forwarding: str, then: str) -> None:
    async def story() -> None:
        async with node() as it:
            await sysctl(it, "ipv6/conf/all/forwarding", forwarding)
            await sysctl(it, "ipv6/conf/under0/accept_ra", accept)
            devices = Devices(it.thread)
            await it.thread.run(devices.prepare_underlay, ["under0"], {4, 6}, False)
            await it.thread.run(devices.ensure_bridge, SIX)
            assert await sysctl(it, "ipv6/conf/all/forwarding") == "1"
            assert await sysctl(it, "ipv6/conf/under0/accept_ra") == then
            assert await it.thread.run(devices.prepare_underlay, ["under0"], {4, 6}, False) == []

    play(story)


FILTERS = {  # of all and of the interface, whether packets come directly → of the interface afterwards
    "none": ("0", "0", True, "0"),
    "strict": ("0", "1", True, "2"),
    "strict everywhere": ("1", "0", True, "2"),
    "loose": ("2", "1", True, "2"),
    "strict, and VXLAN alone": ("1", "1", False, "1"),
}


@pytest.mark.parametrize(("everywhere", "here", "direct", "then"), FILTERS.values(), ids=FILTERS.keys())
def test_strict_reverse_path_filters_are_loosened_for_direct_packets(
    everywhere: str, here: str, direct: bool, then: str
) -> None:
    async def story() -> None:
        async with node() as it:
            await sysctl(it, "ipv4/conf/all/rp_filter", everywhere)
            await sysctl(it, "ipv4/conf/under0/rp_filter", here)
            await it.thread.run(Devices(it.thread).prepare_underlay, ["under0"], {4}, direct)
            assert await sysctl(it, "ipv4/conf/under0/rp_filter") == then
            assert await sysctl(it, "ipv4/conf/all/rp_filter") == everywhere

    play(story)


def test_a_bridge_of_ipv6_is_there_at_once_and_keeps_what_is_others() -> None:
    async def story() -> None:
        async with Node() as it:
            await sysctl(it, "ipv6/conf/default/disable_ipv6", "1")
            devices = Devices(it.thread)
            await it.thread.run(devices.ensure_bridge, SIX)
            (link,) = it.json("addr", "show", "dev", "pw0", "scope", "global")
            (address,) = link["addr_info"]
            assert (address["local"], address["prefixlen"]) == ("fd00:10:244:1::1", 64)
            assert not address.get("tentative")
            for name, value in (("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")):
                assert await sysctl(it, f"ipv6/conf/pw0/{name}") == value
            it.ip("addr", "add", "2001:db8:5::1/64", "dev", "pw0", "nodad")
            assert await it.thread.run(devices.ensure_bridge, SIX) == []
            assert "2001:db8:5::1" in json.dumps(it.json("addr", "show", "dev", "pw0")), "not of our pools"

    play(story)


def test_a_wire_gets_another_mtu_at_both_ends_unless_somebody_gave_it_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as (a, b, gone):
                results = [await it.add(name, place.path) for name, place in (("a", a), ("b", b), ("gone", gone))]
                b.ip("link", "set", "eth0", "mtu", "1300")
                gone.delete()
                for mtu in (1400, 1450):
                    await it.attachments.resize(mtu, only_shrink=True)
                    await it.attachments.resize(mtu)
                    assert a.json("link", "show", "eth0")[0]["mtu"] == mtu
                    assert b.json("link", "show", "eth0")[0]["mtu"] == 1300
                    for result in results[:2]:
                        name = result["interfaces"][0]["name"]
                        assert it.node.json("link", "show", name)[0]["mtu"] == mtu
                    assert {each.mtu for each in it.journal.attachments()} == {mtu}
                    assert it.attachments.mtu <= mtu
                row = it.journal.get(key("a"))
                assert row is not None
                assert row.mtu == 1450

    play(story)


class Killed(BaseException):
    """The daemon is no more."""


AFTERWARDS = {  # where it is killed, and what the next daemon brings the wires to
    "the former MTU, and it was done": ("mtu.resized", 1450),
    "a smaller one, and it was done": ("mtu.resized", 1300),
    "a larger one, and it was done": ("mtu.resized", 1500),
    "the former MTU, and one end had it": ("one end", 1450),
    "a smaller one, and one end had it": ("one end", 1300),
    "the same, and one end had it": ("one end", 1400),
}


@pytest.mark.parametrize("given", [1400, 1480], ids=["shrinking", "growing"])
@pytest.mark.parametrize(("place", "then"), AFTERWARDS.values(), ids=AFTERWARDS.keys())
def test_a_wire_that_was_being_resized_is_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, then: int, given: int
) -> None:
    """The daemon is killed when an end has another MTU and the journal has none of it; a pod that somebody gave another
    keeps it all the same."""

    def die(reached: object, *_: object) -> None:
        if reached == place or place == "one end":
            raise Killed

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                port = (await it.add("a", a.path))["interfaces"][0]["name"]
                await it.add("b", b.path)
                b.ip("link", "set", "eth0", "mtu", "1280")
                with monkeypatch.context() as patch:
                    patch.setattr(faults, "_trap", die)
                    if place == "one end":  # the second that is set
                        patch.setattr(it.wires, "_resize_hosts_end" if given < 1450 else "_resize_pods_end", die)
                    with pytest.raises(Killed):
                        await it.attachments.resize(given)
                following = await it.restarted().start()
                try:
                    for only_shrink in (True, False):
                        await following.attachments.resize(then, only_shrink=only_shrink)
                    assert a.json("link", "show", "eth0")[0]["mtu"] == then
                    assert it.node.json("link", "show", port)[0]["mtu"] == then
                    assert b.json("link", "show", "eth0")[0]["mtu"] == 1280
                    assert {(each.mtu, each.resizing) for each in following.journal.attachments()} == {(then, 0)}
                finally:
                    following.journal.close()

    play(story)


def test_an_mtu_that_the_kernel_refuses_is_an_error_and_the_others_have_theirs(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                with pytest.raises(PlumbingFailed, match="MTU of"):
                    await it.attachments.resize(100_000)
                row = it.journal.get(key("a"))
                assert row is not None
                assert row.mtu == 1450, "what is not done is not recorded"

    play(story)
