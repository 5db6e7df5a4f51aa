"""What facts of policies add up to, before it is anybody's rules: sets, classes, and which address is in which. Pure.

    facts (policy.policies) ──▶ PolicySets.take ──▶ elements, classes, class_of   ──▶ nftables, or iptables and ipset

A set of a class is two, one for each family; beside them are those that are always there: addresses of `known` pods
and of `isolated` ones, and the `local` blocks in which an address that nobody knows is closed. How a set is declared
and how a member is written is the renderer's business (`Words`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, TypeVar

import msgspec

from kube_proxy_lite.model import Address, Network
from kube_proxy_lite.policy.membership import Fact, Value
from kube_proxy_lite.policy.model import (
    BlockSet,
    Direction,
    Member,
    PodSet,
    PolicyClass,
    PortedPodSet,
    PortRange,
    SetKey,
    digest,
)

VERSIONS = (4, 6)
PREFIX = {Direction.INGRESS: "in", Direction.EGRESS: "eg"}
D = TypeVar("D", covariant=True)
T = TypeVar("T")
Elements = dict[str, str]
"""Key → value as they are written; the value of a set's is empty."""


class Words(Protocol[D]):
    """How a renderer writes sets."""

    def always(self) -> Mapping[str, D]:
        """The sets that are always there, `local4`, `known4`, `isolated4` and those of 6 among them."""
        ...

    def declare(self, key: SetKey, version: int) -> D:
        """How a set of a class is declared."""
        ...

    def member(self, key: SetKey, member: Member) -> str:
        """A member of a set of pods."""
        ...

    def network(self, network: Network) -> tuple[str, ...]:
        """The elements that a network is."""
        ...


class Touched(msgspec.Struct):
    """What facts may have changed: keys by set, classes by the name of their chain, and addresses."""

    sets: dict[str, dict[str, None]] = {}
    classes: dict[str, PolicyClass] = {}
    addresses: dict[tuple[Direction, Address], None] = {}


class PolicySets(Generic[T]):
    """The sets and classes that should be."""

    def __init__(self, words: Words[T]) -> None:
        self._words = words
        self.declared: dict[str, T] = dict(words.always())
        self.elements: dict[str, Elements] = {name: {} for name in self.declared}
        self.classes: dict[str, PolicyClass] = {}
        self.class_of: dict[Direction, dict[Address, PolicyClass]] = {way: {} for way in Direction}
        self._blocks: frozenset[Network] = frozenset()

    def take(self, facts: Mapping[Fact, Value], local_blocks: frozenset[Network]) -> Touched:
        """Takes facts in. `local_blocks` are the networks in which an address that nobody knows is closed."""
        touched = Touched()
        for fact, value in facts.items():
            if isinstance(fact, PolicyClass):
                self._take_class(fact, bool(value), touched)
            elif isinstance(fact, PodSet | PortedPodSet | BlockSet):
                self._take_set(fact, bool(value), touched)
            elif not isinstance(fact, tuple):
                self.put(f"known{fact.version}", str(fact), "" if value else None, touched)
            elif isinstance(fact[0], Direction):
                self._take_dispatch(fact[0], fact[1], value, touched)
            else:
                key, member = fact
                name = set_name(key, version_of(member))
                if name in self.elements:
                    self.put(name, self._words.member(key, member), "" if value else None, touched)
        for network in local_blocks ^ self._blocks:
            for element in self._words.network(network):
                self.put(f"local{network.version}", element, "" if network in local_blocks else None, touched)
        self._blocks = local_blocks
        return touched

    def put(self, name: str, key: str, value: str | None, touched: Touched) -> None:
        """`key` is in the set `name` with `value`, None: is not."""
        touched.sets.setdefault(name, {})[key] = None
        if value is None:
            self.elements[name].pop(key, None)
        else:
            self.elements[name][key] = value

    def _take_class(self, found: PolicyClass, there: bool, touched: Touched) -> None:
        name = class_name(found)
        touched.classes[name] = found
        if there:
            self.classes[name] = found
        else:
            self.classes.pop(name, None)

    def _take_set(self, key: SetKey, there: bool, touched: Touched) -> None:
        for version in VERSIONS:
            name = set_name(key, version)
            touched.sets.setdefault(name, {})
            if not there:
                self.elements.pop(name, None)
                self.declared.pop(name, None)
                continue
            self.declared[name] = self._words.declare(key, version)
            self.elements.setdefault(name, {})
            for network in key.networks if isinstance(key, BlockSet) else ():
                for element in self._words.network(network) if network.version == version else ():
                    self.put(name, element, "", touched)

    def _take_dispatch(self, way: Direction, address: Address, value: Value, touched: Touched) -> None:
        touched.addresses[way, address] = None
        if isinstance(value, PolicyClass):
            self.class_of[way][address] = value
        else:
            self.class_of[way].pop(address, None)
        isolated = any(address in found for found in self.class_of.values())
        self.put(f"isolated{address.version}", str(address), "" if isolated else None, touched)


# --- names and numbers ------------------------------------------------------------------------------------------


def class_name(found: PolicyClass) -> str:
    """`in_` or `eg_` and the digest of the class."""
    return f"{PREFIX[found.direction]}_{digest(found)}"


def set_name(key: SetKey, version: int) -> str:
    """`p_`, `n_` (with ports) or `b_` (blocks), the digest, and the family."""
    letter = "p" if isinstance(key, PodSet) else "n" if isinstance(key, PortedPodSet) else "b"
    return f"{letter}_{digest(key)}_{version}"


def version_of(member: Member) -> int:
    """The family of a member."""
    return member[0].version if isinstance(member, tuple) else member.version


def port_ranges(ports: Iterable[PortRange], protocol: str) -> list[tuple[int, int]]:
    """The ports of one protocol, in ranges that neither overlap nor touch; [(0, 65535)] is all of them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted((each.first, each.last) for each in ports if each.protocol == protocol):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged
