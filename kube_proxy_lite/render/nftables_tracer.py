"""A packet's way through the rules of the nftables mode, every way that dice may fall. Pure.

For tests, which hold it against model.decide, and for whoever asks where a connection would go. It reads rules as they
are rendered, which is how nft 1.0.6 prints them, so that a kernel's listing can be traced as well. It knows the few
statements that nftables_layout writes; any other is an error rather than a guess.

    prerouting or output, by priority ─▶ DNAT, refused or dropped ─▶ learn ─▶ postrouting ─▶ masquerade
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

import msgspec

from kube_proxy_lite.model import Address, Protocol
from kube_proxy_lite.render.nftables_elements import INTERVALS, address_text
from kube_proxy_lite.render.nftables_layout import PROTOCOLS
from kube_proxy_lite.render.nftables_listing import TableListing
from podwire.errors import PodwireError

_PRIORITY = re.compile(r"type (nat|filter) hook (\w+) priority (\S+)(?: \+ (\d+))?; policy accept;")
_NAMED = {"dstnat": -100, "srcnat": 100}
_NUMGEN = re.compile(r"numgen random mod (\d+)")


class UnknownRule(PodwireError):
    """A rule that the tracer does not know; what it would do is not guessed."""


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """The first packet of a connection. It comes in by `interface`; without one it is this node's own."""

    source: Address
    destination: Address
    protocol: Protocol
    port: int
    interface: str = ""


class Outcome(msgspec.Struct, frozen=True, order=True):
    """What becomes of it: `accept`, `drop` or `refuse`; `endpoint` is empty when it is not translated.

    `learned` is for how many seconds the client is remembered, 0 for not at all.
    """

    verdict: str
    endpoint: str = ""
    masquerade: bool = False
    learned: int = 0


class _State(msgspec.Struct, frozen=True):
    packet: Packet
    endpoint: str = ""
    masquerade: bool = False
    learned: int = 0
    verdict: str = ""

    @property
    def destination(self) -> str:
        return self.endpoint.partition(" . ")[0] or address_text(self.packet.destination)

    @property
    def port(self) -> str:
        return self.endpoint.partition(" . ")[2] or str(self.packet.port)


def trace(table: TableListing, packet: Packet, node: frozenset[Address]) -> frozenset[Outcome]:
    """All that can become of `packet` on a node that has the addresses `node`. Raises UnknownRule."""
    tracer = _Tracer(table, node)
    states = [_State(packet)]
    for hook in ("prerouting" if packet.interface else "output", "postrouting"):
        for name in tracer.base_chains(hook):
            states = [after for state in states for after in tracer.through(name, state)]
    return frozenset(
        Outcome(state.verdict or "accept", state.endpoint, state.masquerade, state.learned) for state in states
    )


