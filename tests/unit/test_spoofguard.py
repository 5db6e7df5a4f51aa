"""The spoof guard's text and elements: from an attachment to what nft is told. What packets make of it is in netns."""

from __future__ import annotations

import ipaddress
from itertools import pairwise
from pathlib import Path

import pytest

from ipam_daemon.model import Attachment, AttachmentKey
from ipam_daemon.spoofguard import (
    LEARNT,
    RULES,
    SETS,
    Element,
    elements,
    link_local,
    parse_shape,
    port_of,
    render,
    shape,
    text,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "spoofguard.nft"
PORT, MAC = "pw0123456789ab", "0a:58:0a:f4:01:03"


def attachment(*addresses: str, mac: str = MAC) -> Attachment:
    return Attachment(
        key=AttachmentKey("podnet", "c", "eth0"),
        netns="/run/netns/c",
        host_ifname=PORT,
        mac=mac,
        mtu=1450,
        addresses=tuple(map(ipaddress.ip_interface, addresses)),
        created=0.0,
        created_ns=0,
    )


def test_the_whole_table_as_it_is_made() -> None:
    """After a change that is meant, the golden file is what this test's failure shows."""
    assert render(elements(attachment("10.244.1.3/24", "fd00:1::3/120"))) == GOLDEN.read_text(encoding="utf-8")


LOCAL = {
    f'bound6 "{PORT}" . {MAC} . fe80::858:aff:fef4:103',
    f'targets6 "{PORT}" . 0xfe8000000000000008580afffef40103',
    f'macs "{PORT}" . {MAC}',
    f'options6 "{PORT}" . 0x0a580af40103',
}
ATTACHMENTS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "IPv4": (("10.244.1.3/24",), {f'bound4 "{PORT}" . {MAC} . 10.244.1.3'}),
    "IPv6": (
        ("fd00:1::3/120",),
        {f'bound6 "{PORT}" . {MAC} . fd00:1::3', f'targets6 "{PORT}" . 0xfd000001000000000000000000000003'},
    ),
    "two of a family": (
        ("10.244.1.3/24", "10.245.0.9/24"),
        {f'bound4 "{PORT}" . {MAC} . 10.244.1.3', f'bound4 "{PORT}" . {MAC} . 10.245.0.9'},
    ),
    "none": ((), set()),
}


@pytest.mark.parametrize(("addresses", "expected"), ATTACHMENTS.values(), ids=ATTACHMENTS.keys())
def test_what_a_wire_may_send_as(addresses: tuple[str, ...], expected: set[str]) -> None:
    found = elements(attachment(*addresses))
    assert {f"{each.set} {text(each)}" for each in found} == expected | LOCAL
    assert {port_of(each) for each in found} == {PORT}


@pytest.mark.parametrize(
    ("mac", "expected"),
    [
        ("0a:58:0a:f4:01:03", "fe80::858:aff:fef4:103"),
        ("02:00:00:00:00:01", "fe80::ff:fe00:1"),
        ("34:56:78:9a:bc:de", "fe80::3656:78ff:fe9a:bcde"),  # RFC 4291, appendix A inverts the universal bit
    ],
)
def test_the_link_local_address_of_a_mac(mac: str, expected: str) -> None:
    assert link_local(mac) == ipaddress.ip_address(expected)


def listed() -> list[tuple[str, str]]:
    rules = [(chain, "") for chain, found in RULES.items() for _ in found]
    return [*rules, ("shape", shape().mark)]


CHAINS = {**dict.fromkeys(RULES), "shape": None, "prerouting": True, "forward": True}
SHAPES: dict[str, tuple[list[tuple[str, str]], dict[str, bool | None]]] = {
    "without its mark": (listed()[:-1], CHAINS),
    "a rule short": (listed()[1:], CHAINS),
    "of another version": ([*listed()[:-1], ("shape", "another")], CHAINS),
    "without rules": ([], CHAINS),
    "a chain that drops what is left": (listed(), {**CHAINS, "forward": False}),
    "a chain that is not hooked in": (listed(), {**CHAINS, "prerouting": None}),
}


def test_the_shape_is_the_mark_the_number_of_rules_in_each_chain_and_their_hooks() -> None:
    assert parse_shape(listed(), CHAINS) == shape()


@pytest.mark.parametrize(("rules", "chains"), SHAPES.values(), ids=SHAPES.keys())
def test_a_table_of_another_shape(rules: list[tuple[str, str]], chains: dict[str, bool | None]) -> None:
    assert parse_shape(rules, chains) != shape()


def test_a_set_that_is_learnt_otherwise_is_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shape()
    monkeypatch.setitem(LEARNT, "routers", "type ifname; flags dynamic")
    assert shape() != before


def test_every_rule_knows_the_chains_and_sets_that_it_names() -> None:
    known: set[str] = set()
    for chain, rules in RULES.items():
        for rule in rules:
            words = rule.split()
            assert {target for word, target in pairwise(words) if word == "goto"} <= known
            assert {word[1:] for word in words if word.startswith("@") and "," not in word} <= {*SETS, *LEARNT}
        known.add(chain)


def test_an_element_is_text_and_bytes_of_the_same() -> None:
    key = PORT.encode().ljust(16, b"\0") + bytes.fromhex("0a580af40103") + b"\0\0" + bytes([10, 244, 1, 3])
    assert Element("bound4", key) in elements(attachment("10.244.1.3/24"))
