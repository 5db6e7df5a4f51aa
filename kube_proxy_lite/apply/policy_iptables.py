"""NetworkPolicy in the kernel by iptables and ipset. What they are told is render/policy_iptables.py's.

The backend is the one that Services are in on this node (apply/iptables.py). A set whose rule has just been deleted is
in use for some milliseconds more, until the kernel has waited for the packets on their way (RCU): destroying it is
tried again, and left to the next look at the whole when somebody else's rule names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kube_proxy_lite.apply.iptables import IptablesApplier
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.iptables_listing import Listing, parse
from kube_proxy_lite.render.policy_iptables import PolicyListing, PolicyStep, parse_sets, removal
from kube_proxy_lite.render.policy_iptables_rules import TABLE, is_own_chain, set_of
from kube_proxy_lite.render.policy_sets import VERSIONS, Elements

_TRIES, _PAUSE = 12, 0.01  # 10 ms, 20 ms, 30 ms …: 0.8 s in all


class PolicyIptablesApplier:
    """Carries steps out, reads sets and chains, takes them away."""

    def __init__(self, prefix: Sequence[str] = (), versions: Sequence[int] = VERSIONS, backend: str = "") -> None:
        """As apply.iptables.IptablesApplier."""
        self._iptables = IptablesApplier(prefix, versions, backend)
        self._versions = tuple(versions)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        return self._iptables.is_own(pid)

    async def apply(self, steps: Sequence[PolicyStep]) -> None:
        """Each of `steps` in order. Raises ApplyFailed; those before it are done, and of its own sets perhaps some."""
        for step in steps:
            if step.sets:
                await self._iptables.program("ipset", "restore", stdin=step.sets)
            if step.rules:
                await self._iptables.apply(step.rules)
            if step.unused:
                await self._destroy(step.unused)

    async def read(self) -> PolicyListing:
        """What the kernel has. Raises ApplyFailed."""
        return PolicyListing(sets=await self._sets(), rules=await self._rules())

    async def remove(self) -> None:
        """Takes chains and sets out; nothing when there are none, or when the kernel knows no sets."""
        rules = await self._rules()
        try:
            sets = await self._sets()
        except ApplyFailed:
            if any(each.chains for each in rules.values()):
                raise
            return
        await self._iptables.apply([each for of, found in rules.items() for each in removal(of, found)])
        await self._destroy([set_of(name) for name in sets])

    async def _sets(self) -> dict[str, Elements]:
        return parse_sets(await self._iptables.program("ipset", "save"))

    async def _rules(self) -> dict[int, Listing]:
        texts = {version: await self._iptables.save(version, TABLE) for version in self._versions}
        return {version: parse(text, is_own_chain, "PODWIRE-") for version, text in texts.items()}

    async def _destroy(self, names: Sequence[str]) -> None:
        left = list(names)
        if not left:
            return
        for attempt in range(_TRIES):
            try:
                await self._iptables.program("ipset", "restore", stdin="".join(f"destroy {name}\n" for name in left))
                return
            except ApplyFailed:
                await asyncio.sleep(_PAUSE * (attempt + 1))
                there = set(map(set_of, await self._sets()))
                left = [name for name in left[1:] + left[:1] if name in there]
