"""The nftables mode in the kernel: scripts of render/nftables.py by `nft -f -`, listings by `nft -p list table`.

Text is nft's one documented interface, and legible. A call costs 3 ms, mostly nft's start; one that deletes something
takes 10–20 ms, in which the kernel waits for readers to be done (RCU) and nobody computes.

Clients that are remembered (affinity) are known to the kernel alone. When an endpoint goes, its entries are listed and
deleted once no new connection can choose it; an entry that times out between the two is no error, the next round does
not see it.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Iterable, Sequence

from kube_proxy_lite.apply import nft_learning
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables_layout import AFFINITY, NAME, WORDS
from kube_proxy_lite.render.nftables_listing import Listing, TableListing, parse_table
from kube_proxy_lite.render.nftables_transactions import Learning, Stale, Transaction

_NFT_SECONDS = 30.0
_ROUNDS = 5
_BATCH = 2000
_REMEMBERED = 64


class NftRefused(ApplyFailed):
    """nft ran, and said no."""


class NftablesApplier:
    """interface.Applier for nft."""

    def __init__(self, nft: Sequence[str] = ("nft",), versions: Sequence[int] = (4, 6)) -> None:
        """`nft` is the command, with what goes before it to run it in another namespace. `versions`: families."""
        self._nft = tuple(nft)
        self._versions = tuple(versions)
        self._started: deque[int] = deque(maxlen=_REMEMBERED)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here, so that what it changed is no news."""
        return pid in self._started

    async def apply(self, transactions: Sequence[Transaction]) -> None:
        """See interface.Applier."""
        for transaction in transactions:
            if transaction.script:
                await self._run("-f", "-", stdin=transaction.script)
            for learning in transaction.learning:
                await self._learn(learning)
            if transaction.stale:
                await self._forget(transaction.stale)

    async def read(self) -> Listing:
        """See interface.Applier."""
        return {version: await self._table(version) for version in self._versions}

    async def remove(self) -> None:
        """See interface.Applier."""
        tables = [WORDS[version].table for version in self._versions]
        # to add what is there is no error, to delete what is not would be
        await self._run("-f", "-", stdin="".join(f"add table {each}\ndelete table {each}\n" for each in tables))

    async def _table(self, version: int) -> TableListing | None:
        try:
            return parse_table(await self._run("-p", "list", "table", *WORDS[version].table.split()))
        except NftRefused as error:
            if "No such file" in str(error):
                return None
            raise

    async def _learn(self, learning: Learning) -> None:
        """In a process, which lives where nft does; once for a timeout that no Service had before."""
        arguments = (NAME, learning.chain, AFFINITY, str(learning.seconds))
        await self._process(*self._nft[:-1], sys.executable, "-IS", nft_learning.__file__, *arguments)

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
                except NftRefused:
                    if tries == 1:
                        raise

    async def _forget_in(self, table: str, places: dict[str, frozenset[str]]) -> None:
        text = await self._run("-p", "list", "map", *table.split(), AFFINITY)
        entries = parse_table(text).sets.get(AFFINITY, {})
        keys = [key for key, endpoint in entries.items() if _is_stale(key, endpoint, places)]
        for start in range(0, len(keys), _BATCH):
            listed = ", ".join(keys[start : start + _BATCH])
            await self._run("-f", "-", stdin=f"delete element {table} {AFFINITY} {{ {listed} }}\n")

    async def _run(self, *arguments: str, stdin: str = "") -> str:
        return await self._process(*self._nft, *arguments, stdin=stdin)

    async def _process(self, *command: str, stdin: str = "") -> str:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise ApplyFailed(f"{command[0]} cannot be run: {error.strerror}") from error
        self._started.append(process.pid)
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), _NFT_SECONDS)
        except TimeoutError as error:
            raise ApplyFailed(f"{command[0]} gave no answer within {_NFT_SECONDS:g} s") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            said = " ".join(err.decode(errors="replace").split())[:2000]
            raise NftRefused(f"{' '.join(command)}: {said}")
        return out.decode()


def _is_stale(key: str, endpoint: str, places: dict[str, frozenset[str]]) -> bool:
    """Whether an entry, `client . place`, is one that nobody may be sent to; a NodePort's place has no address."""
    _, place = key.split(" . ", 1)
    _, port = place.split(" . ", 1)
    found = places.get(place, places.get(port))
    return found is not None and (not found or endpoint in found)
