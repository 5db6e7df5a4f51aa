"""NetworkPolicy in nftables: one table, `inet podwire_policy`, whose rules grow with classes and whose sets with pods.

    forward, priority 0   egress    ct established ─▶ accept · saddr ─▶ @egress4 : goto eg_<class> ─┐
    forward, priority 1   ingress   ct established ─▶ accept · daddr ─▶ @ingress4: goto in_<class> ─┤
                                                                                                    ▼
                          in_<class>   saddr @p_<set>_4  tcp dport {…}  accept    a rule a peer, family and protocol
                                       daddr . dport @n_…                         (egress: ports by name)
                                       drop

It is evaluated where a packet is routed or bridged between others: after Services have been translated, before anything
is masqueraded. What a node sends to or gets from its own pods passes `output` and `input`, and so is never filtered.
`accept` ends one base chain, not the other: both sides must allow. A pod's address is looked up in one hash for each
side, so a new connection costs the same with ten pods as with a thousand; then it goes through the rules of its class.
Packets of established connections meet one rule a side.

    @local4 ∌ @known4 ──▶ drop     an address of this node's blocks that no known pod has; while there is any policy.
                                   Before the class is looked up: a packet may pass while a transaction is committed,
                                   and one that found no class yet must not find its pod known afterwards
    @isolated4         ──▶ drop    TCP to or from an isolated pod that begins without SYN: a connection that was cut
                                   would be taken up again from its other end
    @self4             ──▶ accept  a pod that comes to itself by way of a Service

Sets and chains are named by their content (policy.model.digest), so that what is the same need not be compared, and a
restart finds what it left. A change is one transaction, seen at once or not at all: members, and which pod is in which
class. New classes are made in one before it, where nothing leads to them yet: a packet keeps the generation of rules
that it began with, but sees elements as they are when it looks them up, and so would find its class without rules, and
pass (11 packets in 405 such changes, none in 344 of two transactions, at 700,000 packets a second). What nothing refers
to any more is removed in a last one, since a packet may be on its way through it.

Neighbour discovery and listener reports between pods of one node cross the bridge's firewall, and always pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from kube_proxy_lite.model import Network, Protocol
from kube_proxy_lite.policy.membership import Fact, Value
from kube_proxy_lite.policy.model import (
    LAST_PORT,
    BlockSet,
    ClassRule,
    Direction,
    Member,
    PolicyClass,
    PortedPodSet,
    PortRange,
    SetKey,
)
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.policy_sets import VERSIONS, PolicySets, Touched, class_name, port_ranges, set_name

TABLE = "inet podwire_policy"
LIMIT = 5000
"""Elements in one transaction, where a change is too large for one."""
_ADDRESS = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}
_PEER = {Direction.INGRESS: "saddr", Direction.EGRESS: "daddr"}
_SELF = {Direction.INGRESS: "daddr", Direction.EGRESS: "saddr"}
_NEIGHBOURS = (
    "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert, mld-listener-query,"
    " mld-listener-report, mld-listener-done, mld2-listener-report } accept"
)
_SHAPE = "shape"


class Definition(msgspec.Struct, frozen=True):
    """A set or map: what stands between its braces but for the elements."""

    kind: str
    body: str


class Static(msgspec.Struct, frozen=True):
    """What is there whatever the policies are. `mark` tells it apart from another version's."""

    sets: Mapping[str, Definition]
    chains: Mapping[str, tuple[str, tuple[str, ...]]]
    mark: str


# --- what is constant -----------------------------------------------------------------------------------------------


