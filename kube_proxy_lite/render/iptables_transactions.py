"""Changes of chains as texts for iptables-restore, of bounded size and in an order in which no packet gets lost. Pure.

    1  nat      chains that are new or others: what is referred to comes first, the roots last
    2  filter   the same; after nat, so that an endpoint that has come is reached before it is refused no longer
    3  jumps    from the kernel's chains into ours
    4  removals first emptied, all of them, then deleted: nothing may lead to a chain that is deleted

What belongs to a change of ordinary size is one text, and each of its tables is committed whole: a packet meets the old
chains or the new ones. What is larger (the start) is cut into pieces, each of which leaves a state that is right.

**Size.** iptables-nft takes time by the square of what one restore holds, so pieces are small: `LIMIT` lines. The
legacy tables are read and written as a whole for every restore, so there the applier puts the pieces together again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from kube_proxy_lite.render.iptables_listing import Chain
from kube_proxy_lite.render.iptables_tree import Rules

LIMIT = 1500
"""Lines in one transaction."""
TABLES = ("nat", "filter")
"""Those that Services are in."""
ORDER = (*TABLES, "mangle")
"""In which order tables are written; policies are in mangle."""


class Transaction(msgspec.Struct, frozen=True, kw_only=True):
    """Lines for one restore of one family, by table."""

    version: int
    nat: tuple[str, ...] = ()
    filter: tuple[str, ...] = ()
    mangle: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What iptables-restore --noflush is given."""
        parts = []
        for table, lines in zip(ORDER, (self.nat, self.filter, self.mangle), strict=True):
            if lines:
                parts += [f"*{table}", *lines, "COMMIT\n"]
        return "\n".join(parts).replace("COMMIT\n\n", "COMMIT\n")

    @property
    def lines(self) -> int:
        """How many there are."""
        return len(self.nat) + len(self.filter) + len(self.mangle)


def joined(transactions: Iterable[Transaction]) -> Transaction | None:
    """Several of one family as one; None for none."""
    every = tuple(transactions)
    if not every:
        return None
    return Transaction(
        version=every[0].version,
        nat=tuple(line for each in every for line in each.nat),
        filter=tuple(line for each in every for line in each.filter),
        mangle=tuple(line for each in every for line in each.mangle),
    )


class Batch:
    """Collects what has to be done in one family, and puts it in order."""

    def __init__(self, version: int) -> None:
        self._version = version
        self.written: dict[Chain, Rules] = {}
        """Chains that are made, or get other rules; what is referred to first."""
        self.jumps: list[tuple[str, str]] = []
        """(table, `-I …` or `-D …`)."""
        self.emptied: list[Chain] = []
        """Chains that cannot be deleted because somebody else leads to them."""
        self.removed: list[Chain] = []

    def transactions(self, limit: int = LIMIT) -> tuple[Transaction, ...]:
        """In order."""
        pieces = [*self._pieces(limit), *self._removals(limit)]
        whole = joined(pieces)
        return (whole,) if whole and whole.lines <= limit else tuple(pieces)

    def _pieces(self, limit: int) -> Iterator[Transaction]:
        for table in ORDER:
            declared: list[str] = []
            rules: list[str] = []
            for (of, name), lines in self.written.items():
                if of != table:
                    continue
                declared.append(f":{name} - [0:0]")
                rules += [f"-A {name} {rule}" for rule in lines]
                if len(declared) + len(rules) >= limit:
                    yield self._made(table, [*declared, *rules])
                    declared, rules = [], []
            rules += [line for of, line in self.jumps if of == table]
            if declared or rules:
                yield self._made(table, [*declared, *rules])

    def _removals(self, limit: int) -> Iterator[Transaction]:
        for table in ORDER:
            names = [name for of, name in (*self.emptied, *self.removed) if of == table]
            for start in range(0, len(names), limit):
                yield self._made(table, [f":{name} - [0:0]" for name in names[start : start + limit]])
        for table in ORDER:
            names = [name for of, name in self.removed if of == table]
            for start in range(0, len(names), limit):
                yield self._made(table, [f"-X {name}" for name in names[start : start + limit]])

    def _made(self, table: str, lines: list[str]) -> Transaction:
        return Transaction(version=self._version, **{table: tuple(lines)})
