"""What a pod sends as somebody else is dropped and counted, and what it sends as itself arrives.

A pod (10.244.1.3) sends raw frames to a pod beside it (10.244.1.4), to the node (10.244.1.1), and by way of the node to
another machine (192.0.2.2). Each family of spoofs is a table; the same sender's honest frames are another, and one of
them ends each wait.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import msgspec
import pytest

from ipam_daemon.devices import Devices
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.model import Attachment
from ipam_daemon.plan import gateways, mac_of, plan_attachment
from ipam_daemon.spoofguard import REASONS, link_local
from ipam_daemon.wires import Wires, WireState
from tests.netns import frames
from tests.netns.frames import Raw, advertisement, arp, ethernet, icmpv6, link_layer, raw, tagged, udp
from tests.netns.node_fixtures import Netns, Node, block, bridge_plan, call, eventually, play, pods
from tests.netns.traffic import Pings, traffic

CIDR, SIX = ipaddress.ip_network("10.244.1.0/24"), ipaddress.ip_network("fd00:1::/120")
GATEWAYS = gateways([block(CIDR), block(SIX)])
ME, NEIGHBOUR, NODE = "10.244.1.3", "10.244.1.4", "10.244.1.1"
ME6, NEIGHBOUR6, NODE6 = "fd00:1::3", "fd00:1::4", "fd00:1::1"
MY_MAC, ITS_MAC, NODE_MAC = (mac_of(ipaddress.ip_address(each)) for each in (ME, NEIGHBOUR, NODE))
MY_LOCAL, ITS_LOCAL = str(link_local(MY_MAC)), str(link_local(ITS_MAC))
OUTSIDE, STRANGER, NOBODY = "192.0.2.2", "198.51.100.1", "02:00:00:00:00:99"
ALL_NODES, ALL_NODES_MAC = "ff02::1", "33:33:00:00:00:01"
TOKEN, LAST = b"spoofed-or-not", b"and-that-was-all"


class Stage:
    """A node with two pods, guarded, and another machine on its underlay."""

    def __init__(self, node: Node, a: Netns, b: Netns, outside: Netns) -> None:
        self.node, self.a, self.b, self.outside = node, a, b, outside
        self.guard = SpoofGuard(node.thread)
        self.wires = Wires(node.thread, guard=self.guard)
        self.first = attachment(a, 3)
        self.second = attachment(b, 4)

    async def attach(self, *attachments: Attachment) -> None:
        for each in attachments:
            await self.node.thread.run(self.wires.attach, each, GATEWAYS)

    async def ensure(self) -> list[str]:
        return await self.node.thread.run(self.wires.ensure_guard)

    async def dropped(self) -> dict[str, int]:
        """What was counted since the table was made, by reason; what was not is left out."""
        return {
            reason: packets for reason, packets in (await self.node.thread.run(self.guard.dropped)).items() if packets
        }

    def listed(self) -> str:
        """Our table as nft lists it, without what was counted."""
        return self.node.run("nft", "-s", "list", "table", "bridge", "podwire")

    def port_of(self, mac: str) -> str:
        """Where the bridge believes a MAC to be."""
        lines = self.node.run("bridge", "fdb", "show", "br", "pw0").splitlines()
        return next((line.split()[2] for line in lines if line.startswith(mac) and "permanent" not in line), "")


def attachment(pod: Netns, number: int, mac: str = "") -> Attachment:
    addresses = tuple(
        ipaddress.ip_interface(f"{text}{number}/{length}") for text, length in (("10.244.1.", 24), ("fd00:1::", 120))
    )
    made = plan_attachment(call("ADD", f"c{number}", pod.path, issued_ns=number), addresses, 1400, 1.0)
    return msgspec.structs.replace(made, mac=mac or made.mac)


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Pods are not attached yet, and there is no table."""
    async with Node() as node:
        plan = bridge_plan(CIDR)
        plan = msgspec.structs.replace(plan, addresses=(*plan.addresses, ipaddress.ip_interface(f"{NODE6}/120")))
        await node.thread.run(Devices(node.thread).ensure_bridge, plan)
        with ExitStack() as stack:
            a, b, outside = (stack.enter_context(Netns(name)) for name in ("a", "b", "outside"))
            node.ip("link", "add", "under0", "type", "veth", "peer", "name", "under0", "netns", outside.name)
            for machine, address in ((node, "192.0.2.1/24"), (outside, f"{OUTSIDE}/24")):
                machine.ip("addr", "add", address, "dev", "under0")
                machine.ip("link", "set", "under0", "up")
            yield Stage(node, a, b, outside)


