"""Limits on a wire: what the kernel is told, what it does with it, and what becomes of it when the wire goes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipam_daemon.bandwidth import queue_names, wire_of
from ipam_daemon.cni import PreviousInterface, PreviousIp, PreviousResult
from ipam_daemon.errors import CheckFailed, InterfaceExists, InvalidConfig
from ipam_daemon.model import Bandwidth
from ipam_daemon.server import AgentService
from podwire.v1 import agent_pb2
from tests.netns.hostport_fixtures import add_call, running
from tests.netns.node_fixtures import Engine, Netns, call, engine, eventually, key, play, pods

MBIT = 1_000_000
LIMITS = Bandwidth(ingress_rate=80 * MBIT, ingress_burst=4 * MBIT, egress_rate=40 * MBIT, egress_burst=2 * MBIT)
STREAM = """
import socket, sys
if sys.argv[1] == "receive":
    with socket.create_server(("", 7000)) as server:
        print("ready")
        client, _ = server.accept()
        while client.recv(1 << 16):
            pass
        client.close()
else:
    with socket.create_connection((sys.argv[1], 7000)) as client:
        for _ in range(int(sys.argv[2]) >> 16):
            client.sendall(bytes(1 << 16))
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
"""


def seconds(source: Netns, sink: Netns, address: str, size: int) -> float:
    """How long it takes to send so many bytes."""
    with running(sink, STREAM, "receive"):
        began = time.monotonic()
        source.run("python3", "-IS", "-c", STREAM, address, str(size))
        return time.monotonic() - began


def queues(it: Engine) -> dict[str, tuple[str, int]]:
    """ifb device → its queue and rate in bits a second."""
    found = json.loads(it.node.run("tc", "-j", "qdisc", "show"))
    return {
        each["dev"]: (each["kind"], 8 * each.get("options", {}).get("rate", 0))
        for each in found
        if wire_of(each["dev"])
    }


def chains(it: Engine) -> list[str]:
    """The chains that lead to ifb devices."""
    return re.findall(r"chain (\S+)", it.node.run("nft", "list", "ruleset", "netdev"))


async def host_end(it: Engine, name: str) -> str:
    row = it.journal.get(key(name))
    assert row is not None
    return row.host_ifname


def test_a_wire_is_limited_in_each_direction_and_its_queues_go_with_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (limited, free):
                await it.attachments.add(add_call("limited", limited, bandwidth=LIMITS))
                await it.attachments.add(add_call("free", free))
                to_pod, from_pod = queue_names(await host_end(it, "limited"))
                assert queues(it) == {to_pod: ("tbf", 80 * MBIT), from_pod: ("tbf", 40 * MBIT)}
                size = 2 << 20
                least = {to_pod: (8 * size - 4 * MBIT) / (80 * MBIT), from_pod: (8 * size - 2 * MBIT) / (40 * MBIT)}
                assert seconds(limited, free, "10.244.1.4", size) >= least[from_pod]
                assert seconds(free, limited, "10.244.1.3", size) >= least[to_pod]
                await it.delete("limited")
                await it.reap()
                assert (queues(it), chains(it)) == ({}, [])
                assert it.node.links() == {"pw0", await host_end(it, "free")}

    play(story)


ONE_SIDED = {
    "to the pod": (Bandwidth(ingress_rate=8 * MBIT, ingress_burst=MBIT), {0}),
    "from the pod": (Bandwidth(egress_rate=8 * MBIT, egress_burst=MBIT), {1}),
    "as containerd asks": (Bandwidth(ingress_rate=MBIT, ingress_burst=(1 << 32) - 1), {0}),
    "faster than 32 bits of bytes say": (Bandwidth(egress_rate=80_000 * MBIT, egress_burst=80 * MBIT), {1}),
    "the largest rate": (Bandwidth(ingress_rate=(1 << 64) - 1, ingress_burst=MBIT), {0}),
    "the largest burst": (Bandwidth(egress_rate=1000, egress_burst=8 * ((1 << 32) - 2)), {1}),
}


@pytest.mark.parametrize(("limits", "there"), ONE_SIDED.values(), ids=ONE_SIDED.keys())
def test_a_limit_of_one_direction_is_one_queue_and_check_agrees(
    tmp_path: Path, limits: Bandwidth, there: set[int]
) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                result = json.loads(await it.attachments.add(add_call("pod", pod, bandwidth=limits)))
                names = queue_names(await host_end(it, "pod"))
                assert queues(it).keys() == {names[each] for each in there}
                assert pod.pings("10.244.1.1")
                await it.attachments.check(check_call(pod, result))
                service = AgentService(agent_pb2.GetStatusResponse, it.journal)
                (shown,) = (await service.ListAttachments(agent_pb2.ListAttachmentsRequest(), None)).attachments
                assert shown.bandwidth.ingress_rate == limits.ingress_rate

    play(story)


def check_call(pod: Netns, result: dict[str, Any]) -> Any:
    previous = PreviousResult(
        interfaces=tuple(PreviousInterface(name=each["name"]) for each in result["interfaces"]),
        ips=tuple(PreviousIp(address=each["address"]) for each in result["ips"]),
    )
    made = call("CHECK", "pod", pod.path)
    return msgspec.structs.replace(made, config=msgspec.structs.replace(made.config, previous=previous))


DAMAGE = {
    "another rate": (
        "tc qdisc change dev {0} root tbf rate 1mbit burst 10kb limit 99999",
        "limits packets to the pod to 1000000 bit/s",
    ),
    "no queue": ("tc qdisc del dev {0} root", "{0}, which limits packets to the pod, is gone or has no token bucket"),
    "no device": ("ip link del {1}", "{1}, which limits packets from the pod, is gone"),
    "no way there": ("nft delete table netdev podwire_bandwidth", "packets from the pod are not led to {1}"),
    "a device that is down": ("ip link set {1} down", "{1}, which limits packets from the pod, is down"),
    "a chain without its rule": (
        "nft flush chain netdev podwire_bandwidth out_{2}",
        "packets to the pod are not led to {0}",
    ),
    "a rule before it": (
        "nft insert rule netdev podwire_bandwidth in_{2} accept",
        "packets from the pod are not led to {1}, or not by its rule alone",
    ),
}


@pytest.mark.parametrize(("command", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_somebody_did_to_a_queue_is_seen_by_check_and_mended(tmp_path: Path, command: str, said: str) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                result = json.loads(await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS)))
                host = await host_end(it, "pod")
                names = queue_names(host)
                it.node.run(*command.format(*names, host).split())
                with pytest.raises(CheckFailed, match=re.escape(said.format(*names))):
                    await it.attachments.check(check_call(pod, result))
                await it.reconciler.round()
                await it.attachments.check(check_call(pod, result))
                assert pod.pings("10.244.1.1")

    play(story)


def test_a_queue_whose_wire_is_gone_is_found(tmp_path: Path) -> None:
    """The pod's namespace took the wire with it, and the journal was lost."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (pod, other):
                await it.attachments.add(add_call("other", other, bandwidth=LIMITS))
                kept = queues(it)
                await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                it.node.ip("link", "add", "ifb7", "type", "ifb")
                name = await host_end(it, "pod")
                pod.delete()
                await eventually(lambda: name not in it.node.links())
                it.journal.forget(key("pod"))
                await it.reconciler.round()
                await it.reap()
                assert queues(it) == kept
                assert it.node.links() == {"pw0", await host_end(it, "other"), *kept, "ifb7"}, "others' are left alone"
                assert len(chains(it)) == 2

    play(story)


