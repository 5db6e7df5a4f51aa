"""A packet's way through the rules of the iptables mode, every way that dice may fall. Pure.

For tests, which hold it against model.decide, and for whoever asks where a connection would go. It reads rules as they
are rendered, which is how iptables-save prints them. It knows the matches and targets that iptables_chains and
iptables_tree write; any other is an error rather than a guess.

    from outside   nat PREROUTING ─▶ filter INPUT or FORWARD ─▶ nat POSTROUTING ─▶ masquerade
    from the node  nat OUTPUT ─▶ filter OUTPUT (and INPUT, when it stays) ─▶ nat POSTROUTING
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import msgspec

from kube_proxy_lite.model import Address
from kube_proxy_lite.render.iptables_tree import WORDS
from kube_proxy_lite.render.nftables_tracer import Outcome, Packet, UnknownRule

Rulesets = Mapping[str, Mapping[str, Sequence[str]]]
"""table → chain, the kernel's among them → rules."""
_TARGETS = ("ACCEPT", "DROP", "REJECT", "RETURN", "MARK", "MASQUERADE", "DNAT")
_FLAGS = ("--rsource", "--reap", "--random-fully")
_IGNORED = ("-m", "--comment", "--mode", "--mask", "--reject-with")


class _State(msgspec.Struct, frozen=True):
    """A packet on its way; `chance` is how likely it gets here."""

    packet: Packet
    destination: Address
    port: int
    chance: float = 1.0
    endpoint: str = ""
    mark: int = 0
    masquerade: bool = False
    stays: tuple[tuple[str, int], ...] = ()
    """(list of `recent`, for how many seconds it counts), as asked on the way."""
    learned: int = 0
    verdict: str = ""


class _Rule(msgspec.Struct, frozen=True):
    matches: tuple[tuple[str, str, bool], ...]
    """(option, value, whether it must not hold)."""
    verb: str
    target: str
    options: tuple[tuple[str, str, bool], ...]


def trace(
    tables: Rulesets, packet: Packet, node: frozenset[Address], remembered: Collection[str] = ()
) -> frozenset[Outcome]:
    """All that can become of `packet` on a node that has the addresses `node`. Raises UnknownRule."""
    return frozenset(chances(tables, packet, node, remembered))


def chances(
    tables: Rulesets, packet: Packet, node: frozenset[Address], remembered: Collection[str] = ()
) -> dict[Outcome, float]:
    """The same, with how likely each is. `remembered` are the lists of `recent` that the client is in."""
    tracer = _Tracer(tables, node, frozenset(remembered))
    found: dict[Outcome, float] = {}
    for state in tracer.through(packet):
        outcome = Outcome(state.verdict or "accept", state.endpoint, state.masquerade, state.learned)
        found[outcome] = found.get(outcome, 0.0) + state.chance
    return found


