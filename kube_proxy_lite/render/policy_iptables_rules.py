"""The rules of policies in iptables: a packet's path, the chains of classes, and the trees that lead to them. Pure.

    mangle FORWARD ─▶ PODWIRE-POLICY   ct RELATED,ESTABLISHED ─▶ back
                                       neighbour discovery ─▶ accepted
                                       TCP that begins without SYN, @isolated ─▶ dropped
                                       @local and not @known ─▶ dropped
                      ├─▶ PODWIRE-EGRESS ─ tree by source ─▶ PODWIRE-EG-<class>   allowed ─▶ back · else dropped
                      └─▶ PODWIRE-INGRESS ─ tree by destination ─▶ PODWIRE-IN-<class>   the same

The table is mangle, not filter: kube-proxy and Docker put rules in front of filter's FORWARD that accept, and what they
accept would never come to a rule of ours. In mangle we are alone, after Services have been translated (nat PREROUTING)
and before anything is masqueraded (nat POSTROUTING); what passes here still has to pass filter.

Chains are reached by `-g`, so "back" from a class is to the line after the tree. A tree (iptables_tree) divides the
addresses of the node's isolated pods by four bits at a time: a new connection meets 16 rules a level and side (32
at the last), two levels for a /24, whether there are ten classes or a thousand. Packets of established connections meet
one rule.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterator

from kube_proxy_lite.model import Address, Protocol
from kube_proxy_lite.policy.model import LAST_PORT, ClassRule, Direction, PolicyClass, PortedPodSet
from kube_proxy_lite.render.iptables_tree import WORDS, Chains, Rules, Tree, name_of
from kube_proxy_lite.render.nftables_elements import address_text
from kube_proxy_lite.render.policy_sets import PREFIX, class_name, port_ranges, set_name

TABLE, ROOT = "mangle", "PODWIRE-POLICY"
ROOTS = {Direction.EGRESS: "PODWIRE-EGRESS", Direction.INGRESS: "PODWIRE-INGRESS"}
NEIGHBOURS = "PODWIRE-NEIGHBOURS"
JUMP = f"-j {ROOT}"
_PEER = {Direction.INGRESS: "src", Direction.EGRESS: "dst"}
_SELF = {Direction.INGRESS: "-d", Direction.EGRESS: "-s"}
_NEIGHBOUR_TYPES = (130, 131, 132, 133, 134, 135, 136, 143)
"""ICMPv6: listener queries, reports and done, router and neighbour solicitations and advertisements, MLDv2 reports."""
_AT_ONCE = 15  # ports in one multiport match; a range counts as two


def set_of(name: str) -> str:
    """The ipset of a set of policy_sets."""
    return f"podwire-{name}"


def chain_of(name: str) -> str:
    """The chain of a class, by policy_sets' name of it."""
    way, _, digest = name.partition("_")
    return f"PODWIRE-{way.upper()}-{digest}"


def hold_name(before: str, after: str) -> str:
    """The chain of what passes both of two classes' chains."""
    return name_of("PODWIRE-AND-", before, " ", after)


def hold_rules(before: str, after: str) -> Rules:
    """What both allow: the first drops, or comes back here."""
    return (f"-j {before}", f"-g {after}")


# --- what is always there -------------------------------------------------------------------------------------------


def constant_chains(version: int) -> Chains:
    """The chains that are there whatever the policies are, but for the roots of the trees."""
    chains: Chains = {}
    if version == 6:
        chains[NEIGHBOURS] = tuple(f"-p ipv6-icmp -m icmp6 --icmpv6-type {each} -j ACCEPT" for each in _NEIGHBOUR_TYPES)
    chains[ROOT] = tuple(_root_rules(version))
    return chains


def _root_rules(version: int) -> Iterator[str]:
    yield "-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN"
    if version == 6:
        yield f"-p ipv6-icmp -j {NEIGHBOURS}"
    isolated, local, known = (set_of(f"{name}{version}") for name in ("isolated", "local", "known"))
    for end in ("src", "dst"):
        match = f"-p tcp -m set --match-set {isolated} {end} -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN"
        yield f"{match} -j DROP"
    for end in ("src", "dst"):
        yield f"-m set --match-set {local} {end} -m set ! --match-set {known} {end} -j DROP"
    yield from (f"-j {root}" for root in ROOTS.values())


# --- classes --------------------------------------------------------------------------------------------------------


