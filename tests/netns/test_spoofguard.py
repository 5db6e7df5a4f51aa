"""What a pod sends as somebody else is dropped and counted, and what it sends as itself arrives.

Each family of spoofs is a table; the same sender's honest frames are another, and one of them ends each wait. What only
routers are told is in test_for_routers.py.
"""

from __future__ import annotations

import ipaddress

import pytest

from ipam_daemon.spoofguard import REASONS
from ipam_daemon.wires import Wires
from tests.netns import frames
from tests.netns.frames import advertisement, arp, ethernet, icmpv6, link_layer, raw, tagged, udp
from tests.netns.guarded import (
    ALL_NODES,
    CIDR,
    GATEWAYS,
    HONEST,
    ITS_LOCAL,
    ITS_MAC,
    LAST,
    ME,
    ME6,
    MY_LOCAL,
    MY_MAC,
    NEIGHBOUR,
    NEIGHBOUR6,
    NOBODY,
    NODE,
    NODE6,
    NODE_MAC,
    OUTSIDE,
    STRANGER,
    TOKEN,
    guarded,
    six,
    stage,
    to_pod,
)
from tests.netns.node_fixtures import eventually, play

SPOOFS: dict[str, tuple[bytes, str]] = {
    "another pod's address": (to_pod(udp(NEIGHBOUR, NEIGHBOUR, TOKEN)), "address"),
    "the node's address": (to_pod(udp(NODE, NEIGHBOUR, TOKEN)), "address"),
    "an address of nobody": (to_pod(udp(STRANGER, NEIGHBOUR, TOKEN)), "address"),
    "no address": (to_pod(udp("0.0.0.0", NEIGHBOUR, TOKEN)), "address"),
    "its address, another pod's MAC": (to_pod(udp(ME, NEIGHBOUR, TOKEN), source=ITS_MAC), "mac"),
    "its address, the node's MAC": (to_pod(udp(ME, NEIGHBOUR, TOKEN), source=NODE_MAC), "mac"),
    "its address, nobody's MAC": (to_pod(udp(ME, NEIGHBOUR, TOKEN), source=NOBODY), "mac"),
    "another pod's address and MAC": (to_pod(udp(NEIGHBOUR, NEIGHBOUR, TOKEN), source=ITS_MAC), "mac"),
    "broadcast with another pod's address": (
        to_pod(udp(NEIGHBOUR, "10.244.1.255", TOKEN), target=frames.BROADCAST),
        "address",
    ),
    "a packet that is cut off": (to_pod(udp(ME, NEIGHBOUR, TOKEN)[:13])[:27], "address"),
    "IPv6, another pod's address": (six(udp(NEIGHBOUR6, ALL_NODES, TOKEN)), "address"),
    "IPv6, another pod's link-local address": (six(udp(ITS_LOCAL, ALL_NODES, TOKEN)), "address"),
    "IPv6, another pod's MAC": (six(udp(ME6, ALL_NODES, TOKEN), source=ITS_MAC), "mac"),
    "IPv6, UDP from the unspecified address": (six(udp("::", ALL_NODES, TOKEN)), "address"),
    "IPv6, a link-local address that its MAC does not make": (six(udp("fe80::3", ALL_NODES, TOKEN)), "address"),
}
ARPS: dict[str, tuple[bytes, str]] = {
    "an answer for the node": (to_pod(arp(2, MY_MAC, NODE, NEIGHBOUR, ITS_MAC), frames.ARP), "arp"),
    "an answer for another pod": (to_pod(arp(2, MY_MAC, NEIGHBOUR, NEIGHBOUR, ITS_MAC), frames.ARP), "arp"),
    "an announcement of the node's address": (
        to_pod(arp(1, MY_MAC, NODE, NODE), frames.ARP, target=frames.BROADCAST),
        "arp",
    ),
    "its address at another MAC": (to_pod(arp(2, ITS_MAC, ME, NEIGHBOUR, ITS_MAC), frames.ARP), "arp"),
    "its address at nobody's MAC": (to_pod(arp(1, NOBODY, ME, NEIGHBOUR), frames.ARP), "arp"),
    "from another pod's MAC": (to_pod(arp(2, MY_MAC, ME, NEIGHBOUR, ITS_MAC), frames.ARP, source=ITS_MAC), "mac"),
    "an answer without an address": (to_pod(arp(2, MY_MAC, "0.0.0.0", NEIGHBOUR, ITS_MAC), frames.ARP), "arp"),
    "a probe with another MAC": (to_pod(arp(1, ITS_MAC, "0.0.0.0", NEIGHBOUR), frames.ARP), "arp"),
    "of a hardware that is not Ethernet": (
        to_pod(b"\0\6" + arp(2, MY_MAC, ME, NEIGHBOUR)[2:], frames.ARP),
        "arp",
    ),
}
OPTION = link_layer(MY_MAC)
NEIGHBOURS: dict[str, tuple[bytes, str]] = {
    "an advertisement for the node": (six(icmpv6(ME6, ALL_NODES, 136, advertisement(NODE6, OPTION))), "neighbor"),
    "an advertisement for another pod, without option": (
        six(icmpv6(MY_LOCAL, ALL_NODES, 136, advertisement(NEIGHBOUR6))),
        "neighbor",
    ),
    "its address at another MAC": (
        six(icmpv6(ME6, ALL_NODES, 136, advertisement(ME6, link_layer(ITS_MAC)))),
        "neighbor",
    ),
    "two options, the second another MAC": (
        six(icmpv6(ME6, ALL_NODES, 136, advertisement(ME6, OPTION, link_layer(ITS_MAC)))),
        "neighbor",
    ),
    "another option first": (
        six(icmpv6(ME6, ALL_NODES, 136, advertisement(ME6, b"\x0e\1abcdef", link_layer(ITS_MAC)))),
        "neighbor",
    ),
    "behind a header of options": (
        six(icmpv6(ME6, ALL_NODES, 136, advertisement(NODE6, OPTION), hop_by_hop=b"\1\4\0\0\0\0")),
        "neighbor",
    ),
    "an advertisement from another pod's address": (
        six(icmpv6(NEIGHBOUR6, ALL_NODES, 136, advertisement(NEIGHBOUR6, OPTION))),
        "address",
    ),
    "a router advertisement": (six(icmpv6(MY_LOCAL, ALL_NODES, 134, bytes(12))), "router"),
    "a router advertisement behind a header of options": (
        six(icmpv6(MY_LOCAL, ALL_NODES, 134, bytes(12), hop_by_hop=b"\1\4\0\0\0\0")),
        "router",
    ),
    "a redirect": (six(icmpv6(MY_LOCAL, ALL_NODES, 137, bytes(36))), "router"),
    "a check of another pod's address, which would take it away": (
        six(icmpv6("::", ALL_NODES, 135, bytes(4) + ipaddress.ip_address(ITS_LOCAL).packed)),
        "address",
    ),
}
KINDS: dict[str, tuple[bytes, str]] = {
    "a VLAN tag": (tagged(HONEST, frames.VLAN), "vlan"),
    "a service tag": (tagged(HONEST, frames.SERVICE_VLAN), "vlan"),
    "two tags": (tagged(HONEST, frames.VLAN, frames.SERVICE_VLAN), "vlan"),
    "two tags of one kind": (tagged(HONEST, frames.VLAN, frames.VLAN), "vlan"),
    "a tag before ARP": (tagged(to_pod(arp(2, MY_MAC, NODE, ME), frames.ARP), frames.VLAN), "vlan"),
    "LLDP": (to_pod(TOKEN, frames.LLDP), "ethertype"),
    "reverse ARP": (to_pod(arp(2, MY_MAC, NODE, ME), frames.RARP), "ethertype"),
    "PPPoE": (to_pod(b"\x11\0\0\1\0\x20\0\x21" + udp(ME, NEIGHBOUR, TOKEN), frames.PPPOE), "ethertype"),
    "IEEE 802.3": (to_pod(b"\xaa\xaa\3\0\0\0\x08\0" + udp(ME, NEIGHBOUR, TOKEN), 60), "ethertype"),
    "another pod's MAC, to a bridge's own address": (
        to_pod(udp(ME, NEIGHBOUR, TOKEN), source=ITS_MAC, target="01:80:c2:00:00:0e"),
        "mac",
    ),
    "another pod's address, to a bridge's own address": (
        to_pod(udp(NEIGHBOUR, NODE, TOKEN), target="01:80:c2:00:00:0e"),
        "address",
    ),
    "another pod's MAC, to a bridge's own address that a bridge alone cannot forward": (
        to_pod(udp(ME, NODE, TOKEN), source=ITS_MAC, target="01:80:c2:00:00:02"),
        "mac",
    ),
    "another pod's MAC, to where spanning trees are told": (
        to_pod(udp(ME, NODE, TOKEN), source=ITS_MAC, target="01:80:c2:00:00:00"),
        "mac",
    ),
}
HARMLESS: dict[str, bytes] = {
    "UDP": to_pod(udp(ME, NEIGHBOUR, TOKEN)),
    "UDP, broadcast": to_pod(udp(ME, "10.244.1.255", TOKEN), target=frames.BROADCAST),
    "UDP, multicast": to_pod(udp(ME, "239.1.1.1", TOKEN), target="01:00:5e:01:01:01"),
    "VRRP": to_pod(frames.ip(ME, "224.0.0.18", 112, TOKEN), target="01:00:5e:00:00:12"),
    "IGMP of a kind that is no host's": to_pod(
        frames.ip(
            ME, "224.0.0.4", frames.IGMP, b"\x13\0" + frames.checksum(b"\x13\0\0\0abcd").to_bytes(2, "big") + b"abcd"
        ),
        target="01:00:5e:00:00:04",
    ),
    "an ARP question": to_pod(arp(1, MY_MAC, ME, NEIGHBOUR), frames.ARP, target=frames.BROADCAST),
    "an ARP answer": to_pod(arp(2, MY_MAC, ME, NEIGHBOUR, ITS_MAC), frames.ARP),
    "an announcement": to_pod(arp(1, MY_MAC, ME, ME), frames.ARP, target=frames.BROADCAST),
    "an ARP probe": to_pod(arp(1, MY_MAC, "0.0.0.0", NEIGHBOUR), frames.ARP, target=frames.BROADCAST),
    "IPv6": six(udp(ME6, ALL_NODES, TOKEN)),
    "IPv6, link-local": six(udp(MY_LOCAL, ALL_NODES, TOKEN)),
    "an advertisement": six(icmpv6(ME6, ALL_NODES, 136, advertisement(ME6, OPTION))),
    "an advertisement of the link-local address": six(
        icmpv6(MY_LOCAL, ALL_NODES, 136, advertisement(MY_LOCAL, OPTION))
    ),
    "an advertisement without option": six(icmpv6(ME6, ALL_NODES, 136, advertisement(ME6))),
    "a solicitation": six(
        icmpv6(
            ME6, ALL_NODES, 135, bytes(4) + ipaddress.ip_address(NEIGHBOUR6).packed + b"\1\1" + frames.mac_bytes(MY_MAC)
        )
    ),
    "a check of its own address": six(icmpv6("::", ALL_NODES, 135, bytes(4) + ipaddress.ip_address(MY_LOCAL).packed)),
    "an echo request": six(icmpv6(ME6, ALL_NODES, 128, b"\0\1\0\1" + TOKEN)),
}


