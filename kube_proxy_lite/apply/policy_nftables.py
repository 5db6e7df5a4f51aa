"""NetworkPolicy's nft table in the kernel. What it says is render/policy_nftables.py's.

Scripts go to `nft`; those that only change a few elements go to the kernel as a message, from a thread of their own,
since a deletion waits there for the kernel's readers. Where nft runs somewhere else, by way of `ip netns exec` say, all
goes to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kube_proxy_lite.apply.nft import Nft
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables_listing import TableListing, parse_table
from kube_proxy_lite.render.policy_elements import read
from kube_proxy_lite.render.policy_nftables import TABLE
from podwire.nfelements import Change
from podwire.nfnetlink import Nftables

_HERE = ("nft",)


class PolicyApplier:
    """Carries scripts out, reads the table, takes it away."""

    def __init__(self, command: Sequence[str] = _HERE) -> None:
        self._nft = Nft(command)
        self._elements = _Elements() if tuple(command) == _HERE else None

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here, or the number is that of our socket."""
        return self._nft.is_own(pid) or (self._elements is not None and pid == self._elements.port)

    async def apply(self, scripts: Sequence[str]) -> None:
        """Each of `scripts` in order, whole or not at all. Raises ApplyFailed; those before it are done."""
        for script in scripts:
            changes = read(script) if self._elements else None
            if self._elements and changes is not None:
                await self._elements.commit(changes)
            else:
                await self._nft.script(script)

    async def read(self) -> TableListing | None:
        """What the kernel has, None without a table. Raises ApplyFailed."""
        text = await self._nft.table(TABLE)
        return None if text is None else parse_table(text)

    async def remove(self) -> None:
        """Takes the table out; nothing when there is none."""
        await self._nft.remove(TABLE)


class _Elements:
    """A thread with a socket of its own. `port` is the number by which the kernel tells whose change it was."""

    def __init__(self) -> None:
        self.port = 0
        self._channel: Nftables | None = None
        self._executor = ThreadPoolExecutor(1, "nft-elements")

    async def commit(self, changes: Sequence[Change]) -> None:
        """Makes all changes, as one transaction. Raises ApplyFailed."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._commit, changes)
        except OSError as error:
            raise ApplyFailed(f"nft elements: {error}") from error

    def _commit(self, changes: Sequence[Change]) -> None:
        if self._channel is None:
            self._channel = Nftables()
            self.port = self._channel.port
        self._channel.commit(changes)
