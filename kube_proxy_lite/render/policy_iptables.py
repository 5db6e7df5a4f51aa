"""NetworkPolicy in iptables and ipset: chains grow with classes, sets with pods. Facts in, steps out. Pure.

    policy_iptables_rules   a packet's path; the chains of classes; the trees by address
    policy_sets             which sets and classes there are
    here                    what changes, in which order

**Two tools, one change.** A set changes by `ipset restore`, chains by `iptables-restore`, which commits a table of one
family whole; nothing makes both one commit. The order must do, and it keeps two promises for whatever one object of the
cluster changes: what is allowed before and after is allowed in between, and nothing is open in between that is closed
before and after.

    1  sets    an address that nobody has any more is unknown (closed at once); new sets, filled; members that come
    2  rules   new classes, and which pod is in which: one commit
    3  sets    members that go; addresses that have become known (open only now); local blocks
    4  rules   chains that nothing leads to, in a commit of their own: a packet may be on its way through one
    5          sets that no rule names

Members that come and go without a change of rules are one `ipset restore`. One change needs more: a pod of this node
whose labels put it in another class and also in other sets. Until 3 its peers would judge it by what it was or by what
it is, and its own class by what it is. So it is **held** first: judged by both of its classes, one after the other
(`PODWIRE-AND-…`), then 1 to 3, and last by the new one alone. A pod that comes or goes needs no hold where the daemon
has said which blocks are the node's, since an address that is not known is closed there.

An event by which two addresses change hands at once (a pod takes one that another still has) may close for a moment
what passes between these two; it opens nothing.

Changes of several objects that are in one run pass through states that these changes have in some other order; the API
promises none between kinds. What is larger than one restore takes (`LIMIT` lines) is several commits.

**Restart.** Names are digests of contents, so a restart finds its own and changes nothing. Where pods are dispatched to
is read back from the chains, so that a change that happened meanwhile takes the same steps.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import msgspec

from kube_proxy_lite.model import Address, Network
from kube_proxy_lite.policy.membership import Fact, Value
from kube_proxy_lite.policy.model import Direction, Member, PodSet, PortedPodSet, SetKey
from kube_proxy_lite.render.iptables_listing import Listing, is_same
from kube_proxy_lite.render.iptables_transactions import LIMIT, Batch, Transaction
from kube_proxy_lite.render.iptables_tree import Chains, Rules
from kube_proxy_lite.render.nftables_elements import address_text
from kube_proxy_lite.render.policy_iptables_rules import (
    JUMP,
    TABLE,
    PodTree,
    chain_of,
    class_chain,
    constant_chains,
    hold_name,
    hold_rules,
    read_tree,
    set_of,
)
from kube_proxy_lite.render.policy_sets import VERSIONS, Elements, PolicySets, class_name

MOST = 1 << 20
"""Members that a set may have; ipset's own default is 65,536."""
_FAMILY = {4: "inet", 6: "inet6"}
_FIXED = ("known", "local", "isolated")
Move = tuple[Direction, Address]


class PolicyStep(msgspec.Struct, frozen=True, kw_only=True):
    """What is done together, in this order: a text for `ipset restore`, restores of chains, sets that are destroyed."""

    sets: str = ""
    rules: tuple[Transaction, ...] = ()
    unused: tuple[str, ...] = ()


class PolicyListing(msgspec.Struct):
    """What the kernel has of ours: members by set (policy_sets' names), and each family's chains."""

    sets: dict[str, Elements] = {}
    rules: dict[int, Listing] = {}


class Words:
    """Sets as ipset writes them (policy_sets.Words)."""

    def always(self) -> Mapping[str, str]:
        """See policy_sets.Words."""
        kinds = (("known", "hash:ip"), ("isolated", "hash:ip"), ("local", "hash:net"))
        return {f"{name}{version}": _declared(kind, version) for name, kind in kinds for version in VERSIONS}

    def declare(self, key: SetKey, version: int) -> str:
        """See policy_sets.Words."""
        kind = "hash:ip" if isinstance(key, PodSet) else "hash:ip,port" if isinstance(key, PortedPodSet) else "hash:net"
        return _declared(kind, version)

    def member(self, key: SetKey, member: Member) -> str:
        """See policy_sets.Words."""
        if isinstance(key, PortedPodSet) and isinstance(member, tuple):
            return f"{address_text(member[0])},{key.protocol.lower()}:{member[1]}"
        return str(member)

    def network(self, network: Network) -> tuple[str, ...]:
        """See policy_sets.Words; hash:net knows no network of length 0, and writes addresses without a length."""
        if network.prefixlen == 0:
            return tuple(map(str, network.subnets()))
        return (str(network.network_address) if network.num_addresses == 1 else str(network),)