@asynccontextmanager
async def guarded() -> AsyncIterator[tuple[Stage, Raw, Raw]]:
    """Both pods attached and guarded, a raw socket in the first and an ear in the second."""
    async with stage() as it:
        await it.ensure()
        await it.attach(it.first, it.second)
        mouth, ear = await raw(it.a.path), await raw(it.b.path)
        try:
            yield it, mouth, ear
        finally:
            mouth.close()
            ear.close()


def to_pod(payload: bytes, kind: int = frames.IPV4, source: str = MY_MAC, target: str = ITS_MAC) -> bytes:
    return ethernet(source, target, kind, payload)


def six(payload: bytes, source: str = MY_MAC, target: str = ALL_NODES_MAC) -> bytes:
    return ethernet(source, target, frames.IPV6, payload)


HONEST = to_pod(udp(ME, NEIGHBOUR, LAST))


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
    "a router solicitation": six(icmpv6(MY_LOCAL, ALL_NODES, 133, bytes(4) + b"\1\1" + frames.mac_bytes(MY_MAC))),
    "an echo request": six(icmpv6(ME6, ALL_NODES, 128, b"\0\1\0\1" + TOKEN)),
    "a multicast report": six(
        icmpv6(MY_LOCAL, "ff02::16", 143, bytes(4), hop_by_hop=b"\5\2\0\0\1\0"), target="33:33:00:00:00:16"
    ),
    "a multicast report before there is an address": six(
        icmpv6("::", "ff02::16", 143, bytes(4), hop_by_hop=b"\5\2\0\0\1\0"), target="33:33:00:00:00:16"
    ),
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


# --- wires come and go ----------------------------------------------------------------------------------------------


def test_a_pod_of_both_families_works_from_its_first_packet() -> None:
    """Nothing of an ordinary start is dropped, link-local addresses and multicast reports included."""

    async def story() -> None:
        async with guarded() as (it, _, _):
            for target in (NEIGHBOUR, NODE, NEIGHBOUR6, NODE6):
                assert it.a.pings(target), target
            assert it.b.pings(ME6)
            await eventually(lambda: it.a.pings(f"{ITS_LOCAL}%eth0", 1))
            assert await it.dropped() == {}

    play(story)


def test_the_link_local_address_is_that_of_the_mac_whatever_the_default_is() -> None:
    async def story() -> None:
        async with stage() as it:
            await it.ensure()
            it.a.run("sysctl", "-q", "-w", "net.ipv6.conf.default.addr_gen_mode=3")
            await it.attach(it.first)
            await eventually(lambda: MY_LOCAL in it.a.ip("-6", "addr", "show", "dev", "eth0"))

    play(story)


def test_a_dead_wire_has_no_elements_and_a_failed_one_never_had() -> None:
    async def story() -> None:
        async with guarded() as (it, _, _):
            assert it.first.host_ifname in it.listed()
            await it.node.thread.run(it.wires.kill, it.first.host_ifname)
            assert it.first.host_ifname not in it.listed()
            await it.node.thread.run(it.wires.kill, it.first.host_ifname)
            failing = msgspec.structs.replace(it.first, host_ifname="pw000000000000")
            with pytest.raises(PlumbingFailed):
                await it.node.thread.run(it.wires.attach, failing, {**GATEWAYS, SIX: ipaddress.ip_address("fd00:9::1")})
            assert "pw000000000000" not in it.listed()
            await it.node.thread.run(it.wires.delete, it.second.host_ifname)
            assert '"pw' not in it.listed().replace('"pw*"', "")
            assert await it.ensure() == []

    play(story)


def test_a_pod_that_changes_its_mac_is_cut_off() -> None:
    async def story() -> None:
        async with guarded() as (it, _, _):
            it.a.ip("link", "set", "eth0", "address", NOBODY)
            assert not it.a.pings(NODE, 1)
            assert (await it.dropped())["mac"] > 0
            it.a.ip("link", "set", "eth0", "address", MY_MAC)
            assert it.a.pings(NODE)

    play(story)


