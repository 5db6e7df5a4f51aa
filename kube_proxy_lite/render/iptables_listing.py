"""What `iptables-save` prints, read back: our chains, and the jumps into them. Pure.

    -A KUBE-SEP-… -p tcp -m comment --comment "default/web" -m tcp -j DNAT --to-destination 10.244.1.3:8080

Rules are rendered as iptables-save prints them, so that comparing 60,000 of them is comparing texts. Where versions
differ in how they print one (an option that is the default, a match that says nothing, how many digits), `canonical`
makes the two alike; it is asked only for chains whose texts differ. Comments are no part of what a rule does.

Which chains are ours is a matter of names, and the names are kube-proxy's. `MARKER`, a chain that nothing leads to,
says that the rules are ours and not a running kube-proxy's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from kube_proxy_lite.render.iptables_tree import Rules

MARKER = "KUBE-PODWIRE"
Chain = tuple[str, str]
"""(table, name)."""
_SHARED = {
    "nat": {MARKER, "KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ", "KUBE-MARK-NOT-POD"},
    "filter": {
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
        "KUBE-EXTERNAL-NODEPORTS",
        "KUBE-NODEPORTS",
        "KUBE-PROXY-FIREWALL",
        "KUBE-FORWARD",
    },
}
_OWN = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW|SEP|SPLIT|IP|PORT|XLB)-[A-Z2-7]{16}")
_DECLARED = re.compile(r":(\S+) (\S+)")
_TARGET = re.compile(r" -[jg] (\S+)")
_SAME = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r' -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+)', ""),
        (r" -m (?:tcp|udp|sctp)(?= |$)", ""),
        (r" --mask (?:255\.255\.255\.255|(?:ffff:){7}ffff)(?= |$)", ""),
        (r" --rsource(?= |$)", ""),
        (r" --reject-with icmp6?-port-unreachable(?= |$)", ""),
        (r" --or-mark 0x4000(?= |$)", " --set-xmark 0x4000/0x4000"),
        (r" --xor-mark 0x4000(?= |$)", " --set-xmark 0x4000/0x0"),
        (r"(--probability \d\.\d{6})\d*", r"\1"),
    )
)


class Listing(msgspec.Struct):
    """One family: `chains` are ours, `jumps` what the kernel's chains say of ours, `held` ours that others lead to."""

    chains: dict[Chain, Rules] = {}
    jumps: dict[Chain, Rules] = {}
    held: set[Chain] = set()

    @property
    def is_ours(self) -> bool:
        """Whether the rules were made by this mode."""
        return ("nat", MARKER) in self.chains


Listings = Mapping[int, Listing]
"""The version of a family → its listing."""


def is_own(table: str, chain: str) -> bool:
    """Whether a chain is one that this mode, or a kube-proxy before it, makes."""
    return chain in _SHARED.get(table, ()) or _OWN.fullmatch(chain) is not None


def parse(text: str, own: Callable[[str, str], bool] = is_own, prefix: str = "KUBE-") -> Listing:
    """The output of iptables-save, of one table or several. `own` says of (table, chain) whether it is ours; the names
    of ours begin with `prefix`."""
    ours = f" {prefix}"
    listing = Listing()
    found: dict[Chain, list[str]] = {}
    kernels: set[str] = set()
    table = ""
    for line in text.split("\n"):
        if line.startswith("-A "):
            _, name, rule = line.split(" ", 2) if line.count(" ") > 1 else (*line.split(" "), "")
            rules = found.get((table, name))
            if rules is not None:
                rules.append(rule)
            elif ours in rule and (target := _target(rule)) and own(table, target):
                _note_foreign(listing, table, name, rule, target, name in kernels)
        elif line.startswith(":"):
            declared = _DECLARED.match(line)
            if declared and declared[2] != "-":
                kernels.add(declared[1])
            elif declared and own(table, declared[1]):
                found[table, declared[1]] = []
        elif line.startswith("*"):
            table, kernels = line[1:], set()
    listing.chains = {chain: tuple(rules) for chain, rules in found.items()}
    return listing


def _target(rule: str) -> str:
    found = _TARGET.search(f" {rule}")
    return found[1] if found else ""


def _note_foreign(listing: Listing, table: str, name: str, rule: str, target: str, is_kernels: bool) -> None:
    if is_kernels:
        listing.jumps[table, name] = (*listing.jumps.get((table, name), ()), rule)
    else:
        listing.held.add((table, target))


def is_same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two chains' rules do the same."""
    if one == other:
        return True
    return len(one) == len(other) and all(
        a == b or canonical(a) == canonical(b) for a, b in zip(one, other, strict=True)
    )


def canonical(rule: str) -> str:
    """The rule without what versions print differently."""
    rule = f" {rule}"
    for pattern, into in _SAME:
        rule = pattern.sub(into, rule)
    return rule[1:]
