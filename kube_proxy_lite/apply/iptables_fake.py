"""iptables for tests: takes what the iptables renderer writes, as strictly as the real one, and prints what it has.

It refuses what iptables-restore refuses: rules in chains that are not there or to targets that are not, chains deleted
while they have rules or something leads to them, names that are too long. And it refuses what iptables would let pass
and we do not want: rules in chains of others, but for our own jumps. tests/netns/test_services_iptables.py holds it and
iptables to the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.iptables_listing import Listing, is_own, parse
from kube_proxy_lite.render.iptables_transactions import Transaction

_KERNELS = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}
_TARGETS = ("ACCEPT", "DROP", "REJECT", "RETURN", "MARK", "MASQUERADE", "DNAT")
_LONGEST = 28
_LEADS_TO = re.compile(r"(?:^| )-[jg] (\S+)")
Table = dict[str, list[str]]


class FakeIptables:
    """Both families' tables: version → table → chain → rules."""

    def __init__(self, own: Callable[[str, str], bool] = is_own, prefix: str = "KUBE-") -> None:
        """`own` says of (table, chain) whether it is ours; the names of ours begin with `prefix`."""
        self._own = own
        self._prefix = prefix
        self.tables: dict[int, dict[str, Table]] = {
            version: {table: {name: [] for name in names} for table, names in _KERNELS.items()} for version in (4, 6)
        }

    def commit(self, transactions: Sequence[Transaction]) -> None:
        """Carries transactions out, each table of each whole or not at all. Raises ApplyFailed."""
        for each in transactions:
            self.restore(each.version, each.text)

    def restore(self, version: int, text: str) -> None:
        """What iptables-restore --noflush does. Raises ApplyFailed."""
        name, table = "", Table()
        for line in text.splitlines():
            if line.startswith("*"):
                name = line[1:]
                table = {chain: list(rules) for chain, rules in self.tables[version][name].items()}
            elif line == "COMMIT":
                for chain, rules in table.items():
                    for rule in rules:
                        _check_target(table, chain, rule)
                self.tables[version][name] = table
            else:
                self._do(name, table, line)

    def save(self, version: int) -> str:
        """What iptables-save prints."""
        lines = []
        for table, chains in self.tables[version].items():
            lines.append(f"*{table}")
            lines += [f":{name} {'ACCEPT' if name in _KERNELS[table] else '-'} [0:0]" for name in chains]
            lines += [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def listing(self) -> dict[int, Listing]:
        """What the applier would read."""
        return {version: parse(self.save(version), self._own, self._prefix) for version in self.tables}

    def _do(self, name: str, table: Table, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if line.startswith(":"):
            chain = line[1:].removesuffix(" - [0:0]")
            if not self._own(name, chain) or len(chain) > _LONGEST:
                raise ApplyFailed(f"{line!r}: a chain that is not ours, or cannot be")
            table[chain] = []
            return
        chain, _, rule = rest.partition(" ")
        if chain not in table:
            raise ApplyFailed(f"{line!r}: no such chain")
        if verb in ("-I", "-D") and chain in _KERNELS[name] and _leads_to(rule).startswith(self._prefix):
            if verb == "-I":
                table[chain].insert(0, rule)
            elif rule in table[chain]:
                table[chain].remove(rule)
            else:
                raise ApplyFailed(f"{line!r}: no such rule")
        elif verb == "-A" and self._own(name, chain):
            table[chain].append(rule)
        elif verb == "-X" and self._own(name, chain):
            if table[chain] or any(_leads_to(each) == chain for rules in table.values() for each in rules):
                raise ApplyFailed(f"{line!r}: the chain is not empty, or in use")
            del table[chain]
        else:
            raise ApplyFailed(f"{line!r} is not ours to do")


def _check_target(table: Table, chain: str, rule: str) -> None:
    target = _leads_to(rule)
    if target and target not in table and target not in _TARGETS:
        raise ApplyFailed(f"{chain}: {rule!r} leads to nowhere")


def _leads_to(rule: str) -> str:
    found = _LEADS_TO.search(re.sub(r'"[^"]*"', "", rule))
    return found[1] if found else ""
