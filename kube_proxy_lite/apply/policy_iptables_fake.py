"""iptables and ipset for tests of policies: takes what the renderer writes, as strictly as the real ones.

It refuses what the real ones refuse: members added twice or deleted when they are not there, rules that name a set
that is not there, sets destroyed while a rule names them; of chains what FakeIptables refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kube_proxy_lite.apply.iptables_fake import FakeIptables
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.policy_iptables import PolicyListing, PolicyStep, parse_sets
from kube_proxy_lite.render.policy_iptables_rules import is_own_chain

_SET = re.compile(r"--match-set (\S+)")


class FakePolicyIptables:
    """Both families' chains, and the sets that they share."""

    def __init__(self) -> None:
        self._chains = FakeIptables(is_own_chain, "PODWIRE-")
        self.sets: dict[str, dict[str, None]] = {}

    def commit(self, steps: Sequence[PolicyStep]) -> None:
        """Carries steps out. Raises ApplyFailed."""
        for _ in self.each(steps):
            pass

    def each(self, steps: Sequence[PolicyStep]) -> Iterator[PolicyListing]:
        """What there is after every text that is committed. Raises ApplyFailed."""
        for step in steps:
            if step.sets:
                for line in step.sets.splitlines():
                    self._do(line)
                yield self.listing()
            for each in step.rules:
                self._chains.commit([each])
                self._check()
                yield self.listing()
            for name in step.unused:
                if name in self._named():
                    raise ApplyFailed(f"{name} is in use")
                del self.sets[name]

    def listing(self) -> PolicyListing:
        """What the applier would read."""
        text = "".join(
            f"create {name} x\n" + "".join(f"add {name} {each}\n" for each in members)
            for name, members in self.sets.items()
        )
        return PolicyListing(sets=parse_sets(text), rules=self._chains.listing())

    def _do(self, line: str) -> None:
        verb, name, *rest = line.split(" ", 2)
        if len(name) > 31:
            raise ApplyFailed(f"{line!r}: the name is too long")
        if verb == "create":
            self.sets.setdefault(name, {})
            return
        members = self.sets.get(name)
        if members is None:
            raise ApplyFailed(f"{line!r}: no such set")
        if verb == "flush":
            members.clear()
        elif verb == "add" and rest[0] not in members and not rest[0].endswith("/0"):
            members[rest[0]] = None
        elif verb == "del" and rest[0] in members:
            del members[rest[0]]
        else:
            raise ApplyFailed(f"{line!r} cannot be done")

    def _named(self) -> set[str]:
        tables = self._chains.tables.values()
        rules = (rule for each in tables for chains in each.values() for found in chains.values() for rule in found)
        return {name for rule in rules for name in _SET.findall(rule)}

    def _check(self) -> None:
        missing = self._named() - self.sets.keys()
        if missing:
            raise ApplyFailed(f"{missing} are not there")
