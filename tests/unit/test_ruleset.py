"""The firewall's text: from a plan and what the kernel has to one transaction, and back from nft's listing."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from ipam_daemon.plan import FirewallPlan
from ipam_daemon.ruleset import FirewallState, chains_hash, desired, parse_listing, render, render_vteps

GOLDEN = Path(__file__).parent.parent / "golden" / "firewall.nft"
EMPTY = FirewallState(chains="", elements={})


def plan(
    blocks: tuple[str, ...] = ("10.244.1.0/24",),
    vteps: tuple[str, ...] | None = ("192.0.2.2", "2001:db8::2"),
    port: int = 4789,
) -> FirewallPlan:
    return FirewallPlan(
        local_blocks=frozenset(map(ipaddress.ip_network, blocks)),
        unmasqueraded=frozenset(map(ipaddress.ip_network, ("10.244.0.0/16", "224.0.0.0/4", "ff00::/8"))),
        vteps=None if vteps is None else frozenset(map(ipaddress.ip_address, vteps)),
        vxlan_port=port,
    )


def test_the_whole_table_as_it_is_made() -> None:
    """After a change that is meant, the golden file is what this test's failure shows."""
    assert render(plan(), EMPTY) == GOLDEN.read_text(encoding="utf-8")


def test_what_is_there_is_not_sent_again() -> None:
    assert render(plan(), desired(plan())) == ""


CHANGES: dict[str, tuple[FirewallPlan, FirewallPlan, list[str]]] = {
    "a peer that joins is one element": (
        plan(vteps=("192.0.2.2",)),
        plan(vteps=("192.0.2.2", "192.0.2.3")),
        ["add element inet podwire vteps4 { 192.0.2.3 }"],
    ),
    "a peer that leaves is one element": (
        plan(vteps=("192.0.2.2", "2001:db8::2")),
        plan(vteps=("192.0.2.2",)),
        ["delete element inet podwire vteps6 { 2001:db8::2 }"],
    ),
    "a block that is exchanged": (
        plan(),
        plan(blocks=("10.244.9.0/24",)),
        [
            "delete element inet podwire local_blocks4 { 10.244.1.0/24 }",
            "add element inet podwire local_blocks4 { 10.244.9.0/24 }",
        ],
    ),
    "peers that are not known leave the kernel's": (plan(), plan(vteps=None), []),
    "a block of one address": (
        plan(blocks=()),
        plan(blocks=("10.244.1.7/32",)),
        ["add element inet podwire local_blocks4 { 10.244.1.7 }"],
    ),
}


@pytest.mark.parametrize(("before", "after", "lines"), CHANGES.values(), ids=CHANGES.keys())
def test_only_what_differs_is_sent(before: FirewallPlan, after: FirewallPlan, lines: list[str]) -> None:
    assert render(after, desired(before)).splitlines() == lines


FROM_PLAN_TO_PLAN: dict[str, tuple[FirewallPlan, FirewallPlan, list[str]]] = {
    "a node joins": (
        plan(vteps=("192.0.2.2",)),
        plan(vteps=("192.0.2.2", "2001:db8::3")),
        ["add element inet podwire vteps6 { 2001:db8::3 }"],
    ),
    "one leaves as another joins": (
        plan(vteps=("192.0.2.2", "192.0.2.3")),
        plan(vteps=("192.0.2.3", "192.0.2.4")),
        ["delete element inet podwire vteps4 { 192.0.2.2 }", "add element inet podwire vteps4 { 192.0.2.4 }"],
    ),
    "nothing": (plan(), plan(), []),
    "another block, too: that is not for the short way": (plan(), plan(blocks=("10.244.9.0/24",), vteps=()), []),
    "the peers were not known before": (plan(vteps=None), plan(), []),
    "the peers are not known any more": (plan(), plan(vteps=None), []),
}


@pytest.mark.parametrize(("before", "after", "lines"), FROM_PLAN_TO_PLAN.values(), ids=FROM_PLAN_TO_PLAN.keys())
def test_nodes_that_come_and_go_need_no_listing(before: FirewallPlan, after: FirewallPlan, lines: list[str]) -> None:
    assert render_vteps(before, after).splitlines() == lines


def test_another_port_replaces_the_chains_and_keeps_the_elements() -> None:
    lines = render(plan(port=8472), desired(plan(port=4789))).splitlines()
    assert "flush chain inet podwire vxlan_in" in lines
    assert not [line for line in lines if "element" in line]
    assert [line for line in lines if "udp dport 8472" in line]
    assert chains_hash(4789) != chains_hash(8472)


def test_nothing_of_others_is_named() -> None:
    for line in render(plan(), EMPTY).splitlines():
        assert " inet podwire" in line
        assert not line.startswith(("flush ruleset", "delete table", "flush table"))


def listing(*items: dict[str, Any]) -> dict[str, Any]:
    return {"nftables": [{"metainfo": {"json_schema_version": 1}}, {"table": {"name": "podwire"}}, *items]}


ELEMENTS: dict[str, tuple[Any, str]] = {
    "an address": ("192.0.2.2", "192.0.2.2"),
    "a prefix": ({"prefix": {"addr": "10.244.0.0", "len": 16}}, "10.244.0.0/16"),
    "a range of somebody else": ({"range": ["10.0.0.1", "10.0.0.5"]}, "10.0.0.1-10.0.0.5"),
    "with a comment": ({"elem": {"val": "192.0.2.2", "comment": "x"}}, "192.0.2.2"),
    "a prefix with a counter": (
        {"elem": {"val": {"prefix": {"addr": "ff00::", "len": 8}}, "counter": {"packets": 0, "bytes": 0}}},
        "ff00::/8",
    ),
}


@pytest.mark.parametrize(("element", "expected"), ELEMENTS.values(), ids=ELEMENTS.keys())
def test_elements_as_nft_lists_them(element: Any, expected: str) -> None:
    state = parse_listing(listing({"set": {"name": "vteps4", "elem": [element]}}))
    assert state.elements == {"vteps4": frozenset({expected})}


def test_the_shape_is_the_mark_and_the_number_of_rules() -> None:
    marked = {"rule": {"chain": "shape", "comment": "abc", "expr": []}}
    other = {"rule": {"chain": "postrouting", "expr": []}}
    assert parse_listing(listing(marked, other, other)).chains == "abc 2"
    assert parse_listing(listing(marked, other)).chains != parse_listing(listing(marked, other, other)).chains


def test_an_empty_set_is_listed_without_elements() -> None:
    assert parse_listing(listing({"set": {"name": "vteps4"}})).elements == {"vteps4": frozenset()}
