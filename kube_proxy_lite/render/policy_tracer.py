"""A new connection's way through the rules of policies, in nftables and in iptables. Pure.

For tests, which hold it against policy.evaluate, and for whoever asks what the kernel would do. Rules are read as they
are rendered. A word that is not known is an error rather than a guess.

    egress, then ingress: a chain of rules each, until one says accept (or comes back), or drop
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping
from functools import lru_cache

from kube_proxy_lite.model import Address, Network
from kube_proxy_lite.policy.model import Flow
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.nftables_tracer import UnknownRule
from kube_proxy_lite.render.policy_iptables import PolicyListing
from kube_proxy_lite.render.policy_iptables_rules import JUMP, ROOT, TABLE, set_of

_WORDS = {4: "ip", 6: "ip6"}


def passes_nftables(table: TableListing, flow: Flow, *, begins: bool = True) -> bool:
    """Whether the first packet of `flow` passes. TCP that does not begin (`begins` False) is without SYN.

    Raises UnknownRule.
    """
    walk = _Nftables(table, flow, begins)
    order = sorted(table.hooks, key=lambda name: int(_HOOK.fullmatch(table.hooks[name])[1]))  # type: ignore[index]
    return all(walk.chain(name) != "drop" for name in order)


def passes_iptables(listing: PolicyListing, flow: Flow, *, begins: bool = True) -> bool:
    """As `passes_nftables`, of chains and sets as they are listed."""
    rules = listing.rules[flow.source.version]
    if rules.jumps.get((TABLE, "FORWARD")) != (JUMP,):
        return True
    chains = {name: found for (_, name), found in rules.chains.items()}
    return _Iptables(chains, listing, flow, begins).chain(ROOT) != "DROP"


# --- nftables -------------------------------------------------------------------------------------------------------

_HOOK = re.compile(r"type filter hook forward priority (\d+); policy accept;")
_NFT = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("old", r"ct state established,related "),
        ("neighbour", r"icmpv6 type \{ [a-z0-9, -]+ \} "),
        ("flags", r"tcp flags & \(fin \| syn \| rst \| ack\) != syn "),
        ("pair", r"(ip6?) ([s])addr \. ip6? daddr @(\w+) "),
        ("ported", r"(ip6?) ([sd])addr \. (tcp|udp|sctp) dport @(\w+) "),
        ("member", r"(ip6?) ([sd])addr (!= )?@(\w+) "),
        ("protocol", r"meta l4proto (tcp|udp|sctp) "),
        ("ports", r"(tcp|udp|sctp) dport \{ ([0-9, -]+) \} "),
        ("port", r"(tcp|udp|sctp) dport ([0-9-]+) "),
        ("counter", r"counter "),
    )
)
_VMAP = re.compile(r"(ip6?) ([sd])addr vmap @(\w+)")


class _Nftables:
    def __init__(self, table: TableListing, flow: Flow, begins: bool) -> None:
        self._table = table
        self._flow = flow
        self._begins = begins

    def chain(self, name: str) -> str:
        """accept, drop, or nothing at the chain's end."""
        for rule in self._table.chains[name]:
            verdict = self._rule(rule)
            if verdict.startswith("goto "):
                return self.chain(verdict[5:])
            if verdict:
                return verdict
        return ""

    def _rule(self, rule: str) -> str:
        if found := _VMAP.fullmatch(rule):
            address = self._address(found[1], found[2])
            return "" if address is None else self._table.sets[found[3]].get(str(address), "")
        rest = rule
        while rest not in ("accept", "drop"):
            matched = next(((name, match) for name, each in _NFT if (match := each.match(rest))), None)
            if matched is None:
                raise UnknownRule(rule)
            if not self._holds(*matched):
                return ""
            rest = rest[matched[1].end() :]
        return rest

    def _holds(self, name: str, found: re.Match[str]) -> bool:
        if name in ("old", "neighbour"):
            return False
        if name == "flags":
            return self._flow.protocol == "TCP" and not self._begins
        if name == "counter":
            return True
        if name in ("protocol", "ports", "port"):
            ports = found[2] if name != "protocol" else "0-65535"
            return self._protocol(found[1]) and any(_holds_port(each, self._flow.port) for each in ports.split(", "))
        address = self._address(found[1], found[2])
        if address is None:
            return False
        if name == "pair":
            return f"{address} . {self._flow.destination}" in self._table.sets[found[3]]
        if name == "ported":
            key = f"{address} . {self._flow.port}"
            return self._protocol(found[3]) and key in self._table.sets[found[4]]
        return _is_in(address, self._table.sets[found[4]]) != bool(found[3])

    def _protocol(self, word: str) -> bool:
        return self._flow.protocol.lower() == word

    def _address(self, family: str, end: str) -> Address | None:
        address = self._flow.source if end == "s" else self._flow.destination
        return address if _WORDS[address.version] == family else None


