"""The nftables mode in the kernel: scripts of render/nftables.py by `nft -f -`, listings by `nft -p list table`.

Clients that are remembered (affinity) are known to the kernel alone. When an endpoint goes, its entries are listed and
deleted once no new connection can choose it; an entry that times out between the two is no error, the next round does
not see it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence

from kube_proxy_lite.apply import nft_learning
from kube_proxy_lite.apply.nft import Nft
from kube_proxy_lite.apply.processes import ProgramRefused
from kube_proxy_lite.render.nftables_layout import AFFINITY, NAME, WORDS
from kube_proxy_lite.render.nftables_listing import Listing, TableListing, parse_table
from kube_proxy_lite.render.nftables_transactions import Learning, Stale, Transaction

_ROUNDS = 5
_BATCH = 2000


class NftablesApplier:
    """interface.Applier for nft."""

    def __init__(self, nft: Sequence[str] = ("nft",), versions: Sequence[int] = (4, 6)) -> None:
        """`nft` is the command, with what goes before it to run it in another namespace. `versions`: families."""
        self._nft = Nft(nft)
        self._versions = tuple(versions)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here, so that what it changed is no news."""
        return self._nft.is_own(pid)

    async def apply(self, transactions: Sequence[Transaction]) -> None:
        """See interface.Applier."""
        for transaction in transactions:
            if transaction.script:
                await self._nft.script(transaction.script)
            for learning in transaction.learning:
                await self._learn(learning)
            if transaction.stale:
                await self._forget(transaction.stale)

    async def read(self) -> Listing:
        """See interface.Applier."""
        return {version: await self._table(version) for version in self._versions}

    async def remove(self) -> None:
        """See interface.Applier."""
        await self._nft.remove(*(WORDS[version].table for version in self._versions))

    async def _table(self, version: int) -> TableListing | None:
        text = await self._nft.table(WORDS[version].table)
        return None if text is None else await asyncio.to_thread(parse_table, text)

    async def _learn(self, learning: Learning) -> None:
        """In a process, which lives where nft does; once for a timeout that no Service had before."""
        arguments = (NAME, learning.chain, AFFINITY, str(learning.seconds))
        await self._nft.processes.run(*self._nft.command[:-1], sys.executable, "-IS", nft_learning.__file__, *arguments)

    async def _forget(self, stale: Iterable[Stale]) -> None:
        by_table: dict[str, dict[str, frozenset[str]]] = {}
        for each in stale:
            places = by_table.setdefault(each.table, {})
            both = each.endpoints and places.get(each.place, each.endpoints)
            places[each.place] = both and both | each.endpoints
        for table, places in by_table.items():
            for tries in range(_ROUNDS, 0, -1):
                try:
                    await self._forget_in(table, places)
                    break
                except ProgramRefused:
                    if tries == 1:
                        raise

    async def _forget_in(self, table: str, places: dict[str, frozenset[str]]) -> None:
        text = await self._nft.list("map", *table.split(), AFFINITY)
        entries = parse_table(text).sets.get(AFFINITY, {}) if text else {}
        keys = [key for key, endpoint in entries.items() if _is_stale(key, endpoint, places)]
        for start in range(0, len(keys), _BATCH):
            listed = ", ".join(keys[start : start + _BATCH])
            await self._nft.script(f"delete element {table} {AFFINITY} {{ {listed} }}\n")


def _is_stale(key: str, endpoint: str, places: dict[str, frozenset[str]]) -> bool:
    """Whether an entry, `client . place`, is one that nobody may be sent to; a NodePort's place has no address."""
    _, place = key.split(" . ", 1)
    _, port = place.split(" . ", 1)
    found = places.get(place, places.get(port))
    return found is not None and (not found or endpoint in found)
