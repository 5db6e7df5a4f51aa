"""nft elements as packed messages: nft lists what was added, all of it or nothing, and an error names its element.

Each test has a namespace of its own, in which the messages' thread lives and nft is run.
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from ipam_daemon.errors import PlumbingFailed
from podwire.nfelements import ACCEPT, DROP, Change, Family, Table, Verdict, add, concat, delete, goto, ifname, jump
from podwire.nfnetlink import ElementRefused, Interfaces, Nftables
from tests.netns.node_fixtures import Node, play

T = TypeVar("T")
BRIDGE, INET, IP, IP6 = (Table(family, "packed") for family in (Family.BRIDGE, Family.INET, Family.IP, Family.IP6))
RULESET = """
table bridge packed {
    set bound { type ifname . ether_addr . ipv4_addr; }
    counter seen { packets 7 bytes 70; }
    chain first { counter comment "abc"; accept; }
    chain second { counter name seen comment "def"; }
}
table inet packed {
    map ports { type inet_proto . inet_service : ipv4_addr . inet_service; }
    map verdicts { type inet_service : verdict; }
    chain target { accept; }
}
table ip packed { set addresses { type ipv4_addr; }; }
table ip6 packed { set addresses { type ipv6_addr; }; }
table ip bystander { set addresses { type ipv4_addr; elements = { 192.0.2.9 }; }; }
"""


class Stage:
    """A namespace with the tables above."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def ask(self, question: Callable[[Nftables], T]) -> T:
        return await self.node.thread.run(lambda: question(self.node.thread.nftables))

    async def commit(self, *changes: Change, limit: int = 1 << 22) -> None:
        await self.ask(lambda nftables: nftables.commit(changes, limit))

    def listed(self, table: Table, name: str, kind: str = "set") -> list[Any]:
        """The elements as nft lists them."""
        words = ("nft", "-j", "list", kind, *str(table).split(), name)
        found = json.loads(self.node.run(*words))["nftables"]
        elements: list[Any] = next(each[kind] for each in found if kind in each).get("elem", [])
        return elements


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    async with Node() as node:
        node.run("nft", "-f", "-", stdin=RULESET)
        yield Stage(node)