# --- iptables -------------------------------------------------------------------------------------------------------


class _Iptables:
    def __init__(self, chains: Mapping[str, tuple[str, ...]], listing: PolicyListing, flow: Flow, begins: bool) -> None:
        self._chains = chains
        self._sets = {set_of(name): elements for name, elements in listing.sets.items()}
        self._flow = flow
        self._begins = begins

    def chain(self, name: str) -> str:
        """ACCEPT, DROP, or nothing: come back, or come to the end."""
        for rule in self._chains[name]:
            matches, verb, target = _parse(rule)
            if not all(self._holds(option, value, rule) is not negated for option, value, negated in matches):
                continue
            if target == "RETURN":
                return ""
            if target in ("ACCEPT", "DROP"):
                return target
            verdict = self.chain(target)
            if verdict or verb == "-g":
                return verdict
        return ""

    def _holds(self, option: str, value: str, rule: str) -> bool:
        flow = self._flow
        match option:
            case "-s":
                return flow.source in _network(value)
            case "-d":
                return flow.destination in _network(value)
            case "-p":
                return flow.protocol.lower() == value
            case "--dport" | "--dports":
                return any(_holds_port(each.replace(":", "-"), flow.port) for each in value.split(","))
            case "--ctstate":
                return "NEW" in value.split(",")
            case "--tcp-flags":
                return self._begins
            case "--match-set":
                return self._is_member(*value.split(" "))
        raise UnknownRule(f"{option} in {rule}")

    def _is_member(self, name: str, ends: str) -> bool:
        flow = self._flow
        if ends == "dst,dst":
            return f"{flow.destination},{flow.protocol.lower()}:{flow.port}" in self._sets[name]
        return _is_in(flow.source if ends == "src" else flow.destination, self._sets[name])


@lru_cache(maxsize=65536)
def _parse(rule: str) -> tuple[tuple[tuple[str, str, bool], ...], str, str]:
    """(matches, verb, target) of a rule; a match is (option, value, whether it must not hold)."""
    words = shlex.split(rule)
    matches = []
    negated = False
    at = 0
    while words[at] not in ("-j", "-g"):
        if words[at] == "!":
            negated = True
            at += 1
            continue
        width = 2 if words[at] in ("--match-set", "--tcp-flags") else 1
        if words[at] != "-m":
            matches.append((words[at], " ".join(words[at + 1 : at + 1 + width]), negated))
            negated = False
        at += 1 + width
    if len(words) != at + 2:
        raise UnknownRule(rule)
    return tuple(matches), words[at], words[at + 1]


@lru_cache(maxsize=4096)
def _network(text: str) -> Network:
    return ipaddress.ip_network(text)


def _holds_port(text: str, port: int) -> bool:
    first, _, last = text.partition("-")
    return int(first) <= port <= int(last or first)


def _is_in(address: Address, elements: Mapping[str, str]) -> bool:
    return str(address) in elements or any("/" in each and address in _network(each) for each in elements)
