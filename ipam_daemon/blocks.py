"""The node's blocks: claimed before they run short, returned when they have long been empty (ipam_daemon/supply.py).

    claim    etcd ─▶ journal ─▶ peers are told ─▶ the bridge has the gateway ─▶ addresses are handed out
    return   addresses are no longer handed out ─▶ journal ─▶ peers are told ─▶ the bridge loses the gateway
             ─▶ what outlives a reboot is written ─▶ etcd

In both directions nobody has an address that the node does not hold, and no two nodes ever hold one block. An ADD that
finds nothing free waits for a claim that is possible, briefly: with etcd away it gets "try again later" soon; when the
pool has no block left, or the node may not have more, it gets the error that says so. A pool that has none left keeps
no other from being claimed from, and no ADD from what it lacks of the other family. What a kernel that refuses, or an
nft that does not answer, keeps from being finished is finished in another round.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from ipam_daemon import supply
from ipam_daemon.allocator import BlockUse
from ipam_daemon.attachments import Attachments
from ipam_daemon.claims import PoolExhausted
from ipam_daemon.errors import CniError, Exhausted, TryAgainLater
from ipam_daemon.faults import point
from ipam_daemon.model import Block, ClusterConfig, Network, Pool
from ipam_daemon.registry import Registry
from ipam_daemon.supply import Claim, Return
from podwire.errors import TryAgain

_ROUND = 5.0  # seconds between two looks at whether a block can be returned
_PATIENCE = 2.0  # seconds that an ADD waits for a claim

log = logging.getLogger(__name__)

UseBlocks = Callable[[Sequence[Block]], Awaitable[None]]
ClaimBlock = Callable[[Pool], Awaitable[Block]]


class BlockKeeper:
    """Keeps the node supplied with addresses, once it has joined."""

    def __init__(
        self,
        *,
        registry: Registry,
        attachments: Attachments,
        claim: ClaimBlock,
        use: UseBlocks,
        limit: int,
        idle_s: float,
        keep: Callable[[], Awaitable[bool]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`claim` claims a block for this node; `use` makes journal, peers and kernel say that these are the node's
        blocks; `limit` is the most blocks of a pool; `idle_s` is how long a block must be empty to be returned; `keep`
        writes down for after a reboot which blocks are the node's, and says whether it could."""
        self._registry = registry
        self._attachments = attachments
        self._claim = claim
        self._use = use
        self._limit = limit
        self._idle_s = idle_s
        self._keep = keep
        self._clock = clock
        self._config = ClusterConfig()
        self._owned: list[Block] = []
        self._settled = True  # whether journal, peers and kernel say what `_owned` says
        self._to_release: list[Block] = []
        self._joined = asyncio.Event()
        self._lock = asyncio.Lock()
        self._empty_since: dict[Network, dict[Network, float]] = {}  # by pool
        self.obstacle = ""
        """Why the last claim failed; empty when none has."""

    def begin(self, config: ClusterConfig, owned: Sequence[Block]) -> None:
        """The node has joined (again), and has these blocks: from now on more can be claimed, and some returned."""
        self._config = config
        self._owned = list(owned)
        self._settled = True
        self._to_release.clear()  # what etcd has not been told of yet is this node's, and empty
        self._joined.set()

    @asynccontextmanager
    async def pausing(self) -> AsyncIterator[None]:
        """Nothing is claimed or returned meanwhile."""
        async with self._lock:
            yield

    async def run_forever(self) -> None:
        """Looks at the supply after every allocation, and now and then, until cancelled."""
        await self._joined.wait()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROUND):
                    await self._attachments.addresses.allocated.wait()
            self._attachments.addresses.allocated.clear()
            try:
                async with self._lock:
                    exhausted = await self._round()
            except (TryAgain, CniError) as error:
                await self._trouble(str(error))
            else:
                if exhausted:
                    await self._trouble("; ".join(map(str, exhausted.values())))

    async def more(self, shortage: Exhausted) -> None:
        """Returns when it is worth another try. Raises TryAgainLater when that takes longer than an ADD may wait,
        Exhausted when there will be no address."""
        if not self._joined.is_set():
            raise TryAgainLater(f"{shortage}; this node has not joined the cluster yet, and so cannot claim a block")
        try:
            async with asyncio.timeout(_PATIENCE):
                exhausted = await self._claim_for_add()
        except (TimeoutError, TryAgain, CniError) as error:
            self.obstacle = str(error) or f"no answer within {_PATIENCE:g} s"
            raise TryAgainLater(f"{shortage}; claiming another block: {self.obstacle}") from error
        for family in sorted({pool.cidr.version for pool in self._config.pools}):
            why = self._hopeless(family, exhausted)
            if why:
                raise Exhausted(f"{shortage}; {why}")

    def _hopeless(self, family: int, exhausted: Mapping[Network, PoolExhausted]) -> str:
        """Why there will be no address of a family; empty when there may be one."""
        reasons = []
        for pool in self._config.pools:
            if pool.cidr.version != family:
                continue
            uses = self._uses(pool)
            if supply.available(uses):
                return ""
            if pool.cidr in exhausted:
                reasons.append(str(exhausted[pool.cidr]))
            elif len(uses) >= self._limit:
                reasons.append(f"this node may have {self._limit} blocks of a pool at the most (maxBlocks)")
            else:
                return ""  # others have taken what was claimed
        return "; ".join(reasons)

    def _uses(self, pool: Pool) -> list[BlockUse]:
        return [each for each in self._attachments.addresses.uses() if pool.has(each.block)]

    async def _claim_for_add(self) -> Mapping[Network, PoolExhausted]:
        async with self._lock:  # whoever waited here finds what the one before has claimed
            return await self._round()

    async def _round(self) -> Mapping[Network, PoolExhausted]:
        """Claims and returns what is due, of every pool. Returns those that had no block left."""
        await self._settle()
        exhausted: dict[Network, PoolExhausted] = {}
        for pool in self._config.pools:
            try:
                while await self._step(pool):
                    await self._settle()
            except PoolExhausted as error:
                exhausted[pool.cidr] = error
        if not exhausted:
            self.obstacle = ""
        return exhausted

    async def _step(self, pool: Pool) -> bool:
        """Claims or returns one block, if that is due. True when it did."""
        uses = self._uses(pool)
        now = self._clock()
        former = self._empty_since.get(pool.cidr, {})
        since = {use.block.cidr: former.get(use.block.cidr, now) for use in uses if supply.is_empty(use)}
        self._empty_since[pool.cidr] = since
        decision = supply.decide(pool, uses, since, now, limit=self._limit, idle_s=self._idle_s)
        if isinstance(decision, Claim):
            block = await self._claim(pool)
            self._owned.append(block)
            log.info("claimed another block", extra={"fields": {"block": str(block.cidr), "pool": pool.name}})
        elif isinstance(decision, Return) and self._attachments.addresses.retire_block(decision.block):
            self._owned = [each for each in self._owned if each.cidr != decision.block.cidr]
            self._to_release.append(decision.block)
            point("block.retired")
        else:
            return False
        self._settled = False
        return True

    async def _settle(self) -> None:
        """Finishes what etcd's absence has interrupted."""
        if not self._settled:
            await self._use(self._owned)
            self._settled = True
        while self._to_release:
            if not await self._keep():
                return  # after a power cut the block would be used again, when somebody else may have it
            block = self._to_release[0]
            await self._registry.release_block(block)
            point("block.released")
            self._to_release.pop(0)
            log.info("returned a block", extra={"fields": {"block": str(block.cidr), "pool": block.pool}})

    async def _trouble(self, obstacle: str) -> None:
        if obstacle != self.obstacle:
            log.warning("this node's supply of addresses: %s", obstacle)
        self.obstacle = obstacle
        await asyncio.sleep(_ROUND / 5)
