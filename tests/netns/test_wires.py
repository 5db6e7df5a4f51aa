"""One wire at a time: made whole or not at all, killed at once, deleted by group, found again by its alias."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.devices import Devices
from ipam_daemon.errors import InterfaceExists, PlumbingFailed
from ipam_daemon.model import Attachment, AttachmentState, PodRef
from ipam_daemon.plan import gateways, plan_attachment
from ipam_daemon.wires import Wires, WireState
from tests.netns.frames import BROADCAST, RARP, ethernet, raw
from tests.netns.node_fixtures import Netns, Node, block, bridge_plan, call, play, pods

CIDR = ipaddress.ip_network("10.244.1.0/24")
SIX = ipaddress.ip_network("fd00:1::/120")
GATEWAYS = gateways([block(CIDR), block(SIX)])


@asynccontextmanager
async def stage() -> AsyncIterator[tuple[Node, Wires]]:
    async with Node() as node:
        devices = Devices(node.thread)
        plan = bridge_plan(CIDR)
        await node.thread.run(devices.ensure_bridge, msgspec.structs.replace(plan, addresses=(*plan.addresses, *six())))
        yield node, Wires(node.thread)


def six() -> tuple[ipaddress.IPv6Interface, ...]:
    return (ipaddress.IPv6Interface("fd00:1::1/120"),)


def attachment(pod: Netns, number: int = 3, ifname: str = "eth0") -> Attachment:
    addresses = (ipaddress.ip_interface(f"10.244.1.{number}/24"), ipaddress.ip_interface(f"fd00:1::{number}/120"))
    return plan_attachment(call("ADD", f"c{number}", pod.path, ifname, issued_ns=number), addresses, 1400, 1.0)


async def attach(node: Node, wires: Wires, it: Attachment) -> None:
    await node.thread.run(wires.attach, it, GATEWAYS)


def test_a_wire_of_both_families_is_usable_at_once() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(1) as (pod,):
                await attach(node, wires, attachment(pod))
                (eth0,) = pod.json("addr", "show", "dev", "eth0")
                assert (eth0["mtu"], eth0["address"]) == (1400, "0a:58:0a:f4:01:03")
                (address,) = [each for each in eth0["addr_info"] if each["local"] == "fd00:1::3"]
                assert not address.get("tentative"), "nobody waits for duplicate address detection"
                assert [each["gateway"] for each in pod.json("-6", "route", "show", "default")] == ["fd00:1::1"]
                assert pod.pings("10.244.1.1")

    play(story)


def test_a_killed_wire_carries_nothing_and_is_reaped_with_its_group() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(3) as namespaces:
                made = [attachment(pod, number) for number, pod in enumerate(namespaces, 3)]
                for each in made:
                    await attach(node, wires, each)
                for each in made[:2]:
                    await node.thread.run(wires.kill, each.host_ifname)
                assert not namespaces[0].pings("10.244.1.1", 1)
                assert len(node.links()) == 4
                gone = await node.thread.run(wires.reap, [each.host_ifname for each in made])
                assert gone == {each.host_ifname for each in made[:2]}, "a living wire is not gone"
                assert node.links() == {"pw0", made[2].host_ifname}
                assert namespaces[2].pings("10.244.1.1")

    play(story)


def test_what_is_gone_is_killed_reaped_and_deleted_without_complaint() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            await node.thread.run(wires.kill, "pw-never")
            await node.thread.run(wires.delete, "pw-never")
            assert await node.thread.run(wires.reap, ["pw-never"]) == {"pw-never"}

    play(story)


def test_a_wire_says_whose_it_is() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(2) as (a, b):
                living, killed = attachment(a, 3), attachment(b, 4)
                await attach(node, wires, living)
                await attach(node, wires, killed)
                await node.thread.run(wires.kill, killed.host_ifname)
                node.ip("link", "add", "other", "alias", "podwire, or so it says", "type", "bridge")
                (found,) = await node.thread.run(wires.found, 9.0)
                assert found == msgspec.structs.replace(
                    living, netns="", pod=PodRef(), state=AttachmentState.ATTACHED, created=9.0
                )

    play(story)


async def heard_by(*pods: Netns, sent: dict[str, str]) -> list[list[str]]:
    """What each pod but the first gets of what that sends to these MACs, by their names; the last is everybody's."""
    mouth, *ears = [await raw(each.path) for each in pods]
    mouth.send(*(ethernet("0a:58:0a:f4:01:03", mac, RARP, to.encode()) for to, mac in sent.items()))
    got = [await each.hear(last=list(sent)[-1].encode()) for each in ears]
    for each in (mouth, *ears):
        each.close()
    return [[frame[14:].decode() for frame in frames if frame[12:14] == struct.pack("!H", RARP)] for frames in got]