DAMAGE = {
    "the whole ruleset flushed": "flush ruleset",
    "the table deleted": "delete table bridge podwire",
    "a chain flushed": "flush chain bridge podwire blame",
    "a rule of somebody else": "add rule bridge podwire from_pod accept",
    "an element deleted": f'delete element bridge podwire macs {{ "PORT" . {MY_MAC} }}',
    "an element of somebody else": f'add element bridge podwire bound4 {{ "PORT" . {MY_MAC} . {NEIGHBOUR} }}',
    "an element of nobody's wire": f'add element bridge podwire bound4 {{ "pwffffffffffff" . {MY_MAC} . {ME} }}',
    "a set flushed": "flush set bridge podwire bound6",
}


def test_what_somebody_damaged_is_repaired() -> None:
    async def story() -> None:
        async with guarded() as (it, mouth, ear):
            elements = sorted(it.listed().split())
            for name, script in DAMAGE.items():
                it.node.run("nft", "-f", "-", stdin=script.replace("PORT", it.first.host_ifname))
                assert await it.ensure(), name
                assert await it.ensure() == [], name
                assert sorted(it.listed().split()) == elements, name
                mouth.send(SPOOFS["another pod's address"][0], HONEST)
                assert SPOOFS["another pod's address"][0] not in await ear.hear(LAST), name
                it.node.run("nft", "reset", "counters", "table", "bridge", "podwire")

    play(story)


def test_an_add_brings_a_table_back_that_is_gone() -> None:
    async def story() -> None:
        async with stage() as it:
            await it.ensure()
            await it.attach(it.first)
            it.node.run("nft", "flush", "ruleset")
            await it.attach(it.second)
            assert it.a.pings(NEIGHBOUR)
            assert await it.ensure() == []

    play(story)


# --- daemons come and go --------------------------------------------------------------------------------------------


def test_a_node_that_had_no_guard_gets_one_under_traffic() -> None:
    """An upgrade: the pods' elements come with the rules, in one transaction. A restart after that changes nothing."""

    async def story() -> None:
        async with stage() as it:
            it.wires = Wires(it.node.thread)
            await it.attach(it.first, it.second)
            with traffic(it.a, it.b, NEIGHBOUR) as through, Pings(it.a, NEIGHBOUR6) as six_through:
                await asyncio.sleep(0.1)
                for script in ("", "delete table bridge podwire", "add rule bridge podwire shape accept"):
                    it.node.run("nft", "-f", "-", stdin=script)
                    again = SpoofGuard(it.node.thread)
                    await it.node.thread.run(again.adopt, [it.first, it.second])
                    assert await it.node.thread.run(again.ensure) == ["made table bridge podwire"]
                    assert await it.node.thread.run(again.ensure) == []
                    await asyncio.sleep(0.1)
                restarted = SpoofGuard(it.node.thread)
                await it.node.thread.run(restarted.adopt, [it.first, it.second])
                assert await it.node.thread.run(restarted.ensure) == []
                await asyncio.sleep(0.1)
                assert (through.harm(), six_through.lost()) == ([], 0)
            assert await it.dropped() == {}

    play(story)


def test_a_wire_that_nobody_knows_is_cut_off_until_the_journal_has_it() -> None:
    async def story() -> None:
        async with stage() as it:
            unguarded = Wires(it.node.thread)
            await it.node.thread.run(unguarded.attach, it.first, GATEWAYS)
            await it.ensure()
            assert not it.a.pings(NODE, 1)
            assert await it.node.thread.run(it.wires.mend, it.first) is WireState.FINE
            assert it.a.pings(NODE)

    play(story)


def test_elements_of_a_living_wire_that_is_not_known_yet_stay() -> None:
    """A daemon that has lost its journal and takes the wire in later must not cut it off before."""

    async def story() -> None:
        async with guarded() as (it, _, _):
            forgetful = SpoofGuard(it.node.thread)
            assert await it.node.thread.run(forgetful.ensure) == []
            it.node.run("nft", "flush", "chain", "bridge", "podwire", "arp_v4")
            assert await it.node.thread.run(forgetful.ensure) == ["made table bridge podwire"]
            assert it.a.pings(NODE)
            with pods(1):
                it.node.ip("link", "del", it.first.host_ifname)
                (removed,) = await it.node.thread.run(forgetful.ensure)
                assert removed.startswith("removed")
                assert it.first.host_ifname not in it.listed()

    play(story)


def test_an_nft_that_does_not_work_is_an_error() -> None:
    async def story() -> None:
        async with Node() as node:
            for command, words in (("/absent/nft", "cannot be run"), ("false", "false -f -")):
                with pytest.raises(PlumbingFailed, match=words):
                    await node.thread.run(SpoofGuard(node.thread, (command,)).ensure)

    play(story)