def _declared(kind: str, version: int) -> str:
    return f"{kind} family {_FAMILY[version]} maxelem {MOST}"


class PolicyIptablesRenderer:
    """Facts in (policy.policies), steps out. Before the first `resync` nothing is returned."""

    def __init__(self, versions: Sequence[int] = VERSIONS, limit: int = LIMIT) -> None:
        self._limit = limit
        self._state = PolicySets[str](Words())
        self._families = {version: _Family(version, self._state) for version in versions}
        self._there: dict[str, Elements] | None = None

    def update(self, facts: Mapping[Fact, Value], local_blocks: frozenset[Network]) -> tuple[PolicyStep, ...]:
        """Takes facts in. `local_blocks` are the networks in which an address that nobody knows is closed: the node's
        own, or none while there is no policy."""
        touched = self._state.take(facts, local_blocks)
        if self._there is None:
            return ()
        return self._steps(touched.sets, touched.addresses, touched.classes, whole=False)

    def resync(self, listing: PolicyListing) -> tuple[PolicyStep, ...]:
        """Takes `listing` for what the kernel has; nothing is returned when that is what should be."""
        self._there = {name: dict(elements) for name, elements in listing.sets.items()}
        for version, family in self._families.items():
            family.take(listing.rules.get(version, Listing()))
        sets = {
            name: dict.fromkeys((*self._state.elements.get(name, ()), *self._there.get(name, ())))
            for name in self._state.elements.keys() | self._there.keys()
        }
        moves = chain.from_iterable(family.all_moves() for family in self._families.values())
        return self._steps(sets, moves, self._state.classes, whole=True)

    def _steps(
        self, sets: Mapping[str, Iterable[str]], addresses: Iterable[Move], classes: Iterable[str], *, whole: bool
    ) -> tuple[PolicyStep, ...]:
        assert self._there is not None
        change = _SetChange(self._there)
        members = set(self._members_of(sets))
        moved = list(addresses)
        held = {each for each in moved if each[1] in members and not self._is_guarded(each[1])}
        for name in sorted(sets, key=_rank):
            change.diff(name, sets[name], self._state)
        stages: dict[str, list[Transaction]] = {"hold": [], "move": [], "release": [], "remove": []}
        for version, family in self._families.items():
            mine = [each for each in moved if each[1].version == version]
            for stage, batch in family.change(mine, held, list(classes), whole=whole):
                stages[stage] += batch.transactions(self._limit)
        return _in_order(change, {name: tuple(found) for name, found in stages.items()})

    def _members_of(self, sets: Mapping[str, Iterable[str]]) -> Iterable[Address]:
        """Addresses that come into, or leave, sets that rules may name already."""
        assert self._there is not None
        for name, keys in sets.items():
            if name.startswith(("b_", *_FIXED)) or name not in self._there or name not in self._state.elements:
                continue
            have, wanted = self._there[name], self._state.elements[name]
            yield from (ipaddress.ip_address(key.partition(",")[0]) for key in keys if (key in have) != (key in wanted))

    def _is_guarded(self, address: Address) -> bool:
        """Whether nothing passes to or from `address` before it is known, or after it is not."""
        assert self._there is not None
        name, text = f"known{address.version}", str(address)
        local = map(ipaddress.ip_network, self._there.get(f"local{address.version}", ()))
        is_known = text in self._there.get(name, ()) and text in self._state.elements[name]
        return not is_known and any(address in network for network in local)


def _rank(name: str) -> int:
    """Known addresses go before the blocks in which others are closed."""
    return 2 if name.startswith("local") else 1 if name.startswith("known") else 0


