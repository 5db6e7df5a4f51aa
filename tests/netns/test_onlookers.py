"""Who else looks at the packets of a link, as `tc`, `nft` and `ip xfrm` put them there.

Each case is a link of its own, in one namespace: what is said of one must not be said of another.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.netlink import index_of
from ipam_daemon.onlookers import Onlookers, between_nodes, has_ipsec
from podwire.nfelements import Family, Table
from podwire.nfnetlink import Step
from podwire.nlattr import attribute, nested
from tests.netns.node_fixtures import Node, play

LIMIT = "tbf rate 10mbit burst 32k latency 50ms"
TAKES_ALL = "protocol all u32 match u32 0 0"
CHAIN = "table {family} {table} {{ chain {table} {{ type filter hook {hook} {devices} priority 0; }}; }}"


def queue(kind: str) -> str:
    return f"it has a queueing discipline of somebody else ({kind})"


EACH = Path("/proc/sys/net/core/default_qdisc").read_text().strip()
"""What the queues of several processors are."""


class Case(NamedTuple):
    """What `tc` has done to a link; what is said of it where what it sends counts, and where that does not; the filters
    that it has, None for one without a place for them."""

    done: tuple[str, ...]
    sending: str = ""
    taking_in: str = ""
    filters: frozenset[str] | None = None


CASES = {
    "as it was made": Case(()),
    "the queue that other links have": Case(("qdisc replace dev {} root pfifo_fast",), sending=queue("pfifo_fast")),
    "queues of several processors": Case(("qdisc replace dev {} root mq",), sending=queue(min("mq", EACH))),
    "a short queue": Case(("qdisc replace dev {} root pfifo limit 3",), sending=queue("pfifo")),
    "a queue that is gone again": Case(("qdisc replace dev {} root pfifo", "qdisc delete dev {} root")),
    "a limit": Case((f"qdisc replace dev {{}} root {LIMIT}",), sending=queue("tbf")),
    "classes": Case(("qdisc replace dev {} root handle 1: htb",), sending=queue("htb")),
    "a limit below classes": Case(
        (
            "qdisc replace dev {} root handle 1: htb default 1",
            "class add dev {} parent 1: classid 1:1 htb rate 10mbit",
            f"qdisc add dev {{}} parent 1:1 {LIMIT}",
        ),
        sending=queue("htb"),
    ),
    "the older place for filters": Case(("qdisc add dev {} ingress",), queue("ingress"), queue("ingress")),
    "a place for filters, and none": Case(("qdisc add dev {} clsact",), filters=frozenset()),
    "a filter of what comes in": Case(
        ("qdisc add dev {} clsact", f"filter add dev {{}} ingress {TAKES_ALL}"), filters=frozenset({""})
    ),
    "a filter of what goes out": Case(
        ("qdisc add dev {} clsact", f"filter add dev {{}} egress {TAKES_ALL}"), filters=frozenset({""})
    ),
    "a place for filters, and a limit": Case(
        ("qdisc add dev {} clsact", f"qdisc replace dev {{}} root {LIMIT}"), queue("tbf"), "", frozenset()
    ),
}


@asynccontextmanager
async def links(number: int) -> AsyncIterator[tuple[Node, list[str]]]:
    """A node with so many links, which have two queues each."""
    async with Node() as node:
        names = [f"link{each}" for each in range(number)]
        for name in names:
            node.ip("link", "add", name, "numtxqueues", "2", "type", "veth", "peer", "name", f"{name}-peer")
            node.ip("link", "set", name, "up")  # one that is down has no queue
        yield node, names


def test_what_tc_put_there_is_seen_at_its_link() -> None:
    async def story() -> None:
        async with links(len(CASES)) as (node, names):
            for name, case in zip(names, CASES.values(), strict=True):
                for words in case.done:
                    node.run("tc", *words.format(name).split())

            def look() -> dict[str, Case]:
                onlookers, found = Onlookers(node.thread), {}
                for name, (title, case) in zip(names, CASES.items(), strict=True):
                    index = index_of(name)
                    assert onlookers.is_there(index), title
                    assert onlookers.has_filters(index) == (index in onlookers.with_filters()), title
                    found[title] = Case(
                        case.done,
                        onlookers.of(index, name, sends=True),
                        onlookers.of(index, name, sends=False),
                        onlookers.filters(index) if onlookers.has_filters(index) else None,
                    )
                assert not onlookers.is_there(max(map(index_of, names)) + 100)
                return found

            assert await node.thread.run(look) == CASES

    play(story)


AT_DEVICES = [("netdev", "ingress"), ("netdev", "egress"), ("inet", "ingress")]


@pytest.mark.parametrize(("family", "hook"), AT_DEVICES)
def test_nft_chains_are_seen_at_each_of_their_devices(family: str, hook: str) -> None:
    async def story() -> None:
        async with links(5) as (node, names):

            def watched() -> list[str]:
                onlookers = Onlookers(node.thread)
                found = {
                    name: onlookers.of(index_of(name), name, sends=sends) for sends in (False, True) for name in names
                }
                assert set(found.values()) <= {"", f"it has an nft chain of family {family}"}
                return [name for name, why in found.items() if why]

            assert await node.thread.run(watched) == []
            for table, devices in (
                ("one", "device link1"),
                ("several", "devices = { link2, link3 }"),
                ("again", "device link3"),
            ):
                node.run("nft", "-f", "-", stdin=CHAIN.format(family=family, table=table, hook=hook, devices=devices))
            assert await node.thread.run(watched) == ["link1", "link2", "link3"]
            node.run("nft", f"delete table {family} one; delete table {family} again")
            assert await node.thread.run(watched) == ["link2", "link3"]
            node.run("nft", f"delete table {family} several")
            assert await node.thread.run(watched) == []

    play(story)


def at_all(beginning: str) -> tuple[Step, ...]:
    """A table of a chain at all interfaces whose names begin so, which nft writes as "…*"."""
    number = struct.Struct("!I")
    devices = nested(4, attribute(2, beginning.encode() + b"\0"))
    hook = attribute(1, number.pack(0)) + attribute(2, number.pack(0)) + devices
    chain = attribute(1, b"wild\0") + attribute(3, b"look\0") + nested(4, hook) + attribute(7, b"filter\0")
    return Step(0xA00, 0x400, attribute(1, b"wild\0")), Step(0xA03, 0x400, chain)


def test_nft_chains_are_seen_at_all_devices_whose_names_begin_as_theirs() -> None:
    async def story() -> None:
        async with links(12) as (node, names):

            def watched() -> list[str]:
                node.thread.nftables.carry_out(Table(Family.NETDEV, "wild"), at_all("link1"))
                onlookers = Onlookers(node.thread)
                return [name for name in names if onlookers.of(index_of(name), name, sends=True)]

            try:
                found = await node.thread.run(watched)
            except PlumbingFailed as error:
                pytest.skip(f"needs nft chains at wildcards (Linux 6.18): {error}")
            assert found == ["link1", "link10", "link11"]

    play(story)


@pytest.mark.parametrize("way", ["in", "out", "fwd"])
def test_a_policy_of_ipsec_is_one_of_the_node(way: str) -> None:
    policy = ("src", "10.0.0.0/8", "dst", "10.0.0.0/8", "dir", way)

    async def story() -> None:
        async with Node() as node, Node("other") as other:
            assert not await node.thread.run(has_ipsec)
            node.ip("xfrm", "policy", "add", *policy, "action", "block")
            assert await node.thread.run(has_ipsec)
            assert not await other.thread.run(has_ipsec)
            node.ip("xfrm", "policy", "delete", *policy)
            assert not await node.thread.run(has_ipsec)

    play(story)


RULES = {
    "a mark": ("fwmark 7 lookup 77", True),
    "a mark, of IPv6": ("-6 fwmark 7 lookup 77", True),
    "some bits of it": ("fwmark 0x80000/0xff0000 lookup main", True),
    "that some bits are not set": ("fwmark 0/0xff lookup 77", True),
    "another mark": ("not fwmark 7 lookup 77", True),
    "a source": ("from 192.0.2.0/24 lookup 77", False),
    "an interface, of IPv6": ("-6 iif lo lookup 77", False),
}


def test_routing_rules_that_ask_for_a_mark_are_of_the_node() -> None:
    async def story() -> None:
        async with Node() as node, Node("other") as other:

            async def said(of: Node) -> str:
                return await of.thread.run(lambda: between_nodes(of.thread.channel))

            for name, (rule, by_mark) in RULES.items():
                words = rule.split()
                family, about = (["-6"], words[1:]) if words[0] == "-6" else ([], words)
                assert await said(node) == "", name
                node.ip(*family, "rule", "add", *about)
                assert (await said(node) == "the node has routing rules that ask for a mark") == by_mark, name
                assert await said(other) == "", name
                node.ip(*family, "rule", "delete", *about)

    play(story)
