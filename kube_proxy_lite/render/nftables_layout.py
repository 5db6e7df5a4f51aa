"""The constant part of the nftables mode: sets, maps, chains and rules, as text. Elements are nftables_elements.py's.

One table a family, `ip podwire_proxy` and `ip6 podwire_proxy`, alike but for the family's words. A new connection:

    prerouting ─┬─ closed ──────▶ guard ─▶ drop          a load balancer's address that is not open to everybody
     (nat)      ├─ services_external ─┐                  not from a pod: places of the policy Local
                ├─ services ──────────┼▶ lb_tcp_3        one chain per protocol and number of endpoints
                ├─ nodeports_in ──────┼▶ np_tcp_3        addresses of the node: the same two steps, without address
                └─ unknown            ├▶ refuse          no endpoints at all
    output ──── services, nodeports ──┴▶ drop            endpoints, but none that the policy allows here

    lb_tcp_3    dnat to  daddr . dport . numgen random mod 3  map @eps_tcp;  drop
    unknown     ClusterIPs without that port are refused, other addresses of service CIDRs dropped
    learn_*     (just after dstnat) where the Service wants affinity: client . place ↦ endpoint, with the timeout
    postrouting what we have translated: hairpin, then by the place that was asked for (`ct original`): no packet mark

A lookup that finds no slot ends in `drop`: the client sends again, and is not let through to a virtual address. Places
with affinity have chains `…_sticky`, which ask @affinity before they throw dice.

Everything is decided in nat chains, so it costs the first packet of a connection alone, a handful of hash lookups
whatever the number of Services. Verdicts `refuse` and `drop` are elements of the same maps: from no endpoints to one
and back is one element, and no packet sees a half of it. Reject works in these hooks from kernel 5.9 on.

Rules are written as nft 1.0.6 prints them. Protocols are numbers where they are values: their names need
/etc/protocols, which slim images lack. The text carries a mark, the hashes of declarations and of rules, as the comment
of a rule in a chain without a hook.

Source: nft(8); DESIGN.md § 6 has what was measured of this shape.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import msgspec

from kube_proxy_lite.model import Protocol, Settings
from podwire.errors import PodwireError

NAME = "podwire_proxy"
SHAPE = "shape"
UNKNOWN = "unknown"
AFFINITY = "affinity"
PROTOCOLS = {Protocol.TCP: ("tcp", 6), Protocol.UDP: ("udp", 17), Protocol.SCTP: ("sctp", 132)}
"""Its word in rules, its number in keys."""
POOLS = ("lb", "lb_local", "np", "np_local")
"""Families of chains; each has a map of endpoints per protocol."""
CHAIN_NAME = re.compile(r"(?:(lb|lb_local|np|np_local)_(tcp|udp|sctp)_([0-9]+)(_sticky)?)|(?:learn_([0-9]+))")
"""Names of the chains that come and go."""
INTERFACE = re.compile(r"[A-Za-z0-9_.:@+-]{1,15}\*?")

_AFFINITY_SIZE = 65536  # clients that are remembered; the kernel makes room for the table's buckets at once


class Words(msgspec.Struct, frozen=True):
    """What differs between the families."""

    version: int
    ip: str
    kind: str
    loopback: str

    @property
    def table(self) -> str:
        return f"{self.ip} {NAME}"


WORDS = {4: Words(4, "ip", "ipv4_addr", "127.0.0.0/8"), 6: Words(6, "ip6", "ipv6_addr", "::1")}


class BadInterface(PodwireError):
    """A name of pod interfaces that no interface can have."""


def endpoint_map(pool: str, protocol: str) -> str:
    """The map in which a pool's endpoints are: `eps_tcp`, `np_local_udp`."""
    return f"{pool.replace('lb', 'eps')}_{protocol}"


ENDPOINT_MAPS = tuple(endpoint_map(pool, word) for pool in POOLS for word, _ in PROTOCOLS.values())


