"""What only routers are told (who listens to which group, who looks for one) is flooded to no pod.

The bridge follows it, the node hears it, and so does a port that is no pod's. A pod behind which there is a router,
known by its queries or by PIM, hears it, too (RFC 4541, 2.1.1 and 3).
"""

from __future__ import annotations

import ipaddress

import pytest

from tests.netns import frames
from tests.netns.frames import Raw, icmpv6, mac_bytes, raw, udp
from tests.netns.guarded import (
    ALL_NODES,
    ITS_LOCAL,
    ITS_MAC,
    LAST,
    ME,
    MY_LOCAL,
    MY_MAC,
    NEIGHBOUR,
    guarded,
    six,
    to_pod,
)
from tests.netns.node_fixtures import eventually, play

GROUP, GROUP_MAC, ALL_ROUTERS_MAC = "239.1.1.1", "01:00:5e:01:01:01", "33:33:00:00:00:02"
GROUP6, GROUP6_MAC = "ff05::1:3", "33:33:00:01:00:03"
ALERT = b"\5\2\0\0\1\0"  # the option "router alert", padded
PIM = 103
FOREIGN = "02:00:00:00:00:77"
BACK = b"nothing-more-from-there"
LAST_OF_ALL = to_pod(udp(ME, "10.244.1.255", LAST), target=frames.BROADCAST)


def igmp(kind: int, target: str, mac: str, source: str = ME, from_mac: str = MY_MAC, about: str = GROUP) -> bytes:
    """A message of IGMPv2 (RFC 2236, 2), or the beginning of one of IGMPv3."""
    body = bytes([kind, 0, 0, 0]) + ipaddress.ip_address(about).packed
    message = body[:2] + frames.checksum(body).to_bytes(2, "big") + body[4:]
    return to_pod(frames.ip(source, target, frames.IGMP, message), source=from_mac, target=mac)


def mld(kind: int, target: str, mac: str, source: str = MY_LOCAL, from_mac: str = MY_MAC, about: str = GROUP6) -> bytes:
    """A message of MLDv1 (RFC 2710, 3)."""
    body = bytes(4) + ipaddress.ip_address(about).packed
    return six(icmpv6(source, target, kind, body, hop_by_hop=ALERT), source=from_mac, target=mac)


def mld2(source: str) -> bytes:
    """A report of MLDv2 about one group (RFC 3810, 5.2)."""
    body = b"\0\0\0\1" + b"\4\0\0\0" + ipaddress.ip_address(GROUP6).packed
    return six(icmpv6(source, "ff02::16", 143, body, hop_by_hop=ALERT), target="33:33:00:00:00:16")


FOR_ROUTERS: dict[str, bytes] = {
    "a report of IGMPv1": igmp(0x12, GROUP, GROUP_MAC),
    "a report of IGMPv2": igmp(0x16, GROUP, GROUP_MAC),
    "a report of IGMPv3": igmp(0x22, "224.0.0.22", "01:00:5e:00:00:16", about="0.0.0.0"),
    "a leave": igmp(0x17, "224.0.0.2", "01:00:5e:00:00:02"),
    "a report of MLDv1": mld(131, GROUP6, GROUP6_MAC),
    "a done of MLDv1": mld(132, "ff02::2", ALL_ROUTERS_MAC),
    "a report of MLDv2": mld2(MY_LOCAL),
    "a report before there is an address": mld2("::"),
    "a router solicitation": six(
        icmpv6(MY_LOCAL, "ff02::2", 133, bytes(4) + b"\1\1" + mac_bytes(MY_MAC)), target=ALL_ROUTERS_MAC
    ),
}
OF_ROUTERS: dict[str, bytes] = {
    "a query of IGMP": igmp(0x11, "224.0.0.1", "01:00:5e:00:00:01", NEIGHBOUR, ITS_MAC, "0.0.0.0"),
    "a query of MLD": mld(130, ALL_NODES, "33:33:00:00:00:01", ITS_LOCAL, ITS_MAC, "::"),
    "an advertisement of a router for IPv4": igmp(
        0x30, "224.0.0.106", "01:00:5e:00:00:6a", NEIGHBOUR, ITS_MAC, "0.0.0.0"
    ),
    "an advertisement of a router for IPv6": six(
        icmpv6(ITS_LOCAL, "ff02::6a", 151, bytes(4), hop_by_hop=ALERT), source=ITS_MAC, target="33:33:00:00:00:6a"
    ),
    "a hello of PIM": to_pod(
        frames.ip(NEIGHBOUR, "224.0.0.13", PIM, b"\x20\0\xdf\xff"), source=ITS_MAC, target="01:00:5e:00:00:0d"
    ),
}