@pytest.mark.parametrize("spoofs", [SPOOFS, ARPS, NEIGHBOURS, KINDS], ids=["addresses", "ARP", "discovery", "kinds"])
def test_what_a_pod_sends_as_somebody_else_is_dropped_and_counted(spoofs: dict[str, tuple[bytes, str]]) -> None:
    async def story() -> None:
        async with guarded() as (it, mouth, ear):
            wrong = {}
            expected: dict[str, int] = {}
            for name, (frame, reason) in spoofs.items():
                before = await it.dropped()
                mouth.send(frame, HONEST)
                heard = await ear.hear(LAST)
                after = await it.dropped()
                counted = {each for each in REASONS if after.get(each, 0) - before.get(each, 0)}
                if frame in heard or counted != {reason}:
                    wrong[name] = ("heard" if frame in heard else "", counted)
                expected[reason] = expected.get(reason, 0) + 1
            assert wrong == {}
            assert await it.dropped() == expected, "each once"
            assert it.port_of(ITS_MAC) in ("", it.second.host_ifname), "the bridge has not learnt from what was dropped"

    play(story)


def test_what_a_pod_sends_as_itself_arrives() -> None:
    """All that the tables above have in another shape: the sender can be heard."""

    async def story() -> None:
        async with guarded() as (it, mouth, ear):
            missing = []
            for name, frame in HARMLESS.items():
                mouth.send(frame, HONEST)
                if frame not in await ear.hear(LAST):
                    missing.append(name)
            assert (missing, await it.dropped()) == ([], {})

    play(story)


