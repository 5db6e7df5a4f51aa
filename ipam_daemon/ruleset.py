"""Our own nft table, `inet podwire`, as text: masquerade, and who may send VXLAN. ipam_daemon/firewall.py applies it.

    input ───────▶ vxlan_in ─▶ vxlan   VXLAN to this node is taken from known nodes alone, and from no pod
    postrouting ─▶ vxlan_out           (nat, first) a pod's VXLAN to a known node is dropped
    postrouting ─▶ postrouting         (nat) saddr @local_blocks, daddr not @unmasqueraded ──▶ masquerade

The rules are constant; what varies are elements of sets, and only the elements that differ are sent, so neither a
restart nor a new node ever flushes anything. The text of the rules carries a hash: a table of another version gets its
chains replaced in one transaction, in which the sets and their elements stay. Nobody else's table is read or touched.

What every packet of every pod meets is a pod's throughput: a chain costs 0.07 µs, whatever it says. So there is none.
What is forwarded is judged in nat chains, which a connection's first packet alone goes through; one that is dropped
there stays the first. Before everybody else's (`srcnat - 10`), since a connection that one of them has translated goes
through no other. A connection that is older than the rule would pass: dataplane.py has those forgotten. What is for the
node itself is judged where no forwarded packet comes by. In prerouting, as it was, every packet met the guard, across
nodes three times; with six rules and a route looked up for each packet, before that, it was 0.9 µs.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from typing import Any

import msgspec

from ipam_daemon.model import Address, Network
from ipam_daemon.plan import BRIDGE, FirewallPlan

TABLE = "inet podwire"
POD_VXLAN = "dropped_vxlan"
"""The counter of what pods sent as VXLAN."""
_FAMILIES = {4: "ipv4_addr", 6: "ipv6_addr"}
_SHAPE = "shape"
_CHAINS = {
    "postrouting": "nat hook postrouting priority srcnat",
    "vxlan_in": "filter hook input priority raw",
    "vxlan_out": "nat hook postrouting priority srcnat - 10",
    "vxlan": "",
    _SHAPE: "",
}
_RETIRED = {"vxlan_guard": "filter hook prerouting priority raw"}
"""Chains that versions before this one had."""
_SETS = {"local_blocks": "flags interval;", "unmasqueraded": "flags interval;", "vteps": ""}


class FirewallState(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel has: the shape of the chains (empty: no table) and set name → elements as text."""

    chains: str
    elements: dict[str, frozenset[str]]


# --- plan → text ----------------------------------------------------------------------------------------------------


def set_name(name: str, version: int) -> str:
    """An nft set has one family: `local_blocks4`, `local_blocks6`."""
    return f"{name}{version}"


def desired(plan: FirewallPlan) -> FirewallState:
    """The state that `plan` asks for; a set that the plan knows nothing of is absent."""
    elements: dict[str, set[str]] = {}
    for name, members in (
        ("local_blocks", plan.local_blocks),
        ("unmasqueraded", plan.unmasqueraded),
        ("vteps", plan.vteps),
    ):
        if members is not None:
            for version in _FAMILIES:
                elements[set_name(name, version)] = {_text(each) for each in members if each.version == version}
    return FirewallState(
        chains=shape(chains_hash(plan.vxlan_port), len(_rules(plan.vxlan_port))),
        elements={name: frozenset(found) for name, found in elements.items()},
    )


def render(plan: FirewallPlan, actual: FirewallState) -> str:
    """The nft script, one transaction, that brings `actual` to `plan`. Empty when there is nothing to do."""
    wanted = desired(plan)
    lines: list[str] = []
    if actual.chains != wanted.chains:
        lines += _render_sets() + _render_chains(plan.vxlan_port, chains_hash(plan.vxlan_port))
    for name, elements in wanted.elements.items():
        there = actual.elements.get(name, frozenset())
        lines += _render_elements("delete", name, there - elements) + _render_elements("add", name, elements - there)
    return "\n".join(lines) + "\n" if lines else ""


def render_vteps(before: FirewallPlan, after: FirewallPlan) -> str:
    """The nft script that brings the table from one plan to another. Empty when more than `vteps` differs, or nothing.

    What it costs hangs on how many nodes have come and gone, not on how many there are.
    """
    if before.vteps is None or after.vteps is None or msgspec.structs.replace(before, vteps=after.vteps) != after:
        return ""
    lines: list[str] = []
    for version in _FAMILIES:
        name = set_name("vteps", version)
        for verb, members in (("delete", before.vteps - after.vteps), ("add", after.vteps - before.vteps)):
            lines += _render_elements(verb, name, {_text(each) for each in members if each.version == version})
    return "\n".join(lines) + "\n" if lines else ""