def static() -> Static:
    """The table without policies."""
    sets: dict[str, Definition] = {}
    for version, kind in _ADDRESS.items():
        sets[f"local{version}"] = Definition("set", f"type {kind}; flags interval;")
        for name in ("known", "isolated"):
            sets[f"{name}{version}"] = Definition("set", f"type {kind};")
        sets[f"self{version}"] = Definition("set", f"type {kind} . {kind};")
        for way in Direction:
            sets[f"{way.value}{version}"] = Definition("map", f"type {kind} : verdict;")
    chains = {
        way.value: (f"type filter hook forward priority {priority}; policy accept;", tuple(_base_rules(way)))
        for way, priority in ((Direction.EGRESS, 0), (Direction.INGRESS, 1))
    }
    text = repr((sorted(sets), chains))
    return Static(sets, chains, hashlib.sha256(text.encode()).hexdigest()[:16])


def _base_rules(way: Direction) -> Iterator[str]:
    yield "ct state established,related accept"
    yield _NEIGHBOURS
    for version, ip in _IP.items():
        yield f"{ip} saddr . {ip} daddr @self{version} accept"
        own = f"{ip} {_SELF[way]}"
        yield f"{own} @isolated{version} tcp flags & (fin | syn | rst | ack) != syn counter drop"
        yield f"{own} != @known{version} {own} @local{version} counter drop"
        yield f"{own} vmap @{way.value}{version}"


# --- what policies make ---------------------------------------------------------------------------------------------


class Words:
    """Sets as nft writes them (policy_sets.Words)."""

    def always(self) -> Mapping[str, Definition]:
        """See policy_sets.Words."""
        return static().sets

    def declare(self, key: SetKey, version: int) -> Definition:
        """See policy_sets.Words."""
        return definition(key, version)

    def member(self, key: SetKey, member: Member) -> str:  # noqa: ARG002
        """See policy_sets.Words."""
        return f"{member[0]} . {member[1]}" if isinstance(member, tuple) else str(member)

    def network(self, network: Network) -> tuple[str, ...]:
        """See policy_sets.Words; nft writes a single address without its length."""
        return (str(network.network_address) if network.num_addresses == 1 else str(network),)


def definition(key: SetKey, version: int) -> Definition:
    """How a set of a class is declared."""
    kind = _ADDRESS[version]
    if isinstance(key, PortedPodSet):
        return Definition("set", f"type {kind} . inet_service;")
    return Definition("set", f"type {kind};" + (" flags interval;" if isinstance(key, BlockSet) else ""))


def class_rules(found: PolicyClass) -> tuple[str, ...]:
    """The rules of a class's chain."""
    lines = dict.fromkeys(f"{line}counter accept" for rule in found.rules for line in _rule(found.direction, rule))
    return (*lines, "counter drop")


def _rule(way: Direction, rule: ClassRule) -> Iterator[str]:
    ports = [""] if rule.ports is None else list(_ports(rule.ports))
    if rule.peers is None:
        yield from (f"{each} " if each else "" for each in ports)
        return
    for version, ip in _IP.items():
        name = set_name(rule.peers, version)
        if isinstance(rule.peers, PortedPodSet):
            yield f"{ip} {_PEER[way]} . {rule.peers.protocol.value.lower()} dport @{name} "
        elif not isinstance(rule.peers, BlockSet) or any(each.version == version for each in rule.peers.networks):
            yield from (f"{ip} {_PEER[way]} @{name} " + (f"{each} " if each else "") for each in ports)


def _ports(ports: tuple[PortRange, ...]) -> Iterator[str]:
    """A match a protocol."""
    for protocol in Protocol:
        ranges = port_ranges(ports, protocol)
        if ranges and ranges[0] == (0, LAST_PORT):
            yield f"meta l4proto {protocol.value.lower()}"
        elif ranges:
            listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
            yield f"{protocol.value.lower()} dport " + (f"{{ {listed} }}" if "," in listed else listed)


# --- state and difference -------------------------------------------------------------------------------------------