def test_a_pod_joins_a_group() -> None:
    """A bridge that follows IGMP keeps the report to itself, and notes who sent it."""

    async def story() -> None:
        async with guarded() as (it, mouth, _):
            group = ipaddress.ip_address("239.1.1.1").packed
            report = b"\x16\0" + frames.checksum(b"\x16\0\0\0" + group).to_bytes(2, "big") + group
            mouth.send(to_pod(frames.ip(ME, "239.1.1.1", frames.IGMP, report), target="01:00:5e:01:01:01"))
            joined = f"port {it.first.host_ifname} grp 239.1.1.1"
            await eventually(lambda: joined in it.node.run("bridge", "mdb", "show", "dev", "pw0"))
            assert await it.dropped() == {}

    play(story)


def test_without_the_guard_the_spoofs_arrive() -> None:
    """So the tables show the guard's work. The bridge believes a MAC to be where it was last seen; the pod beside says
    after each spoof where it is."""

    async def story() -> None:
        async with stage() as it:
            await it.node.thread.run(Wires(it.node.thread).attach, it.first, GATEWAYS)
            await it.node.thread.run(Wires(it.node.thread).attach, it.second, GATEWAYS)
            mouth, ear = await raw(it.a.path), await raw(it.b.path)
            silent = set()
            for name, (frame, _) in (SPOOFS | ARPS | NEIGHBOURS).items():
                mouth.send(frame)
                ear.send(to_pod(arp(1, ITS_MAC, NEIGHBOUR, NEIGHBOUR), frames.ARP, ITS_MAC, frames.BROADCAST))
                mouth.send(HONEST)
                if frame not in await ear.hear(LAST):
                    silent.add(name)
            mouth.close()
            ear.close()
            assert silent == SILENT_ANYWAY

    play(story)