class _Tracer:
    def __init__(self, table: TableListing, node: frozenset[Address]) -> None:
        self._table = table
        self._node = {address_text(address) for address in node}

    def base_chains(self, hook: str) -> list[str]:
        found = []
        for name, line in self._table.hooks.items():
            match = _PRIORITY.fullmatch(line)
            if match is None:
                raise UnknownRule(f"{name}: {line}")
            if match[2] == hook:
                base = _NAMED[match[3]] if match[3] in _NAMED else int(match[3])
                found.append((base + int(match[4] or 0), name))
        return [name for _, name in sorted(found)]

    def through(self, chain: str, state: _State) -> Iterator[_State]:
        if state.verdict in ("drop", "refuse"):
            yield state
            return
        for after in self._chain(chain, 0, state):
            verdict = after.verdict if after.verdict in ("drop", "refuse") else ""
            yield msgspec.structs.replace(after, verdict=verdict)

    def _chain(self, chain: str, start: int, state: _State) -> Iterator[_State]:
        """Every way through the rules from `start` on; a state without a verdict has come to the end."""
        rules = self._table.chains[chain]
        if start == len(rules):
            yield state
            return
        for after, end in self._rule(chain, rules[start], state):
            if end:
                yield after
            else:
                yield from self._chain(chain, start + 1, after)

    def _rule(self, chain: str, rule: str, state: _State) -> Iterator[tuple[_State, bool]]:
        """(state, whether the chain ends here) for every way through one rule."""
        rest = rule
        while match := _first_match(rest):
            name, matched = match
            if not self._holds(name, matched, state):
                yield state, False
                return
            rest = rest[matched.end() :]
        if found := re.fullmatch(r"(.+) vmap @(\w+)", rest):
            verdict = self._lookup(found[2], self._value(found[1], state))
            if verdict is None:
                yield state, False
                return
            rest = verdict
        yield from self._statement(chain, rest, state)

    def _statement(self, chain: str, text: str, state: _State) -> Iterator[tuple[_State, bool]]:
        replace = msgspec.structs.replace
        word, _, target = text.partition(" ")
        if word == "goto" and target in self._table.chains:
            yield from ((after, True) for after in self._chain(target, 0, state))
        elif word == "jump" and target in self._table.chains:
            for after in self._chain(target, 0, state):
                yield (
                    replace(after, verdict="") if after.verdict == "return" else after,
                    after.verdict
                    not in (
                        "",
                        "return",
                    ),
                )
        elif text in ("drop", "return"):
            yield replace(state, verdict=text), True
        elif text == "reject with tcp reset":
            tcp = state.packet.protocol is Protocol.TCP
            yield (replace(state, verdict="refuse"), True) if tcp else (state, False)
        elif text == "reject":
            yield replace(state, verdict="refuse"), True
        elif text == "masquerade fully-random":
            yield replace(state, masquerade=True, verdict="accept"), True
        elif word == "dnat":
            yield from self._translate(text, state)
        elif word == "update":
            yield self._learn(text, state), False
        else:
            raise UnknownRule(f"{chain}: {text}")

    def _translate(self, text: str, state: _State) -> Iterator[tuple[_State, bool]]:
        found = re.fullmatch(r"dnat ip6? to (.+) map @(\w+)", text)
        if found is None:
            raise UnknownRule(text)
        dice = _NUMGEN.search(found[1])
        for throw in range(int(dice[1]) if dice else 1):
            key = self._value(_NUMGEN.sub(str(throw), found[1]), state)
            endpoint = self._lookup(found[2], key)
            if endpoint is None:
                yield state, False
            else:
                yield msgspec.structs.replace(state, endpoint=endpoint, verdict="accept"), True

    def _learn(self, text: str, state: _State) -> _State:
        found = re.fullmatch(r"update @affinity \{ (.+) timeout (\w+) : (.+) \}", text)
        if found is None:
            raise UnknownRule(text)
        if self._value(f"{found[1]} . {found[3]}", state) is None:
            return state
        return msgspec.structs.replace(state, learned=_seconds(found[2]))

    def _holds(self, name: str, found: re.Match[str], state: _State) -> bool:
        if name == "protocol":
            return int(found[1]) == PROTOCOLS[state.packet.protocol][1]
        if name == "member":
            return (self._lookup(found[3], self._value(found[1], state)) is not None) != bool(found[2])
        if name == "outside":
            return ipaddress.ip_address(state.destination) not in ipaddress.ip_network(found[1])
        if name == "local":
            return (state.destination if found[1] == "d" else address_text(state.packet.source)) in self._node
        if name == "interface":
            prefix = found[1].endswith("*") and state.packet.interface.startswith(found[1][:-1])
            return not prefix and state.packet.interface != found[1]
        return name == "new" or bool(state.endpoint)

    def _value(self, expression: str, state: _State) -> str | None:
        """A concatenation as it is in an element's key; None for a packet that has no such field."""
        parts = [self._field(part, state) for part in expression.split(" . ")]
        return None if None in parts else " . ".join(part for part in parts if part is not None)

    def _field(self, field: str, state: _State) -> str | None:
        packet = state.packet
        word, number = PROTOCOLS[packet.protocol]
        if field.isdigit():
            return field
        family = "ip" if packet.source.version == 4 else "ip6"
        if field in ("tcp dport", "udp dport", "sctp dport"):
            return state.port if field.startswith(word) else None
        fields = {
            f"{family} saddr": address_text(packet.source),
            f"{family} daddr": state.destination,
            "meta l4proto": str(number),
            "th dport": state.port,
            f"ct original {family} daddr": address_text(packet.destination),
            "ct original proto-dst": str(packet.port),
        }
        if field not in fields:
            raise UnknownRule(field)
        return fields[field]

    def _lookup(self, name: str, key: str | None) -> str | None:
        elements = self._table.sets[name]
        if key is None or name not in INTERVALS:
            return None if key is None else elements.get(key)
        place, _, address = key.rpartition(" . ")
        for element in elements:
            its_place, _, network = element.rpartition(" . ")
            if its_place == place and ipaddress.ip_address(address) in ipaddress.ip_network(network):
                return ""
        return None


_MATCHES = {
    "protocol": re.compile(r"meta l4proto (\d+) "),
    "new": re.compile(r"ct state new "),
    "translated": re.compile(r"ct status dnat "),
    "local": re.compile(r"fib ([sd])addr type local "),
    "interface": re.compile(r'iifname != "([^"]+)" '),
    "member": re.compile(r"((?:(?:ct original )?\w+ \w+)(?: \. (?:ct original )?\w+ \w+)*) (!= )?@(\w+) "),
    "outside": re.compile(r"ip6? daddr != ([0-9a-f.:/]+) "),
}


def _first_match(text: str) -> tuple[str, re.Match[str]] | None:
    for name, pattern in _MATCHES.items():
        if found := pattern.match(text):
            return name, found
    return None


def _seconds(text: str) -> int:
    """A time as it is written (`10800s`) or printed (`3h`)."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