def test_nobody_gets_what_is_for_another_pod() -> None:
    """Not even when the bridge has forgotten all that it has learnt."""

    async def story() -> None:
        async with stage() as (node, wires):
            with pods(3) as three:
                for number, pod in enumerate(three, 3):
                    await attach(node, wires, attachment(pod, number))
                node.run("bridge", "fdb", "flush", "dev", "pw0", "dynamic")
                sent = {"second": "0a:58:0a:f4:01:04", "everybody": BROADCAST}
                assert await heard_by(*three, sent=sent) == [["second", "everybody"], ["everybody"]]

    play(story)


def test_a_pod_whose_mac_the_bridge_was_made_to_forget_is_found_again() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(2) as two:
                made = [attachment(pod, number) for number, pod in enumerate(two, 3)]
                for each in made:
                    await attach(node, wires, each)
                node.run("bridge", "fdb", "del", made[1].mac, "dev", made[1].host_ifname, "master")
                sent = {"second": made[1].mac, "everybody": BROADCAST}
                assert await heard_by(*two, sent=sent) == [["second", "everybody"]]

    play(story)


@pytest.mark.parametrize("mac", ["0a:58:0a:f4:01:01", "0a:58:0a:f4:01:03"], ids=["the bridge's", "another pod's"])
def test_a_pod_that_asks_for_the_mac_of_another_takes_nobody_s_packets_for_good(mac: str) -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(2) as (first, second):
                await attach(node, wires, attachment(first, 3))
                asking = msgspec.structs.replace(attachment(second, 4), mac=mac)
                await attach(node, wires, asking)
                second.pings("10.244.1.1", 1)
                await node.thread.run(wires.kill, asking.host_ifname)
                assert first.pings("10.244.1.1")

    play(story)


def test_a_failure_halfway_leaves_neither_end_nor_an_open_namespace() -> None:
    """The gateway of the second address is of another network: its route cannot be made."""

    async def story() -> None:
        async with stage() as (node, wires):
            with pods(1) as (pod,):
                await node.thread.run(lambda: node.thread.channel)  # the node's own socket stays open
                before = set(os.listdir("/proc/self/fd"))
                wrong = {**GATEWAYS, SIX: ipaddress.ip_address("fd00:9::1")}
                with pytest.raises(PlumbingFailed, match="podnet/c3/eth0 in its namespace: EHOSTUNREACH"):
                    await node.thread.run(wires.attach, attachment(pod), wrong)
                assert pod.links() == set()
                assert node.links() == {"pw0"}
                assert set(os.listdir("/proc/self/fd")) - before <= {"0"}

    play(story)


def test_two_interfaces_of_one_pod_need_two_names() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(1) as (pod,):
                await attach(node, wires, attachment(pod))
                assert "eth0" in pod.links()
                with pytest.raises(InterfaceExists, match="has a default route already"):
                    await attach(node, wires, attachment(pod, 4, "net1"))
                assert pod.links() == {"eth0"}, "the default route is the first interface's"

    play(story)


def test_a_mended_port_is_fine_afterwards() -> None:
    async def story() -> None:
        async with stage() as (node, wires):
            with pods(1) as (pod,):
                it = attachment(pod)
                await attach(node, wires, it)
                assert await node.thread.run(wires.mend, it) is WireState.FINE
                node.ip("link", "set", it.host_ifname, "nomaster")
                assert await node.thread.run(wires.mend, it) is WireState.MENDED
                assert await node.thread.run(wires.mend, it) is WireState.FINE
                pod.delete()
                while await node.thread.run(wires.mend, it) is not WireState.GONE:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    play(story)


def test_a_netlink_error_is_never_raised_bare(tmp_path: Path) -> None:
    """Whoever runs something on the thread handles the daemon's errors; another kind would end the daemon."""

    async def story() -> None:
        async with stage() as (node, _):
            with pytest.raises(PlumbingFailed, match="ENODEV"):
                await node.thread.run(lambda: node.thread.host.get_links(999))
            with pytest.raises(PlumbingFailed, match="ENOENT"):
                await node.thread.run((tmp_path / "absent").read_text)
            with pytest.raises(KeyError):
                await node.thread.run({"a": 1}.__getitem__, "a programming error")

    play(story)
