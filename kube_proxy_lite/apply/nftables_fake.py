"""A kernel for tests that takes what the nftables renderer writes, as strictly as the real one.

It refuses what the kernel refuses: elements added with another value or deleted when they are not there, intervals that
overlap, verdicts and rules that lead to a chain that is not there, chains deleted while something leads to them. And it
refuses what the kernel would let pass and we do not want: tables of others, commands that the renderer never writes,
and chains that one transaction makes and leads packets to (nftables_transactions). tests/netns/
test_services_nft_kernel.py holds it and nft to the same scripts.
"""

from __future__ import annotations

import copy
import ipaddress
import re
from collections.abc import Sequence

from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables_elements import INTERVALS
from kube_proxy_lite.render.nftables_layout import AFFINITY, WORDS, chain_rules
from kube_proxy_lite.render.nftables_listing import Listing, TableListing
from kube_proxy_lite.render.nftables_transactions import Transaction

_NAME = r"(ip6? podwire_proxy|inet podwire_policy)"
_COMMANDS = {
    "add_table": re.compile(rf"add table {_NAME}"),
    "delete_table": re.compile(rf"delete table {_NAME}"),
    "add_set": re.compile(rf"add (?:set|map) {_NAME} (\w+) \{{ .+; \}}"),
    "delete_set": re.compile(rf"delete (?:set|map) {_NAME} (\w+)"),
    "add_base_chain": re.compile(rf"add chain {_NAME} (\w+) \{{ (type .+;) \}}"),
    "add_chain": re.compile(rf"add chain {_NAME} (\w+)"),
    "flush_chain": re.compile(rf"flush chain {_NAME} (\w+)"),
    "delete_chain": re.compile(rf"delete chain {_NAME} (\w+)"),
    "add_rule": re.compile(rf"add rule {_NAME} (\w+) (.+)"),
    "add_element": re.compile(rf"add element {_NAME} (\w+) \{{ (.+) \}}"),
    "delete_element": re.compile(rf"delete element {_NAME} (\w+) \{{ (.+) \}}"),
}
_TARGET = re.compile(r"(?:goto|jump) (\w+)$")
_SET = re.compile(r"@(\w+)")


class FakeNft:
    """interface.Applier without a kernel. `sizes` has how many elements each transaction changed."""

    def __init__(self, versions: Sequence[int] = (4, 6)) -> None:
        self._versions = tuple(versions)
        self.tables: dict[str, TableListing] = {}
        self.sizes: list[int] = []

    async def apply(self, transactions: Sequence[Transaction]) -> None:
        """See interface.Applier."""
        self.commit(transactions)

    async def read(self) -> Listing:
        """See interface.Applier."""
        return self.listing()

    async def remove(self) -> None:
        """See interface.Applier."""
        self.tables.clear()

    def commit(self, transactions: Sequence[Transaction]) -> None:
        """Carry transactions out. Raises ApplyFailed; the one that failed has changed nothing."""
        for transaction in transactions:
            self.sizes.append(transaction.elements)
            self.run(transaction.script)
            for each in transaction.learning:
                words = WORDS[each.version]
                table = self.tables[words.table]
                if table.chains[each.chain]:
                    raise ApplyFailed(f"{each.chain} is not empty")
                table.chains[each.chain] = chain_rules(words, each.chain)
            for stale in transaction.stale:
                entries = self.tables[stale.table].sets[AFFINITY]
                for key in [key for key in entries if key.split(" . ", 1)[1].endswith(stale.place)]:
                    if not stale.endpoints or entries[key] in stale.endpoints:
                        del entries[key]

    def listing(self) -> Listing:
        """A copy of what there is."""
        return {version: copy.deepcopy(self.tables.get(WORDS[version].table)) for version in self._versions}

    def run(self, script: str) -> None:
        """One script, whole or not at all."""
        before = copy.deepcopy(self.tables)
        try:
            for line in script.splitlines():
                self._command(line)
            self._check()
            _check_targets(script, before)
        except ApplyFailed:
            self.tables = before
            raise

    def _command(self, line: str) -> None:
        for name, pattern in _COMMANDS.items():
            if match := pattern.fullmatch(line):
                table, *rest = match.groups()
                if name == "add_table":
                    self.tables.setdefault(table, TableListing())
                elif table not in self.tables:
                    raise ApplyFailed(f"{line[:200]}: no table")
                elif name == "delete_table":
                    del self.tables[table]
                else:
                    _change(name, self.tables[table], rest, line[:200])
                return
        raise ApplyFailed(f"not a command that is written: {line[:200]!r}")

    def _check(self) -> None:
        for table in self.tables.values():
            for chain, rules in table.chains.items():
                for rule in rules:
                    if (found := _TARGET.search(rule)) and found[1] not in table.chains:
                        raise ApplyFailed(f"{chain} leads to {found[1]}, which is not there")
                    if missing := {name for name in _SET.findall(rule) if name not in table.sets}:
                        raise ApplyFailed(f"{chain} asks {missing}, which is not there")
            for name, elements in table.sets.items():
                for key, value in elements.items():
                    if (found := _TARGET.fullmatch(value)) and found[1] not in table.chains:
                        raise ApplyFailed(f"{name} {key} leads to {found[1]}, which is not there")


def _change(name: str, table: TableListing, rest: list[str], line: str) -> None:
    what = rest[0]
    if name == "add_set":
        table.sets.setdefault(what, {})
    elif name == "delete_set":
        if table.sets.pop(what, None) is None:
            raise ApplyFailed(f"{line}: no set")
    elif name in ("add_chain", "add_base_chain"):
        table.chains.setdefault(what, ())
        if name == "add_base_chain":
            table.hooks[what] = rest[1]
    elif name in ("flush_chain", "delete_chain", "add_rule"):
        if what not in table.chains:
            raise ApplyFailed(f"{line}: no chain")
        if name == "delete_chain":
            del table.chains[what]
        else:
            table.chains[what] = (*table.chains[what], rest[1]) if name == "add_rule" else ()
    elif what not in table.sets:
        raise ApplyFailed(f"{line}: no set")
    else:
        for item in rest[1].split(", "):
            key, _, value = item.partition(" : ")
            if name == "add_element":
                _add(table.sets[what], what, key, value)
            elif table.sets[what].pop(key, None) is None:
                raise ApplyFailed(f"{line}: {key} is not there")


def _add(elements: dict[str, str], name: str, key: str, value: str) -> None:
    if elements.get(key, value) != value:
        raise ApplyFailed(f"{name} {key} is {elements[key]}, not {value}")
    if name in INTERVALS and key not in elements:
        place, _, network = key.rpartition(" . ")
        for other in elements:
            its_place, _, its_network = other.rpartition(" . ")
            first, second = ipaddress.ip_network(network), ipaddress.ip_network(its_network)
            if its_place == place and first.version == second.version and first.overlaps(second):
                raise ApplyFailed(f"{name}: {key} overlaps {other}")
    elements[key] = value


def _check_targets(script: str, before: dict[str, TableListing]) -> None:
    """A packet that is on its way would find such a chain without rules; none is in a table that is being made."""
    lines = script.splitlines()
    for line in lines:
        if match := _COMMANDS["add_element"].fullmatch(line):
            table, _, elements = match.groups()
            if table not in before or f"delete table {table}" in lines:
                continue
            for target in re.findall(r"(?:goto|jump) (\w+)", elements):
                if not before[table].chains.get(target):
                    raise ApplyFailed(f"{line[:200]}: packets find {target} without rules")