def class_chain(found: PolicyClass, version: int) -> tuple[str, Rules]:
    """(name, rules) of a class."""
    lines = dict.fromkeys(
        f"{match}-j RETURN" for rule in found.rules for match in _rule(found.direction, rule, version)
    )
    return chain_of(class_name(found)), (*lines, "-j DROP")


def _rule(way: Direction, rule: ClassRule, version: int) -> Iterator[str]:
    peer = ""
    if rule.peers is not None:
        ends = "dst,dst" if isinstance(rule.peers, PortedPodSet) else _PEER[way]
        peer = f"-m set --match-set {set_of(set_name(rule.peers, version))} {ends} "
    if rule.ports is None:
        yield peer
        return
    for protocol in Protocol:
        word, ranges = WORDS[protocol], port_ranges(rule.ports, protocol)
        if ranges and ranges[0] == (0, LAST_PORT):
            yield f"-p {word} {peer}"
        else:
            yield from (f"-p {word} {peer}{match}" for match in _ports(word, ranges))


def _ports(word: str, ranges: list[tuple[int, int]]) -> Iterator[str]:
    """A match for a port or a range, or for up to 15 of them."""
    texts = [(str(first) if first == last else f"{first}:{last}", 1 + (first != last)) for first, last in ranges]
    while texts:
        taken, room = [], _AT_ONCE
        while texts and texts[0][1] <= room:
            text, size = texts.pop(0)
            taken.append(text)
            room -= size
        yield f"-m {word} --dport {taken[0]} " if len(taken) == 1 else f"-m multiport --dports {','.join(taken)} "


# --- dispatch -------------------------------------------------------------------------------------------------------


class PodTree(Tree):
    """The node's isolated pods by address, and the chain that each leads to."""

    def __init__(self, way: Direction, version: int) -> None:
        super().__init__(32 if version == 4 else 128)
        self.targets: dict[int, str] = {}
        self._way = way
        self._seed = f"policy {PREFIX[way]}"
        self._address = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address

    def set(self, address: Address, target: str | None) -> None:
        """Where the pod's packets go, None for past the tree."""
        key = int(address)
        if target is None:
            if self.targets.pop(key, None) is not None:
                self.remove(key)
            return
        if key not in self.targets:
            self.add(key)
        self.targets[key] = target

    def addresses(self) -> Iterator[Address]:
        """Those that are dispatched."""
        yield from map(self._address, self.targets)

    def rules(self, key: int) -> Rules:
        """The rules of one pod: what comes from itself, by way of a Service, passes."""
        host = f"{address_text(self._address(key))}/{self.width}"
        return (f"-s {host} -d {host} -j RETURN", f"{self.match(key, self.width)}-g {self.targets[key]}")

    def chain(self, prefix: int, length: int) -> str:
        """See iptables_tree.Tree."""
        return name_of("PODWIRE-IP-", self._seed, f" {prefix << self.width - length}/{length}")

    def match(self, prefix: int, length: int) -> str:
        """See iptables_tree.Tree."""
        if not length:
            return ""
        return f"{_SELF[self._way]} {address_text(self._address(prefix << self.width - length))}/{length} "

    def all_chains(self, touched: Collection[int] | None = None) -> Chains:
        """The tree's chains and its root; given `touched`, those that one of these keys can have changed."""
        root = self.root()
        found = {name: made if isinstance(made, tuple) else made() for name, made in self.chains(touched).items()}
        found[ROOTS[self._way]] = () if root is None else (f"{root[0]}-g {root[1]}",)
        return found


def read_tree(chains: Chains, way: Direction, version: int) -> dict[Address, str]:
    """Where pods go according to chains as they are listed: address → chain."""
    found: dict[Address, str] = {}
    waiting, seen = [ROOTS[way]], set()
    width = 32 if version == 4 else 128
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for rule in chains.get(name, ()):
            match, _, target = rule.rpartition("-g ")
            if target.startswith("PODWIRE-IP-"):
                waiting.append(target)
            elif target and match.startswith(f"{_SELF[way]} ") and match.strip().endswith(f"/{width}"):
                found[ipaddress.ip_address(match.split()[1].partition("/")[0])] = target
    return found


OWN_CHAINS = frozenset({ROOT, NEIGHBOURS, *ROOTS.values()})


def is_own_chain(table: str, name: str) -> bool:
    """Whether a chain is one that this module names."""
    return table == TABLE and (name in OWN_CHAINS or name.startswith(("PODWIRE-IP-", "PODWIRE-AND-", *_CLASSES)))


_CLASSES = tuple(f"PODWIRE-{prefix.upper()}-" for prefix in PREFIX.values())