class _Tracer:
    def __init__(self, tables: Rulesets, node: frozenset[Address], remembered: frozenset[str]) -> None:
        self._tables = tables
        self._node = node
        self._remembered = remembered

    def through(self, packet: Packet) -> Iterator[_State]:
        start = _State(packet, packet.destination, packet.port)
        for state in self._hook("nat", "PREROUTING" if packet.interface else "OUTPUT", start):
            stays = state.destination in self._node
            hooks = ["OUTPUT"] if not packet.interface else []
            hooks += ["INPUT"] if stays else ["FORWARD"] if packet.interface else []
            states = [state]
            for hook in hooks:
                states = [after for each in states for after in self._hook("filter", hook, each)]
            for each in states:
                if packet.interface and stays:
                    yield each
                else:
                    yield from self._hook("nat", "POSTROUTING", each)

    def _hook(self, table: str, hook: str, state: _State) -> Iterator[_State]:
        if state.verdict:
            yield state
            return
        for after in self._chain(table, hook, state):
            verdict = after.verdict if after.verdict in ("drop", "refuse") else ""
            yield msgspec.structs.replace(after, verdict=verdict)

    def _chain(self, table: str, name: str, state: _State) -> Iterator[_State]:
        """Every way through a chain; a state without a verdict has come to the end, or returned."""
        states = [state]
        for text in self._tables[table].get(name, ()):
            rule, going = _parse(text), []
            for each in states:
                matched, missed = self._match(rule, each)
                if missed is not None:
                    going.append(missed)
                if matched is None:
                    continue
                for after, goes_on in self._act(table, rule, matched):
                    if goes_on and not after.verdict:
                        going.append(after)
                    else:
                        yield after
            states = going
        yield from states

    def _act(self, table: str, rule: _Rule, state: _State) -> Iterator[tuple[_State, bool]]:
        """What a rule does, and whether the chain goes on after it."""
        replace = msgspec.structs.replace
        options = {name: value for name, value, _ in rule.options}
        match rule.target:
            case "":
                yield state, True
            case "RETURN":
                yield state, False
            case "ACCEPT":
                yield replace(state, verdict="accept"), False
            case "DROP":
                yield replace(state, verdict="drop"), False
            case "REJECT":
                yield replace(state, verdict="refuse"), False
            case "MARK":
                value, mask = (int(each, 16) for each in options["--set-xmark"].split("/"))
                yield replace(state, mark=(state.mark & ~mask) ^ value), True
            case "MASQUERADE":
                yield replace(state, masquerade=True, verdict="accept"), False
            case "DNAT":
                host, _, port = options["--to-destination"].rpartition(":")
                to = ipaddress.ip_address(host.strip("[]"))
                endpoint = f"{host.strip('[]')} . {port}"
                yield replace(state, destination=to, port=int(port), endpoint=endpoint, verdict="accept"), False
            case chain:
                if chain not in self._tables[table]:
                    raise UnknownRule(f"{table} has no chain {chain}")
                for after in self._chain(table, chain, state):
                    yield after, rule.verb == "-j"

    # --- Matches ------------------------------------------------------------------------------------------------

    def _match(self, rule: _Rule, state: _State) -> tuple[_State | None, _State | None]:
        """The packet as the rule has it, and as it goes on without; both where dice decide."""
        replace = msgspec.structs.replace
        rest = 0.0
        options = {name: value for name, value, _ in rule.matches}
        for name, value, negated in rule.matches:
            if name == "--probability":
                rest = state.chance * (1 - float(value))
                state = replace(state, chance=state.chance * float(value))
            elif name == "--rcheck":
                state = replace(state, stays=(*state.stays, (options["--name"], int(options["--seconds"]))))
                if options["--name"] not in self._remembered:
                    return None, state
            elif name == "--set":
                state = replace(state, learned=dict(state.stays).get(options["--name"], 0))
            elif self._holds(name, value, state) == negated:
                return None, state
        return state, replace(state, chance=rest) if rest else None

    def _holds(self, name: str, value: str, state: _State) -> bool:
        packet = state.packet
        match name:
            case "-s":
                return packet.source in ipaddress.ip_network(value)
            case "-d":
                return state.destination in ipaddress.ip_network(value)
            case "-p":
                return WORDS[packet.protocol] == value
            case "-i":
                return packet.interface.startswith(value[:-1]) if value.endswith("+") else packet.interface == value
            case "--dport":
                first, _, last = value.partition(":")
                return int(first) <= state.port <= int(last or first)
            case "--mark":
                wanted, mask = (int(each, 16) for each in value.split("/"))
                return state.mark & mask == wanted
            case "--ctstate":
                return "NEW" in value.split(",")
            case "--src-type":
                return (packet.source in self._node) == (value == "LOCAL")
            case "--dst-type":
                return (state.destination in self._node) == (value == "LOCAL")
        return True  # --name and --seconds, which --rcheck and --set have read


@lru_cache(maxsize=65536)
def _parse(text: str) -> _Rule:
    words = shlex.split(text)
    matches: list[tuple[str, str, bool]] = []
    options: list[tuple[str, str, bool]] = []
    verb = target = ""
    negated = False
    at = 0
    while at < len(words):
        word = words[at]
        value = words[at + 1] if at + 1 < len(words) else ""
        at += 2
        into = options if target else matches
        if word == "!":
            negated = True
            at -= 1
            continue
        if word in ("-j", "-g"):
            verb, target = word, value
            if not value.startswith("KUBE-") and value not in _TARGETS:
                raise UnknownRule(f"{value} in {text}")
        elif word in ("--rcheck", "--set", *_FLAGS):
            into.append((word, "", negated))
            at -= 1
        elif word not in _IGNORED:
            _check_known(word, text)
            into.append((word, value, negated))
        negated = False
    return _Rule(tuple(each for each in matches if each[0] not in _FLAGS), verb, target, tuple(options))


def _check_known(word: str, text: str) -> None:
    known = "-s -d -p -i --dport --mark --ctstate --src-type --dst-type --probability --name --seconds"
    if word not in (*known.split(), "--set-xmark", "--to-destination"):
        raise UnknownRule(f"{word} in {text}")