def chains_hash(vxlan_port: int) -> str:
    """Identifies the rules, so that another version of them is recognised."""
    return hashlib.sha256("\n".join(_rules(vxlan_port)).encode()).hexdigest()[:16]


def shape(mark: str, rules: int) -> str:
    """Tells chains apart: the hash that they were made from and, should somebody flush one, the number of rules."""
    return f"{mark} {rules}"


def _rules(vxlan_port: int) -> list[str]:
    """In the order that costs least: VXLAN of a known node meets one rule. A pod cannot send as a node (spoofguard)."""
    arrives = f"udp dport {vxlan_port}"
    masquerade, known, to_known = [], [], []
    for version in _FAMILIES:
        ip = "ip" if version == 4 else "ip6"
        local, exempt, vteps = (f"@{set_name(name, version)}" for name in _SETS)
        masquerade.append(f"postrouting {ip} saddr {local} {ip} daddr != {exempt} counter masquerade fully-random")
        known.append(f"vxlan_in {arrives} {ip} saddr {vteps} accept")
        to_known.append(f"vxlan_out {arrives} {ip} saddr {local} {ip} daddr {vteps} counter name {POD_VXLAN} drop")
    return [
        *masquerade,
        *known,
        f"vxlan_in {arrives} jump vxlan",
        f'vxlan iifname "{BRIDGE}" counter name {POD_VXLAN} drop',
        'vxlan iifname != "lo" counter drop',
        *to_known,
    ]


def _render_sets() -> list[str]:
    lines = [f"add table {TABLE}"]
    for name, flags in _SETS.items():
        lines += [
            f"add set {TABLE} {set_name(name, version)} {{ type {kind}; {flags} }}"
            for version, kind in _FAMILIES.items()
        ]
    return lines


def _render_chains(vxlan_port: int, mark: str) -> list[str]:
    """The hash is the comment of a chain without a hook: nft 1.0.6 keeps no comment on a table that exists."""
    rules = _rules(vxlan_port)
    lines = [f"add counter {TABLE} {POD_VXLAN}"]
    for name, hook in (_CHAINS | _RETIRED).items():
        lines.append(f"add chain {TABLE} {name}" + (f" {{ type {hook}; policy accept; }}" if hook else ""))
        lines.append(f"flush chain {TABLE} {name}")
    return [
        *lines,
        *(f"delete chain {TABLE} {name}" for name in _RETIRED),
        f'add rule {TABLE} {_SHAPE} counter comment "{mark}"',
        *(f"add rule {TABLE} {rule}" for rule in rules),
    ]


def _render_elements(verb: str, name: str, elements: Iterable[str]) -> list[str]:
    listed = ", ".join(sorted(elements))
    return [f"{verb} element {TABLE} {name} {{ {listed} }}"] if listed else []


def _text(member: Network | Address) -> str:
    if isinstance(member, (ipaddress.IPv4Network, ipaddress.IPv6Network)) and member.num_addresses == 1:
        return str(member.network_address)
    return str(member)


# --- text → state ---------------------------------------------------------------------------------------------------


def parse_listing(listing: dict[str, Any]) -> FirewallState:
    """The state in the output of `nft -j list table` (libnftables-json(5))."""
    mark, rules, elements = "", 0, {}
    for item in listing["nftables"]:
        if "set" in item:
            elements[item["set"]["name"]] = frozenset(_element(each) for each in item["set"].get("elem", ()))
        elif item.get("rule", {}).get("chain") == _SHAPE:
            mark = item["rule"].get("comment", "")
        elif "rule" in item:
            rules += 1
    return FirewallState(chains=shape(mark, rules), elements=elements)


def _element(element: Any) -> str:
    if isinstance(element, dict) and "prefix" in element:
        return f"{element['prefix']['addr']}/{element['prefix']['len']}"
    if isinstance(element, dict) and "range" in element:
        return "-".join(element["range"])
    if isinstance(element, dict) and "elem" in element:
        return _element(element["elem"]["val"])
    return str(element)
