"""Connections that conntrack remembers, and the ports of the node that they were sent to."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipam_daemon.conntrack
import podwire.conntrack
from tests.netns.hostport_fixtures import NODE, OUTSIDE, add_call, ask, dual_stack, mapping, running, serving
from tests.netns.node_fixtures import Netns, play, pods
from tests.netns.test_hostports import RAW_SCTP, UDP_CLIENT, ids

STATEFUL = """
table inet somebody {
    chain first {
        type filter hook prerouting priority 0
        ct state established accept
    }
}
"""
DAMAGE = {
    "the whole ruleset flushed": f"flush ruleset\n{STATEFUL}",
    "the table deleted": "delete table inet podwire_hostports",
    "a map flushed": "flush map inet podwire_hostports any4",
    "a chain flushed": "flush chain inet podwire_hostports prerouting",
    "a port that leads elsewhere": (
        "delete element inet podwire_hostports any4 { udp . 8080 }\n"
        "add element inet podwire_hostports any4 { udp . 8080 : 10.244.1.1 . 81 }"
    ),
}


@pytest.mark.parametrize("script", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_udp_client_that_sent_before_the_repair_meets_the_pod_after_it(tmp_path: Path, script: str) -> None:
    """What was decided for its first packet would hold for as long as it sends."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (web,), serving(web, "web", 80), running(outside, UDP_CLIENT, NODE[4]) as client:
                it.node.run("nft", "-f", "-", stdin=STATEFUL)  # so that conntrack is on, whoever flushes what is ours
                await it.attachments.add(add_call("web", web, mapping(8080, protocol="udp")))
                it.node.run("nft", "-f", "-", stdin=script)
                client.say()
                heard = client.hear()
                assert heard != f"web {OUTSIDE[4]}"
                await it.reconciler.round()
                client.say()
                assert client.hear() == f"web {OUTSIDE[4]}"

    play(story)


def test_a_repair_leaves_connections_alone_that_lead_to_the_pod(tmp_path: Path) -> None:
    """Also when all rules were replaced, as by a daemon of another version: SCTP would wait for its next heartbeat."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(1) as (web,), serving(web, "web", 80), running(outside, UDP_CLIENT, NODE[4]) as client:
                await it.attachments.add(add_call("web", web, mapping(8080, protocol="udp")))
                client.say()
                assert client.hear() == f"web {OUTSIDE[4]}"
                listed = ("conntrack", "-L", "-p", "udp", "--orig-port-dst", "8080", "-o", "id,extended")
                before = ids(it.node.run(*listed, check=False))
                it.node.run("nft", "flush", "chain", "inet", "podwire_hostports", "shape")
                assert await it.attachments.mend_host_ports() == 1
                assert ids(it.node.run(*listed, check=False)) == before != []

    play(story)


def test_an_sctp_client_with_a_port_of_its_own_meets_the_next_pod(tmp_path: Path) -> None:
    """As signalling is configured, from 2905 to 2905: when the next pod is there, the client begins anew."""

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (first, second):
                for name, pod in (("first", first), ("second", second)):
                    await it.attachments.add(add_call(name, pod, mapping(2905, 2906, "sctp")))
                    it.node.run("sysctl", "-q", "-w", "net.netfilter.nf_conntrack_sctp_timeout_cookie_wait=600")
                    with running(pod, RAW_SCTP, "receive") as receiver:
                        outside.run("python3", "-IS", "-c", RAW_SCTP, "send", NODE[4], "2905")
                        assert receiver.hear() == f"{OUTSIDE[4]} 2906", name
                    await it.delete(name)

    play(story)


@pytest.mark.parametrize(("worth", "walks"), [(1000, 2), (0, 40)], ids=["a small table", "a large one"])
def test_many_ports_are_one_walk_over_the_kernels_table_while_that_is_cheaper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: int, walks: int
) -> None:
    """A walk takes milliseconds in which no other pod of the node is served. Exactly what it is about is forgotten."""
    began: list[int] = []
    dump = podwire.conntrack.dump

    def counting(channel: socket.socket, family: int, filters: bytes = b"") -> Iterator[dict[int, bytes]]:
        began.append(family)
        return dump(channel, family, filters)

    async def story() -> None:
        async with dual_stack(tmp_path) as (it, outside):
            with pods(2) as (web, other), serving(web, "web", 80), serving(other, "other", 80):
                await it.attachments.add(add_call("other", other, mapping(9000, protocol="udp")))
                many = [mapping(port, protocol="udp") for port in range(8000, 8020)]
                await it.attachments.add(add_call("web", web, *many))
                for version, port, name in ((4, 8000, "web"), (4, 8019, "web"), (4, 9000, "other")):
                    assert ask(outside, NODE[version], port, "udp") == f"{name} {OUTSIDE[version]}"
                assert remembered(it.node) == {8000, 8019, 9000}
                monkeypatch.setattr(podwire.conntrack, "dump", counting)
                monkeypatch.setattr(ipam_daemon.conntrack, "_WORTH_A_WALK", worth)
                await it.delete("web")
                assert remembered(it.node) == {9000}
                assert len(began) == walks, "a walk for each family, and for each port where the table is large"

    play(story)


def remembered(node: Netns) -> set[int]:
    """The ports that UDP was sent to, of both families."""
    listed = [node.run("conntrack", "-L", "-f", family, "-p", "udp", check=False) for family in ("ipv4", "ipv6")]
    return {int(port) for line in "".join(listed).splitlines() for port in re.findall(r" dport=(\d+)", line)[:1]}