def address(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def binding(number: int) -> bytes:
    mac = bytes.fromhex("0a580af40100")
    return concat(ifname(f"pw{number:012x}"), mac, (0x0AF40000 + number).to_bytes(4, "big"))


HTTP = concat(b"\x06", (80).to_bytes(2, "big"))
ELEMENTS: dict[str, tuple[Change, str, list[Any]]] = {
    "an IPv4 address": (add(IP, "addresses", address("192.0.2.1")), "set", ["192.0.2.1"]),
    "an IPv6 address": (add(IP6, "addresses", address("2001:db8::1")), "set", ["2001:db8::1"]),
    "interface, MAC and address, in a bridge": (
        add(BRIDGE, "bound", concat(ifname("pw0123456789ab"), bytes.fromhex("0a580af40103"), address("10.244.1.3"))),
        "set",
        [{"concat": ["pw0123456789ab", "0a:58:0a:f4:01:03", "10.244.1.3"]}],
    ),
    "data of several fields": (
        add(INET, "ports", HTTP, concat(address("10.244.1.3"), (8080).to_bytes(2, "big"))),
        "map",
        [[{"concat": ["tcp", 80]}, {"concat": ["10.244.1.3", 8080]}]],
    ),
    "a verdict": (add(INET, "verdicts", (81).to_bytes(2, "big"), DROP), "map", [[81, {"drop": None}]]),
    "the other verdict": (add(INET, "verdicts", (82).to_bytes(2, "big"), ACCEPT), "map", [[82, {"accept": None}]]),
    "a jump": (
        add(INET, "verdicts", (83).to_bytes(2, "big"), jump("target")),
        "map",
        [[83, {"jump": {"target": "target"}}]],
    ),
    "a goto": (
        add(INET, "verdicts", (84).to_bytes(2, "big"), goto("target")),
        "map",
        [[84, {"goto": {"target": "target"}}]],
    ),
}


@pytest.mark.parametrize(("change", "kind", "expected"), ELEMENTS.values(), ids=ELEMENTS.keys())
def test_nft_lists_what_was_added(change: Change, kind: str, expected: list[Any]) -> None:
    async def story() -> None:
        async with stage() as it:
            await it.commit(change)
            assert it.listed(change.table, change.set, kind) == expected
            found = await it.ask(lambda nftables: nftables.elements(change.table, change.set))
            assert found == {change.key: change.data}, "and it is read back as it was said"
            await it.commit(change)
            assert it.listed(change.table, change.set, kind) == expected, "it may be said again"
            for _ in range(2):
                await it.commit(delete(change.table, change.set, change.key))
                assert it.listed(change.table, change.set, kind) == [], "it may be gone already"

    play(story)


def test_a_thousand_elements_are_one_transaction() -> None:
    async def story() -> None:
        async with stage() as it:
            bound = {binding(number) for number in range(1000)}
            await it.commit(*(add(BRIDGE, "bound", key) for key in bound))
            assert len(it.listed(BRIDGE, "bound")) == 1000
            found = await it.ask(lambda nftables: nftables.elements(BRIDGE, "bound"))
            assert found is not None
            assert found.keys() == bound
            await it.commit(*(delete(BRIDGE, "bound", binding(number)) for number in range(500, 3000)))
            assert len(it.listed(BRIDGE, "bound")) == 500, "most were not there to be deleted"

    play(story)


def test_more_than_the_socket_takes_is_split() -> None:
    async def story() -> None:
        async with stage() as it:
            await it.commit(*(add(BRIDGE, "bound", binding(number)) for number in range(300)), limit=10_000)
            assert len(it.listed(BRIDGE, "bound")) == 300

    play(story)


def test_an_exchange_of_data_is_one_transaction() -> None:
    async def story() -> None:
        async with stage() as it:
            await it.commit(add(INET, "verdicts", b"\0\x50", DROP))
            await it.commit(delete(INET, "verdicts", b"\0\x50"), add(INET, "verdicts", b"\0\x50", ACCEPT))
            assert it.listed(INET, "verdicts", "map") == [[80, {"accept": None}]]

    play(story)


ABSENT = add(BRIDGE, "nowhere", binding(1))
REFUSED: dict[str, tuple[Change, set[int]]] = {
    "a set that is not there": (ABSENT, {errno.ENOENT}),
    "a table that is not there": (add(Table(Family.INET, "nowhere"), "bound", binding(1)), {errno.ENOENT}),
    "a chain that is not there": (add(INET, "verdicts", b"\0\x51", jump("nowhere")), {errno.ENOENT}),
    "other data under the key": (add(INET, "verdicts", b"\0\x50", ACCEPT), {errno.EEXIST, errno.EBUSY}),
    "a key of another length": (add(BRIDGE, "bound", b"1234"), {errno.EINVAL}),
    "data in a set": (add(IP, "addresses", address("192.0.2.1"), b"1234"), {errno.EINVAL}),
}


@pytest.mark.parametrize(("wrong", "numbers"), REFUSED.values(), ids=REFUSED.keys())
def test_all_or_nothing_and_the_error_names_the_element(wrong: Change, numbers: set[int]) -> None:
    async def story() -> None:
        async with stage() as it:
            await it.commit(add(INET, "verdicts", b"\0\x50", DROP))
            good = [add(BRIDGE, "bound", binding(number)) for number in range(3)]
            absent = delete(BRIDGE, "bound", binding(9))
            with pytest.raises(PlumbingFailed) as caught:
                await it.ask(lambda nftables: nftables.commit([*good[:2], absent, wrong, good[2]]))
            refused = caught.value.__cause__
            assert isinstance(refused, ElementRefused)
            assert refused.change == wrong
            assert refused.errno in numbers
            assert str(wrong) in str(refused)
            assert it.listed(BRIDGE, "bound") == []
            await it.commit(*good)
            assert len(it.listed(BRIDGE, "bound")) == 3, "the socket goes on working"

    play(story)


def test_nothing_is_nothing() -> None:
    async def story() -> None:
        async with stage() as it:
            await it.commit()
            await it.commit(delete(BRIDGE, "nowhere", binding(1)), delete(BRIDGE, "bound", binding(1)))
            assert it.node.run("nft", "list", "table", "ip", "bystander").count("192.0.2.9") == 1

    play(story)


def test_rules_and_counters_are_read_back() -> None:
    async def story() -> None:
        async with stage() as it:
            assert await it.ask(lambda n: n.rules(BRIDGE)) == [("first", "abc"), ("first", ""), ("second", "def")]
            assert await it.ask(lambda n: n.counters(BRIDGE)) == {"seen": 7}
            nowhere = Table(Family.BRIDGE, "nowhere")
            assert await it.ask(lambda n: n.rules(nowhere)) == []
            assert await it.ask(lambda n: n.counters(nowhere)) == {}
            assert await it.ask(lambda n: n.elements(nowhere, "bound")) is None
            assert await it.ask(lambda n: n.elements(BRIDGE, "nowhere")) is None
            assert await it.ask(lambda n: n.elements(BRIDGE, "bound")) == {}

    play(story)


def test_an_interface_name_that_is_too_long_is_no_key() -> None:
    with pytest.raises(ValueError, match="at most 15"):
        ifname("x" * 16)


def test_a_verdict_is_told_apart_from_data() -> None:
    assert jump("a") != goto("a")
    assert Verdict(0) == DROP


# --- while others change something --------------------------------------------------------------------------------


class Busy:
    """A socket in whose namespace something changes each time that it is read."""

    def __init__(self, given: socket.socket, change: Callable[[], None]) -> None:
        self._given, self._change = given, change

    def send(self, data: bytes) -> int:
        return self._given.send(data)

    def recv(self, size: int) -> bytes:
        self._change()
        return self._given.recv(size)

    def close(self) -> None:
        self._given.close()


MANY = "table inet many {{ {chains} chain last {{ type filter hook ingress device lo priority 0; }}; }}"


def test_interfaces_with_chains_are_found_while_something_changes_all_the_time() -> None:
    """Where another listing gives up: the fast path must not wait for a node to be quiet."""

    async def story() -> None:
        async with stage() as it:
            it.node.run("nft", "-f", "-", stdin=MANY.format(chains="".join(f"chain c{n} {{ }}; " for n in range(1000))))
            changing = await it.ask(lambda _: Nftables())
            busy = await it.ask(lambda _: Nftables())
            numbers = itertools.count()

            def change() -> None:
                changing.commit([add(BRIDGE, "bound", binding(next(numbers)))])

            busy._socket = Busy(busy._socket, change)  # type: ignore[assignment]
            try:
                with pytest.raises(PlumbingFailed, match="Interrupted"):
                    await it.ask(lambda _: busy.chains(INET))
                assert await it.ask(lambda _: busy.devices(Family.INET)) == Interfaces(frozenset({"lo"}))
                assert await it.ask(lambda _: busy.devices(Family.NETDEV)) == Interfaces()
            finally:
                busy.close()
                changing.close()

    play(story)
