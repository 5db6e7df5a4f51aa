"""The rules of our nft table `inet podwire_hostports`, as text: ports of the node that lead to pods.

    prerouting ─┐  to an address      ┌▶ hostports   (address, protocol, port) in @specific ─▶ dnat
    output ─────┴─ of the node ───────┘              (protocol, port) in @any ─────────────▶ dnat
    postrouting ─▶ from 127.0.0.0/8 to a pod, and from a pod to itself: masquerade
    guard ───────▶ from or to 127.0.0.0/8 by way of the bridge: drop

The rules are constant; a mapping is an element (ipam_daemon/hostports.py), so the first packet of a connection costs
two lookups at one mapping and at a thousand. Elements are sent one pod's at a time and the rules are never flushed, so
that a restart drops no packet. The source of a connection stays what it is, but for the two cases above, whose answers
would not come this way.

**After the others.** The kernel asks the chains that may translate one after the other until one does, and ours come
just after the priority of kube-proxy (iptables or nft) and of the reference portmap: a Service's node port and a rule
that portmap made for the same port go first, and what they leave is ours. No table but this one is touched.

**localhost.** A packet from 127.0.0.1 may leave by another link than `lo` only when that link says `route_localnet`,
which `pw0` does from the first mapping on. That alone would let a pod send to and from 127.0.0.1 of its node; `guard`
drops it before anything else looks, and is there before the setting is made. Of 127.0.0.0/8 only 127.0.0.1 is mapped
unless a mapping names another, because the others are where the node's own resolvers listen. There is no such setting
in IPv6: the kernel drops what comes from ::1 by another link, so `[::1]` is never mapped.

**Link-local.** Who sends to fe80:: sends from there, and no router may pass that on (RFC 4291, 2.5.6): what a mapping
of all addresses translated would find no way to the pod. So it is left to the node, which refuses it.

Source: ip_route_input_slow() and __mkroute_output() in net/ipv4/route.c for what routes 127.0.0.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ipam_daemon.hostports import LINK_LOCAL, LOCALHOST
from ipam_daemon.plan import BRIDGE

NAME = "podwire_hostports"
TABLE = f"inet {NAME}"
ROUTE_LOCALNET = f"net/ipv4/conf/{BRIDGE}/route_localnet"
_LOOPBACK = "127.0.0.0/8"


def render() -> str:
    """The nft script, one transaction, that makes the table or replaces the rules of another version of it. Elements
    stay where they are."""
    lines = [f"add table {TABLE}"]
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        data = f"{kind} . inet_service"
        lines += [
            f"add map {TABLE} specific{version} {{ type {kind} . inet_proto . inet_service : {data}; }}",
            f"add map {TABLE} any{version} {{ type inet_proto . inet_service : {data}; }}",
            f"add set {TABLE} hairpin{version} {{ type {kind} . {kind}; }}",
        ]
    for chain, head in _CHAINS.items():
        lines += [f"add chain {TABLE} {chain}{head}", f"flush chain {TABLE} {chain}"]
    lines += [f"add rule {TABLE} {rule}" for rule in _RULES]
    lines.append(f'add rule {TABLE} shape counter comment "{MARK}"')
    return "\n".join(lines) + "\n"


_CHAINS = {
    "prerouting": " { type nat hook prerouting priority -99; policy accept; }",  # dstnat + 1
    "output": " { type nat hook output priority -99; policy accept; }",
    "postrouting": " { type nat hook postrouting priority srcnat; policy accept; }",
    "guard": " { type filter hook prerouting priority raw; policy accept; }",
    "hostports": "",
    "shape": "",
}
_PORTS = "meta l4proto { tcp, udp, sctp }"
_RULES = (
    f'guard iifname "{BRIDGE}" ip saddr {_LOOPBACK} counter drop',
    f'guard iifname "{BRIDGE}" ip daddr {_LOOPBACK} counter drop',
    "prerouting fib daddr type local goto hostports",
    "output fib daddr type local goto hostports",
    f"hostports {_PORTS} dnat ip to ip daddr . meta l4proto . th dport map @specific4",
    f"hostports {_PORTS} dnat ip6 to ip6 daddr . meta l4proto . th dport map @specific6",
    f"hostports ip daddr {_LOOPBACK} ip daddr != {LOCALHOST} return",
    f"hostports ip6 daddr {{ ::1, {LINK_LOCAL} }} return",
    f"hostports meta nfproto ipv4 {_PORTS} dnat ip to meta l4proto . th dport map @any4",
    f"hostports meta nfproto ipv6 {_PORTS} dnat ip6 to meta l4proto . th dport map @any6",
    f'postrouting ip saddr {_LOOPBACK} oifname "{BRIDGE}" counter masquerade fully-random',
    "postrouting ip saddr . ip daddr @hairpin4 counter masquerade fully-random",
    "postrouting ip6 saddr . ip6 daddr @hairpin6 counter masquerade fully-random",
)
MARK = hashlib.sha256("\n".join([*_CHAINS.values(), *_RULES]).encode()).hexdigest()[:16]
"""Identifies the rules: the comment of a rule in a chain without a hook."""


def is_whole(rules: Sequence[tuple[str, str]]) -> bool:
    """Whether the rules in the kernel, as chain and comment, are these."""
    marks = [comment for chain, comment in rules if chain == "shape"]
    return marks == [MARK] and len(rules) == len(_RULES) + 1