def declarations(words: Words) -> dict[str, str]:
    """Every set and map, and what it is declared as."""
    ip, kind = words.ip, words.kind
    place, port = f"{kind} . inet_proto . inet_service", "inet_proto . inet_service"
    found = {
        "set pods": f"type {kind}; flags interval;",
        "set node_addresses": f"type {kind}; flags interval;",
        "set service_cidrs": f"type {kind}; flags interval;",
        "set cluster_ips": f"type {kind};",
        "set hairpin": f"type {kind} . {kind};",
        "set sources": f"type {place} . {kind}; flags interval;",
        f"map {AFFINITY}": f"type {kind} . {place} : {kind} . inet_service;"
        f" size {_AFFINITY_SIZE}; flags dynamic,timeout;",
    }
    for name in ("closed", "services", "services_external", "masquerades", "learners"):
        found[f"map {name}"] = f"type {place} : verdict;"
    for name in ("nodeports", "nodeports_external", "nodeport_masquerades", "nodeport_learners"):
        found[f"map {name}"] = f"type {port} : verdict;"
    for pool in POOLS:
        for protocol, _ in PROTOCOLS.values():
            # typeof, since numgen's type has no name; one map a protocol, since `th dport` takes no later rule here
            key = f"{ip} daddr . {protocol} dport" if pool.startswith("lb") else f"{protocol} dport"
            value = f"{ip} daddr . {protocol} dport"
            found[f"map {endpoint_map(pool, protocol)}"] = f"typeof {key} . numgen random mod 3 : {value};"
    return found


SETS = {version: frozenset(each.partition(" ")[2] for each in declarations(words)) for version, words in WORDS.items()}


def rules(words: Words, settings: Settings) -> dict[str, tuple[str, ...]]:
    """Every chain that is always there, and its rules; the first line of a base chain says where it is hooked."""
    ip = words.ip
    place, port = f"{ip} daddr . meta l4proto . th dport", "meta l4proto . th dport"
    no_pod = _not_from_a_pod(words, settings)
    at_node = f"fib daddr type local {ip} daddr != {words.loopback}"
    if any(network.version == words.version for network in settings.node_port_addresses):
        at_node += f" {ip} daddr @node_addresses"
    return {
        "prerouting": (
            "type nat hook prerouting priority dstnat; policy accept;",
            f"{place} vmap @closed",
            f"{no_pod}{place} vmap @services_external",
            f"{place} vmap @services",
            f"{at_node} goto nodeports_in",
            f"goto {UNKNOWN}",
        ),
        "output": (
            "type nat hook output priority -100; policy accept;",
            f"{place} vmap @closed",
            f"{place} vmap @services",
            f"{at_node} goto nodeports_out",
            f"goto {UNKNOWN}",
        ),
        "nodeports_in": (f"{no_pod}{port} vmap @nodeports_external", f"{port} vmap @nodeports"),
        "nodeports_out": (f"{port} vmap @nodeports",),
        "guard": (f"{place} . {ip} saddr @sources return", "drop"),
        "refuse": ("reject with tcp reset", "reject"),
        UNKNOWN: (f"{ip} daddr @cluster_ips goto refuse", f"{ip} daddr @service_cidrs drop"),
        "learn_in": (
            "type filter hook prerouting priority dstnat + 1; policy accept;",
            "ct state new ct status dnat goto learn",
        ),
        "learn_out": (
            "type filter hook output priority -99; policy accept;",
            "ct state new ct status dnat goto learn",
        ),
        "learn": (*_by_place(ip, "learners"), *_by_place("", "nodeport_learners")),
        "postrouting": (
            "type nat hook postrouting priority srcnat; policy accept;",
            "ct status dnat goto masquerading",
        ),
        "masquerading": (
            f"{ip} saddr . {ip} daddr @hairpin goto masq_all",
            *_by_place(ip, "masquerades"),
            f"ct original {ip} daddr @cluster_ips goto masq_cluster",
            *_by_place("", "nodeport_masquerades"),
        ),
        "masq_all": ("masquerade fully-random",),
        "masq_node": (f"{no_pod}fib saddr type local goto masq_all",),
        "masq_cluster": _masquerade_cluster(no_pod, settings),
    }