def test_a_vanished_pod_leaves_no_queue(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                name = await host_end(it, "pod")
                pod.delete()
                await eventually(lambda: name not in it.node.links())
                for _ in range(2):
                    await it.reconciler.round()
                await it.reap()
                assert (it.node.links(), chains(it)) == ({"pw0"}, [])

    play(story)


def test_an_add_that_fails_leaves_no_queue_and_no_chain(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                pod.ip("link", "add", "other0", "up", "type", "veth", "peer", "name", "other1")
                pod.ip("link", "set", "other1", "up")
                pod.ip("route", "add", "default", "dev", "other0")
                with pytest.raises(InterfaceExists, match="a default route already"):
                    await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                assert (it.node.links(), chains(it)) == ({"pw0"}, [])

    play(story)


def test_a_container_that_is_added_again_at_once_has_no_queue_and_no_chain_of_before(tmp_path: Path) -> None:
    """Its ADD deletes the wire that is in the way, which the reaper then finds gone."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                for _ in range(2):
                    await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                    await it.delete("pod")
                await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                await it.reap()
                host = await host_end(it, "pod")
                assert it.node.links() == {"pw0", host, *queue_names(host)}
                assert sorted(chains(it)) == [f"in_{host}", f"out_{host}"]
                assert pod.pings("10.244.1.1")

    play(story)


def test_a_lost_journal_learns_the_limits_from_the_kernel(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                await it.attachments.add(add_call("pod", pod, bandwidth=LIMITS))
                before = it.journal.get(key("pod"))
                it.journal.forget(key("pod"))
                for _ in range(2):
                    await it.reconciler.round()
                after = it.journal.get(key("pod"))
                assert before is not None
                assert after is not None
                for name in ("ingress_rate", "ingress_burst", "egress_rate", "egress_burst"):
                    got, wanted = getattr(after.bandwidth, name), getattr(before.bandwidth, name)
                    assert got == pytest.approx(wanted, rel=0.001), name
                await it.reconciler.round()
                assert not it.metrics.recent or "queue" not in str(it.metrics.recent[-1])

    play(story)


def test_a_burst_that_no_packet_fits_into_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                tiny = Bandwidth(egress_rate=MBIT, egress_burst=8000)
                with pytest.raises(InvalidConfig, match="egressBurst is 8000 bits, expected 11712 at least"):
                    await it.attachments.add(add_call("pod", pod, bandwidth=tiny))
                assert (it.journal.attachments(), pod.links(), it.counts()["used"]) == ((), set(), 0)

    play(story)


def bursts(it: Engine) -> dict[str, int]:
    """ifb device → the burst of its queue in bytes, which tc rounds to what the rate sends in a microsecond."""
    found = json.loads(it.node.run("tc", "-j", "qdisc", "show"))
    return {each["dev"]: each["options"]["burst"] for each in found if wire_of(each["dev"])}


def test_a_burst_grows_with_the_mtu_and_shrinks_with_it(tmp_path: Path) -> None:
    """A packet that does not fit into it would never be sent, and nobody would be told."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (pod,):
                small = msgspec.structs.replace(LIMITS, egress_burst=12_000)
                result = json.loads(await it.attachments.add(add_call("pod", pod, bandwidth=small)))
                to_pod, from_pod = queue_names(await host_end(it, "pod"))
                as_asked = {to_pod: 4 * MBIT // 8, from_pod: 1500}
                for mtu, size, expected in ((8950, 8900, {**as_asked, from_pod: 8964}), (1400, 1300, as_asked)):
                    await it.attachments.resize(mtu, only_shrink=True)
                    it.node.ip("link", "set", "pw0", "mtu", str(mtu))
                    await it.attachments.resize(mtu)
                    assert bursts(it) == pytest.approx(expected, abs=9)
                    await it.attachments.check(check_call(pod, result))
                    assert "1 received" in pod.run(*f"ping -nc1 -W10 -Mdo -s{size} 10.244.1.1".split())
                it.node.run(*f"tc qdisc del dev {from_pod} root".split())
                await it.attachments.resize(8950)
                await it.reconciler.round()
                assert bursts(it)[from_pod] == pytest.approx(8964, abs=9), "it is made for the MTU that is there"

    play(story)
