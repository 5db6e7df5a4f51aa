"""NetworkPolicy's nft table in the kernel. What it says is render/policy_nftables.py's."""

from __future__ import annotations

from collections.abc import Sequence

from kube_proxy_lite.apply.nft import Nft
from kube_proxy_lite.render.nftables_listing import TableListing, parse_table
from kube_proxy_lite.render.policy_nftables import TABLE


class PolicyApplier:
    """Carries scripts out, reads the table, takes it away."""

    def __init__(self, command: Sequence[str] = ("nft",)) -> None:
        self._nft = Nft(command)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        return self._nft.is_own(pid)

    async def apply(self, scripts: Sequence[str]) -> None:
        """Each of `scripts` in order, whole or not at all. Raises ApplyFailed; those before it are done."""
        for script in scripts:
            await self._nft.script(script)

    async def read(self) -> TableListing | None:
        """What the kernel has, None without a table. Raises ApplyFailed."""
        text = await self._nft.table(TABLE)
        return None if text is None else parse_table(text)

    async def remove(self) -> None:
        """Takes the table out; nothing when there is none."""
        await self._nft.remove(TABLE)