def chain_rules(words: Words, name: str) -> tuple[str, ...]:
    """The rules of a chain that comes and goes."""
    ip = words.ip
    found = CHAIN_NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no chain of endpoints")
    pool, protocol, count, sticky, seconds = found.groups()
    if seconds is not None:
        client = f"{ip} saddr . ct original {ip} daddr . meta l4proto . ct original proto-dst"
        return tuple(
            f"meta l4proto {number} update @{AFFINITY} {{ {client} timeout {seconds}s : {ip} daddr . {word} dport }}"
            for word, number in PROTOCOLS.values()
        )
    key = f"{ip} daddr . {protocol} dport" if pool.startswith("lb") else f"{protocol} dport"
    pick = f"dnat {ip} to {key} . numgen random mod {count} map @{endpoint_map(pool, protocol)}"
    known = f"dnat {ip} to {ip} saddr . {ip} daddr . meta l4proto . th dport map @{AFFINITY}"
    return (known, pick, "drop") if sticky else (pick, "drop")


def mark(words: Words, settings: Settings) -> str:
    """Identifies declarations and rules, so that those of another version or of other settings are recognised."""
    samples = {name: chain_rules(words, name) for name in ("lb_tcp_3_sticky", "np_local_udp_1", "learn_10800")}
    return f"sets={_hash(declarations(words))} rules={_hash(rules(words, settings) | samples)}"


def sets_mark(text: str) -> str:
    """The part of a mark that says whether elements can stay."""
    return text.partition(" ")[0]


def install(words: Words, settings: Settings) -> Iterator[str]:
    """Commands that make the table, or bring one of the same declarations up to date; elements stay as they are."""
    table = words.table
    chains = rules(words, settings)
    yield f"add table {table}"
    for each, declared in declarations(words).items():
        kind, name = each.split()
        yield f"add {kind} {table} {name} {{ {declared} }}"
    for name, lines in chains.items():
        yield f"add chain {table} {name} {{ {lines[0]} }}" if is_hook(lines) else f"add chain {table} {name}"
        yield f"flush chain {table} {name}"
    for name, lines in chains.items():
        for line in lines[is_hook(lines) :]:
            yield f"add rule {table} {name} {line}"
    yield from make_chain(words, SHAPE, (f'counter comment "{mark(words, settings)}"',))


def seconds_learned(words: Words, name: str) -> int:
    """The timeout of a chain whose rules nft cannot be told as text, 0 for all other chains.

    nft 1.0.6 fails on `update` of a map whose key has more than 16 bytes, as two IPv6 addresses do: the rules go to the
    kernel as messages (apply/nft_learning.py). They are listed, counted and traced like any other.
    """
    found = CHAIN_NAME.fullmatch(name)
    return int(found[5]) if found and found[5] and words.version == 6 else 0


def make_chain(words: Words, name: str, lines: tuple[str, ...]) -> Iterator[str]:
    """Commands after which a chain has these rules, whatever it had before; none if they have to be sent packed."""
    yield f"add chain {words.table} {name}"
    yield f"flush chain {words.table} {name}"
    for line in () if seconds_learned(words, name) else lines:
        yield f"add rule {words.table} {name} {line}"


def is_hook(lines: tuple[str, ...]) -> bool:
    """Whether the first line is not a rule but where the chain is hooked."""
    return bool(lines) and lines[0].startswith("type ")


def rule_counts(words: Words, settings: Settings) -> dict[str, int]:
    """How many rules each constant chain has."""
    counts = {name: len(lines) - is_hook(lines) for name, lines in rules(words, settings).items()}
    return counts | {SHAPE: 1}


def _by_place(ip: str, name: str) -> tuple[str, ...]:
    """Look the place up that the client asked for. A rule a protocol: nft gives proto-dst no type without one."""
    asked = f"ct original {ip} daddr . meta l4proto" if ip else "meta l4proto"
    return tuple(
        f"meta l4proto {number} {asked} . ct original proto-dst vmap @{name}" for _, number in PROTOCOLS.values()
    )


def _not_from_a_pod(words: Words, settings: Settings) -> str:
    if not settings.detects(words.version):
        return ""
    for name in settings.pod_interfaces:
        if not INTERFACE.fullmatch(name):
            raise BadInterface(f"{name!r} is no name of an interface, nor a prefix that ends in *")
    interfaces = "".join(f'iifname != "{name}" ' for name in settings.pod_interfaces)
    return f"{words.ip} saddr != @pods {interfaces}"


def _masquerade_cluster(no_pod: str, settings: Settings) -> tuple[str, ...]:
    if settings.masquerade_all:
        return ("goto masq_all",)
    return (f"{no_pod}goto masq_all",) if no_pod else ()


def _hash(texts: Mapping[str, object]) -> str:
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]