def tell(mouth: Raw) -> None:
    """All of it, and what ends each wait."""
    mouth.send(*FOR_ROUTERS.values(), LAST_OF_ALL)


async def heard(ear: Raw) -> set[str]:
    """What of it came to the ear."""
    there = await ear.hear(LAST)
    return {name for name, frame in FOR_ROUTERS.items() if frame in there}


def test_what_routers_are_told_reaches_the_node_and_no_pod() -> None:
    async def story() -> None:
        async with guarded() as (it, mouth, neighbour):
            it.node.ip("link", "add", "foreign0", "type", "veth", "peer", "name", "foreign0", "netns", it.outside.name)
            it.outside.ip("link", "set", "foreign0", "up")
            it.node.ip("link", "set", "foreign0", "master", "pw0", "up")
            node, foreign = await raw(it.node.path, "pw0"), await raw(it.outside.path, "foreign0")
            await eventually(lambda: "forwarding" in it.node.run("bridge", "link", "show", "dev", "foreign0"))
            tell(mouth)
            assert await heard(neighbour) == set()
            assert await heard(node) == await heard(foreign) == set(FOR_ROUTERS)
            known = it.node.run("bridge", "mdb", "show", "dev", "pw0")
            assert all(f"port {it.first.host_ifname} grp {group}" in known for group in (GROUP, GROUP6)), known
            assert await it.dropped() == {}, "none of it was a spoof"
            theirs = {name: b"".join((each[:6], mac_bytes(FOREIGN), each[12:])) for name, each in FOR_ROUTERS.items()}
            foreign.send(
                *theirs.values(),
                to_pod(udp("192.0.2.9", "10.244.1.255", LAST), source=FOREIGN, target=frames.BROADCAST),
            )
            there = await neighbour.hear(LAST)
            assert [name for name, frame in theirs.items() if frame not in there] == [], "what is not a pod's passes"
            node.close()
            foreign.close()

    play(story)


@pytest.mark.parametrize("query", OF_ROUTERS.values(), ids=OF_ROUTERS.keys())
def test_a_router_among_the_pods_is_told(query: bytes) -> None:
    """From its first query on; it is a host besides, which says what it listens to."""

    async def story() -> None:
        async with guarded() as (it, mouth, router):
            tell(mouth)
            assert await heard(router) == set()
            router.send(query)
            assert query in await other_hears(router, mouth)
            tell(mouth)
            assert await heard(router) == set(FOR_ROUTERS)
            assert not set(FOR_ROUTERS.values()) & set(await other_hears(router, mouth)), "no router is there"
            assert await it.dropped() == {}

    play(story)


def test_a_router_hears_all_of_it_from_a_table_that_is_new() -> None:
    """It may have said who it is two minutes ago; who says nothing hears nothing once that would have come again."""

    async def story() -> None:
        async with guarded() as (it, mouth, router):
            it.node.run("nft", "flush", "chain", "bridge", "podwire", "flooded")
            assert await it.ensure() == ["made table bridge podwire"]
            tell(mouth)
            assert await heard(router) == set(FOR_ROUTERS)
            for port in (it.first.host_ifname, it.second.host_ifname):
                it.node.run("nft", "delete", "element", "bridge", "podwire", "routers", f'{{ "{port}" }}')
            tell(mouth)
            assert await heard(router) == set()

    play(story)


async def other_hears(mouth: Raw, ear: Raw) -> list[bytes]:
    """What came to the ear since it was last asked; also its own, since the port is a hairpin."""
    mouth.send(to_pod(udp(NEIGHBOUR, "10.244.1.255", BACK), source=ITS_MAC, target=frames.BROADCAST))
    return await ear.hear(BACK)
