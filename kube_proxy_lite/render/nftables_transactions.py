"""Changes of elements as nft scripts of bounded size, in an order in which no packet is sent to nowhere.

    1  chains                of a table that is there already                        a transaction of its own
    2  what is referred to   slots, the sets that say how
    3  flips                 the maps that say where a connection goes
    4  removals              what nobody is sent to any more: slots, chains          a transaction of its own

The middle two share a transaction where they fit. Removals never join them: a packet that has looked up its chain
before a commit finds its slot after it (79 of 800 flips under load lost a packet in one transaction, in two none). And
chains do not: a packet keeps the generation of rules that it began with, yet sees elements as they are when it looks
them up, so one that is on its way during a commit would find the new element, and the chain it leads to still empty.
A value is replaced by deleting and adding its element in one transaction, which is seen as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from kube_proxy_lite.render.nftables_elements import INTERVALS

LIMIT = 5000
"""Elements in one transaction: some 25 ms of the kernel's time."""


class Change(NamedTuple):
    """One element: `old` is None when it is new, `new` when it goes; the empty text is the value of a set's."""

    table: str
    set: str
    key: str
    old: str | None
    new: str | None


class Stale(msgspec.Struct, frozen=True):
    """What clients were remembered for that holds no more: `place` as in an element's key, with all of its endpoints
    when `endpoints` is empty."""

    table: str
    place: str
    endpoints: frozenset[str]


class Learning(msgspec.Struct, frozen=True):
    """An empty chain that is to get the rules which remember clients for so many seconds, as messages."""

    version: int
    chain: str
    seconds: int


class Transaction(msgspec.Struct, frozen=True):
    """One script for `nft -f`, whole or not at all. `elements` counts those that are added, replaced or deleted.

    `learning` are rules that nft cannot be told as text, to be added afterwards. `stale` are entries of the affinity
    maps to be deleted then. Only the kernel knows them, since it learns them.
    """

    script: str
    elements: int
    stale: tuple[Stale, ...] = ()
    learning: tuple[Learning, ...] = ()


class Batch:
    """Collects what has to be done, and puts it in order."""

    def __init__(self) -> None:
        self.chains: list[str] = []
        """Commands that make chains which elements will lead to, in a table that packets pass through already."""
        self.first: list[str] = []
        """Commands that make a table, or the rules that are always there, in one with the first elements."""
        self.referred: list[Change] = []
        self.flips: list[Change] = []
        self.finish: list[str] = []
        """Commands that come after all that is added."""
        self.removals: list[Change] = []
        self.last: list[str] = []
        """Commands that come after everything else: chains that are not needed."""
        self.stale: list[Stale] = []
        self.learning: dict[str, Learning] = {}
        """By the command of `chains` or `first` that makes the chain."""

    def transactions(self, limit: int = LIMIT) -> tuple[Transaction, ...]:
        """In order; `limit` elements at most in each."""
        # elements that overlap must be gone before others come
        self.referred.sort(key=_turn)
        made = _transactions(self.chains, (), (), limit)
        made += _transactions(self.first, [*self.referred, *self.flips], self.finish, limit)
        made += _transactions([], self.removals, self.last, limit)
        if self.learning:
            made = [self._with_learning(each) for each in made]
        if self.stale:
            last = made.pop() if made else Transaction("", 0)
            made.append(msgspec.structs.replace(last, stale=tuple(self.stale)))
        return tuple(made)

    def _with_learning(self, made: Transaction) -> Transaction:
        lines = set(made.script.splitlines())
        return msgspec.structs.replace(
            made, learning=tuple(each for command, each in self.learning.items() if command in lines)
        )


def _transactions(
    before: Sequence[str], changes: Sequence[Change], after: Sequence[str], limit: int
) -> list[Transaction]:
    pieces = [changes[start : start + limit] for start in range(0, len(changes), limit)]
    if not pieces and (before or after):
        pieces = [()]
    made = []
    for number, piece in enumerate(pieces):
        lines = [*(before if number == 0 else ()), *_commands(piece), *(after if number == len(pieces) - 1 else ())]
        made.append(Transaction("\n".join(lines) + "\n", len(piece)))
    return made


def _commands(changes: Iterable[Change]) -> Iterator[str]:
    """Grouped by set, deletions first: the elements of one command cost little more than one."""
    deleted: dict[tuple[str, str], list[str]] = {}
    added: dict[tuple[str, str], list[str]] = {}
    for table, name, key, old, new in changes:
        if old is not None:
            deleted.setdefault((table, name), []).append(key)
        if new is not None:
            added.setdefault((table, name), []).append(f"{key} : {new}" if new else key)
    for verb, groups in (("delete", deleted), ("add", added)):
        for (table, name), keys in groups.items():
            yield f"{verb} element {table} {name} {{ {', '.join(keys)} }}"


def _turn(change: Change) -> int:
    return 0 if change.set in INTERVALS and change.new is None else 1