def _in_order(change: _SetChange, rules: Mapping[str, tuple[Transaction, ...]]) -> tuple[PolicyStep, ...]:
    hold, move, release, remove = (rules[name] for name in ("hold", "move", "release", "remove"))
    if hold:
        steps = [PolicyStep(sets=_text(change.first), rules=hold), PolicyStep(sets=_text(change.added), rules=move)]
    else:
        steps = [PolicyStep(sets=_text([*change.first, *change.added]), rules=move)]
    steps.append(PolicyStep(sets=_text([*change.removed, *change.last]), rules=release))
    if len(steps) == 2 and not move:  # nothing but sets: one text
        steps = [PolicyStep(sets=steps[0].sets + steps[1].sets, rules=release)]
    steps.append(PolicyStep(rules=remove, unused=tuple(change.unused)))
    return tuple(each for each in steps if each != PolicyStep())


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


# --- sets -----------------------------------------------------------------------------------------------------------


class _SetChange:
    """Lines for ipset, by when they are due; `there` is what the kernel is believed to have, and is kept up."""

    def __init__(self, there: dict[str, Elements]) -> None:
        self._there = there
        self.first: list[str] = []
        self.added: list[str] = []
        self.removed: list[str] = []
        self.last: list[str] = []
        self.unused: list[str] = []

    def diff(self, name: str, keys: Iterable[str], state: PolicySets[str]) -> None:
        """What brings these keys of a set to what they should be, and the set itself."""
        if name not in state.elements:
            if self._there.pop(name, None) is not None:
                self.unused.append(set_of(name))
            return
        new = name not in self._there
        if new:
            self.first += [f"create {set_of(name)} {state.declared[name]} -exist", f"flush {set_of(name)}"]
            self._there[name] = {}
        have, wanted = self._there[name], state.elements[name]
        added, removed = self.added, self.removed
        if name.startswith("known"):
            added, removed = self.last, self.first
        elif name.startswith("local"):
            added = removed = self.last
        elif new and not name.startswith(_FIXED):
            added = self.first
        for key in keys:
            if key in wanted and key not in have:
                added.append(f"add {set_of(name)} {key}")
                have[key] = ""
            elif key in have and key not in wanted:
                removed.append(f"del {set_of(name)} {key}")
                del have[key]


# --- chains ---------------------------------------------------------------------------------------------------------


class _Family:
    """One family's chains: what the kernel is believed to have, and where its pods are dispatched to."""

    def __init__(self, version: int, state: PolicySets[str]) -> None:
        self._version = version
        self._state = state
        self._trees = {way: PodTree(way, version) for way in Direction}
        self._there: dict[str, Rules] = {}
        self._held: frozenset[str] = frozenset()
        self._jumps: tuple[str, ...] = ()

    def take(self, listing: Listing) -> None:
        """`listing` is what the kernel has."""
        self._there = {name: rules for (_, name), rules in listing.chains.items()}
        self._held = frozenset(name for _, name in listing.held)
        self._jumps = listing.jumps.get((TABLE, "FORWARD"), ())
        self._trees = {way: PodTree(way, self._version) for way in Direction}
        for way, tree in self._trees.items():
            for address, target in read_tree(self._there, way, self._version).items():
                if target in self._there:
                    tree.set(address, target)

    def all_moves(self) -> Iterable[Move]:
        """Every address that is dispatched, or should be."""
        for way, tree in self._trees.items():
            wanted = (each for each in self._state.class_of[way] if each.version == self._version)
            yield from ((way, address) for address in dict.fromkeys((*wanted, *tree.addresses())))

    def change(
        self, moved: list[Move], held: set[Move], classes: list[str], *, whole: bool
    ) -> Iterable[tuple[str, Batch]]:
        """(stage, what it writes) in order: hold, move, release, remove; those in which nothing is to be done are
        left out. `whole` says to look at every chain."""
        targets = {each: self._target(each) for each in moved}
        holding = [
            each for each in moved if each in held and self._trees[each[0]].targets.get(int(each[1])) != targets[each]
        ]
        written, gone = self._classes(classes, whole=whole)
        if holding:
            between = {each: self._between(each, targets[each], written) for each in holding}
            yield "hold", self._write(self._retarget(between, gone, written))
            written = {}
        rest = {each: target for each, target in targets.items() if each not in holding}
        self._retarget(rest, gone, written)
        if whole:
            self._rewrite(written, gone)
        if written or (whole and self._jumps != (JUMP,)):
            yield "move", self._write(written, jumps=whole)
        if holding:
            last: Chains = {}
            self._retarget({each: targets[each] for each in holding}, gone, last)
            gone |= {name: None for name in self._there if name.startswith("PODWIRE-AND-")}
            yield "release", self._write(last)
        if gone:
            yield "remove", self._remove(gone)

    def _target(self, move: Move) -> str | None:
        found = self._state.class_of[move[0]].get(move[1])
        return chain_of(class_name(found)) if found else None

    def _between(self, move: Move, after: str | None, written: Chains) -> str | None:
        """The chain for what a pod's class before and its class after both allow."""
        before = self._trees[move[0]].targets.get(int(move[1]))
        if before is None or after is None:
            return before or after
        name = hold_name(before, after)
        written[name] = hold_rules(before, after)
        return name

    def _classes(self, names: Iterable[str], *, whole: bool) -> tuple[Chains, dict[str, None]]:
        """Chains of classes that are to be written, and that are not wanted any more."""
        written: Chains = {}
        gone: dict[str, None] = {}
        for name in names:
            found = self._state.classes.get(name)
            if found is not None:
                chain_name, rules = class_chain(found, self._version)
                self._note(chain_name, rules, written, whole=whole)
            elif chain_of(name) in self._there:
                gone[chain_of(name)] = None
        return written, gone

    def _retarget(self, targets: Mapping[Move, str | None], gone: dict[str, None], written: Chains) -> Chains:
        """Sends addresses elsewhere; adds the chains of the trees that this changes to `written`, and returns it."""
        for way, tree in self._trees.items():
            mine = {
                address: target
                for (of, address), target in targets.items()
                if of is way and tree.targets.get(int(address)) != target
            }
            if not mine:
                continue
            keys = {int(address) for address in mine}
            before = tree.all_chains(keys)
            for address, target in mine.items():
                tree.set(address, target)
            after = tree.all_chains(keys)
            for name, rules in after.items():
                self._note(name, rules, written, whole=False)
                gone.pop(name, None)
            gone |= {name: None for name in before if name not in after and name in self._there}
        return written

    def _rewrite(self, written: Chains, gone: dict[str, None]) -> None:
        """Looks at every chain but those of classes."""
        wanted = {chain_of(name) for name in self._state.classes}
        for found in (*(tree.all_chains() for tree in self._trees.values()), constant_chains(self._version)):
            wanted |= found.keys()
            for name, rules in found.items():
                self._note(name, rules, written, whole=True)
        gone |= {name: None for name in self._there if name not in wanted}

    def _note(self, name: str, rules: Rules, written: Chains, *, whole: bool) -> None:
        have = self._there.get(name)
        if have == rules:
            written.pop(name, None)
        elif whole and have is not None and is_same(rules, have):
            self._there[name] = rules
        else:
            written.pop(name, None)  # what refers to others goes after them
            written[name] = rules

    def _write(self, written: Chains, *, jumps: bool = False) -> Batch:
        batch = Batch(self._version)
        batch.written = {(TABLE, name): rules for name, rules in written.items()}
        self._there |= written
        if jumps and self._jumps != (JUMP,):
            batch.jumps = [(TABLE, f"-I FORWARD {JUMP}")] if JUMP not in self._jumps else []
            extra = list(self._jumps)
            if JUMP in extra:
                extra.remove(JUMP)
            batch.jumps += [(TABLE, f"-D FORWARD {rule}") for rule in extra]
            self._jumps = (JUMP,)
        return batch

    def _remove(self, gone: Iterable[str]) -> Batch:
        batch = Batch(self._version)
        for name in gone:
            if name in self._held:
                batch.emptied.append((TABLE, name))
                self._there[name] = ()
            else:
                batch.removed.append((TABLE, name))
                self._there.pop(name, None)
        return batch


def removal(version: int, there: Listing) -> tuple[Transaction, ...]:
    """What takes all chains of one family out."""
    batch = Batch(version)
    batch.jumps = [(table, f"-D {name} {rule}") for (table, name), rules in there.jumps.items() for rule in rules]
    for name in there.chains:
        (batch.emptied if name in there.held else batch.removed).append(name)
    return batch.transactions()


def parse_sets(text: str) -> dict[str, Elements]:
    """What `ipset save` prints: our sets by policy_sets' names, with their members."""
    found: dict[str, Elements] = {}
    prefix = set_of("")
    for line in text.splitlines():
        verb, name, *rest = line.split(" ", 2)
        if not name.startswith(prefix):
            continue
        if verb == "create":
            found[name.removeprefix(prefix)] = {}
        elif verb == "add":
            found[name.removeprefix(prefix)][rest[0].partition(" ")[0]] = ""
    return found