SILENT_ANYWAY = {
    "a packet that is cut off",
    "its address, another pod's MAC",  # which is then where the frame came from
    "another pod's address and MAC",
    "from another pod's MAC",
}


@pytest.mark.parametrize(("place", "target"), [("the node", NODE), ("another machine", OUTSIDE)])
def test_no_spoof_reaches(place: str, target: str) -> None:
    async def story() -> None:
        async with guarded() as (it, mouth, _):
            it.outside.ip("route", "add", str(CIDR), "via", "192.0.2.1")
            ear = await (raw(it.node.path, "pw0") if target == NODE else raw(it.outside.path, "under0"))
            await eventually(lambda: it.a.pings(target, 1))
            for source, mac in ((NEIGHBOUR, MY_MAC), (STRANGER, MY_MAC), (ME, ITS_MAC), (NODE, NODE_MAC)):
                mouth.send(ethernet(mac, NODE_MAC, frames.IPV4, udp(source, target, TOKEN)))
            mouth.send(ethernet(MY_MAC, NODE_MAC, frames.IPV4, udp(ME, target, LAST)))
            heard = await ear.hear(LAST)
            ear.close()
            assert not [frame for frame in heard if TOKEN in frame], place
            assert await it.dropped() == {"address": 2, "mac": 2}

    play(story)