class PolicyRenderer:
    """Facts in (policy.policies), nft scripts out. Before the first `resync` nothing is returned."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._static = static()
        self._state = PolicySets[Definition](Words())
        self._chains: dict[str, tuple[str, ...]] = {}
        self._there: TableListing | None = None

    def update(self, facts: Mapping[Fact, Value], local_blocks: frozenset[Network]) -> tuple[str, ...]:
        """Takes facts in. `local_blocks` are the networks in which an address that nobody knows is closed: the node's
        own, or none while there is no policy."""
        touched = self._state.take(facts, local_blocks)
        self._dispatch(touched)
        for name, found in touched.classes.items():
            if name in self._state.classes:
                self._chains[name] = class_rules(found)
            else:
                self._chains.pop(name, None)
        return self._scripts({**touched.sets, **dict.fromkeys(touched.classes, ())}) if self._there is not None else ()

    def resync(self, listing: TableListing | None) -> tuple[str, ...]:
        """Takes `listing` for what the kernel has; nothing is returned when that is what should be."""
        self._there = listing or TableListing()
        sets = self._state.elements
        wanted = sets.keys() | self._there.sets.keys() | self._chains.keys() | self._there.chains.keys()
        everything = {name: dict.fromkeys((*sets.get(name, ()), *self._there.sets.get(name, ()))) for name in wanted}
        return self._scripts(everything, self._render_static())

    def _dispatch(self, touched: Touched) -> None:
        for way, address in touched.addresses:
            found = self._state.class_of[way].get(address)
            target = f"goto {class_name(found)}" if found else None
            self._state.put(f"{way.value}{address.version}", str(address), target, touched)
            isolated = str(address) in self._state.elements[f"isolated{address.version}"]
            self._state.put(f"self{address.version}", f"{address} . {address}", "" if isolated else None, touched)

    # --- scripts

    def _scripts(self, touched: Mapping[str, Iterable[str]], first: list[str] | None = None) -> tuple[str, ...]:
        change = _Change(first or [])
        there = self._there
        assert there is not None
        for name, keys in touched.items():
            if name in self._state.declared:
                self._diff_set(name, keys, there, change)
            elif name in self._chains:
                self._diff_chain(name, there, change)
            elif name in there.sets:
                change.last.append(f"delete {_kind(name)} {TABLE} {name}")
                del there.sets[name]
            elif name in there.chains and name not in self._static.chains and name != _SHAPE:
                change.unlinked.append(f"flush chain {TABLE} {name}")
                change.last.insert(0, f"delete chain {TABLE} {name}")
                del there.chains[name]
        return change.scripts(self._limit)

    def _diff_set(self, name: str, keys: Iterable[str], there: TableListing, change: _Change) -> None:
        wanted = self._state.elements[name]
        if name not in there.sets:
            made = self._state.declared[name]
            change.sets[name] = f"add {made.kind} {TABLE} {name} {{ {made.body} }}"
            there.sets[name] = {}
        have = there.sets[name]
        for key in keys:
            new, old = wanted.get(key), have.get(key)
            if new == old:
                continue
            if old is not None:
                change.removed.setdefault(name, []).append(key)
                del have[key]
            if new is not None:
                change.added.setdefault(name, []).append(f"{key} : {new}" if new else key)
                have[key] = new

    def _diff_chain(self, name: str, there: TableListing, change: _Change) -> None:
        rules = self._chains[name]
        if len(there.chains.get(name, ())) == len(rules):
            return  # it is named by its content; another number of rules says that somebody meddled with it
        change.chains.append(f"add chain {TABLE} {name}")
        if name in there.chains:
            change.chains.append(f"flush chain {TABLE} {name}")
        change.chains += [f"add rule {TABLE} {name} {rule}" for rule in rules]
        there.chains[name] = rules

    def _render_static(self) -> list[str]:
        there = self._there
        assert there is not None
        chains = self._static.chains
        same = there.mark == self._static.mark and all(
            len(there.chains.get(name, ())) == len(rules) and name in there.hooks for name, (_, rules) in chains.items()
        )
        lines = [f"add table {TABLE}"]
        lines += [
            f"add {made.kind} {TABLE} {name} {{ {made.body} }}"
            for name, made in self._static.sets.items()
            if name not in there.sets
        ]
        for name in self._static.sets:
            there.sets.setdefault(name, {})
        if same:
            return lines if len(lines) > 1 else []
        for name, (hook, rules) in chains.items():
            lines += [f"add chain {TABLE} {name} {{ {hook} }}", f"flush chain {TABLE} {name}"]
            lines += [f"add rule {TABLE} {name} {rule}" for rule in rules]
            there.chains[name], there.hooks[name] = rules, hook
        mark = f'counter comment "{self._static.mark}"'
        lines += [f"add chain {TABLE} {_SHAPE}", f"flush chain {TABLE} {_SHAPE}", f"add rule {TABLE} {_SHAPE} {mark}"]
        there.chains[_SHAPE] = (mark,)
        return lines


class _Change:
    """What has to be done, in the order in which it may be."""

    def __init__(self, first: list[str]) -> None:
        self.first = first
        self.sets: dict[str, str] = {}
        """Those that are new."""
        self.chains: list[str] = []
        self.added: dict[str, list[str]] = {}
        self.removed: dict[str, list[str]] = {}
        self.unlinked: list[str] = []
        self.last: list[str] = []

    def scripts(self, limit: int) -> tuple[str, ...]:
        """One script for new classes, one for the change, and one for what nothing refers to afterwards; more where it
        is larger than `limit` elements, and then additions before removals."""
        size = sum(map(len, self.added.values())) + sum(map(len, self.removed.values()))
        if size <= limit:
            fresh = {name: self.added.pop(name) for name in self.sets if name in self.added} if self.chains else {}
            made = [*self.first, *self.sets.values(), *_elements("add", fresh), *self.chains]
            changed = [*_elements("delete", self.removed), *_elements("add", self.added)]
            found = ["\n".join(each) for each in ((made, changed) if self.chains else ([*made, *changed],))]
        else:
            found = ["\n".join([*self.first, *self.sets.values()]), *self._pieces(limit)]
        found.append("\n".join([*self.unlinked, *self.last]))
        return tuple(f"{each}\n" for each in found if each)

    def _pieces(self, limit: int) -> Iterator[str]:
        dispatch = {f"{way.value}{version}" for way in Direction for version in VERSIONS}
        members = {name: keys for name, keys in self.added.items() if name not in dispatch}
        yield from _chunks("add", members, limit)
        yield "\n".join(self.chains)
        for name in dispatch & (self.added.keys() | self.removed.keys()):
            yield from _exchanges(name, self.removed.pop(name, []), self.added.get(name, []), limit)
        yield from _chunks("delete", self.removed, limit)


def _exchanges(name: str, removed: list[str], added: list[str], limit: int) -> Iterator[str]:
    """An element whose value changes is deleted and added in one transaction: in between its pod would be open."""
    of_key = {each.partition(" : ")[0]: each for each in added}
    keys = [*dict.fromkeys((*removed, *of_key))]
    gone = set(removed)
    for start in range(0, len(keys), limit):
        part = keys[start : start + limit]
        lines = [
            *_elements("delete", {name: [key for key in part if key in gone]}),
            *_elements("add", {name: [of_key[key] for key in part if key in of_key]}),
        ]
        yield "\n".join(lines)


def _chunks(verb: str, elements: Mapping[str, list[str]], limit: int) -> Iterator[str]:
    for name, keys in elements.items():
        for start in range(0, len(keys), limit):
            yield from _elements(verb, {name: keys[start : start + limit]})


def _elements(verb: str, elements: Mapping[str, list[str]]) -> list[str]:
    return [f"{verb} element {TABLE} {name} {{ {', '.join(keys)} }}" for name, keys in elements.items() if keys]


def _kind(name: str) -> str:
    return "map" if name.startswith(("egress", "ingress")) else "set"
