"""The spoof guard's table while wires and daemons come and go, and somebody damages it."""

from __future__ import annotations

import asyncio
import ipaddress

import msgspec
import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.wires import Wires, WireState
from tests.netns.frames import udp
from tests.netns.guarded import (
    GATEWAYS,
    HONEST,
    ITS_LOCAL,
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
    SIX,
    TOKEN,
    guarded,
    stage,
    to_pod,
)
from tests.netns.node_fixtures import Node, eventually, play, pods
from tests.netns.traffic import Pings, traffic

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


def test_a_link_too_small_for_ipv6_has_no_link_local_address_and_works() -> None:
    """The kernel has nothing of IPv6 at a link of less than 1280 bytes (RFC 8200, 5)."""

    async def story() -> None:
        async with stage() as it:
            await it.ensure()
            small = msgspec.structs.replace(it.first, mtu=1000, addresses=it.first.addresses[:1])
            await it.attach(small)
            assert "inet6" not in it.a.ip("addr", "show", "dev", "eth0")
            assert it.a.pings(NODE)

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
    "what no rule is about dropped": "add chain bridge podwire forward { policy drop; }",
    "the same of all that pods send": "add chain bridge podwire prerouting { policy drop; }",
}


def test_what_somebody_damaged_is_repaired() -> None:
    async def story() -> None:
        async with guarded() as (it, mouth, ear):
            elements = sorted(it.listed().split())
            spoof = to_pod(udp(NEIGHBOUR, NEIGHBOUR, TOKEN))
            for name, script in DAMAGE.items():
                it.node.run("nft", "-f", "-", stdin=script.replace("PORT", it.first.host_ifname))
                assert await it.ensure(), name
                assert await it.ensure() == [], name
                assert sorted(it.listed().split()) == elements, name
                mouth.send(spoof, HONEST)
                assert spoof not in await ear.hear(LAST), name
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
