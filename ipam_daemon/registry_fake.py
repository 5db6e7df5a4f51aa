"""The registry in memory, for tests of everything above it: several registries on one store are several nodes.

`store.away = True` is an outage; `store.expire(name)` ends a lease; `store.restore()` is a wiped or restored etcd, and
`store.settle()` the end of the time in which claims then wait. One suite runs against this and against etcd
(tests/etcd/test_registry.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType

import msgspec

from ipam_daemon.claims import (
    Entry,
    NodeNameTaken,
    StoreRestored,
    check_same,
    exhausted,
    free_blocks,
    keep_former,
    may_publish,
    name_taken,
    next_generation,
    overlap,
    still_lives,
)
from ipam_daemon.model import Block, ClusterConfig, Network, NodeRecord, Pool
from podwire.etcd import EtcdUnavailable


class FakeStore:
    """What etcd would hold, as plain dicts that a test may look into and change (then call `touch`)."""

    def __init__(self) -> None:
        self.config: ClusterConfig | None = None
        self.blocks: dict[Network, Block] = {}
        self.nodes: dict[str, NodeRecord] = {}
        self.live: dict[str, FakeRegistry] = {}
        self.away = False
        self.watchers: set[asyncio.Event] = set()
        self.breaks = 0
        self.settling = ""
        self.revision = 1
        self._settled = asyncio.Event()
        self._settled.set()

    def restore(
        self, blocks: Mapping[Network, Block] | None = None, nodes: Mapping[str, NodeRecord] | None = None
    ) -> None:
        """etcd comes back with what a backup has of blocks and nodes; with nothing, it was wiped."""
        self.blocks, self.nodes, self.live = dict(blocks or {}), dict(nodes or {}), {}
        self.lost("its revision went back")

    def lost(self, why: str) -> None:
        """Somebody notices that the store was restored."""
        self.breaks += 1
        self.settling = why
        self._settled.clear()
        self.touch()

    def settle(self) -> None:
        """The nodes have had their time to claim their blocks again."""
        self.settling = ""
        self._settled.set()

    async def settled(self) -> None:
        """Returns when claims do not wait."""
        await self._settled.wait()

    def touch(self) -> None:
        """Tells who watches nodes that something changed."""
        for event in self.watchers:
            event.set()

    def expire(self, name: str) -> None:
        """The lease of `name` ran out. Its holder does not know yet, and finds out in `FakeRegistry.renew`."""
        self.live.pop(name, None)

    def check(self) -> None:
        """Raises EtcdUnavailable during an outage."""
        if self.away:
            raise EtcdUnavailable("etcd cannot be reached at fake:0")


class FakeRegistry:
    """One node's registry on a store that it shares with others."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.entry: Entry | None = None
        self._lost: asyncio.Future[NodeNameTaken] | None = None
        self._breaks = store.breaks  # that `restored` has told of

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        self.store.check()
        if self.store.config is None:
            self.store.config = config
        check_same(config, self.store.config, "/podwire/v1/config")
        return self.store.config

    async def watch_config(self) -> AsyncGenerator[ClusterConfig, None]:
        event, told = asyncio.Event(), None
        self.store.watchers.add(event)
        try:
            while True:
                if self.store.config is not None and self.store.config != told:
                    told = self.store.config
                    yield told
                await event.wait()
                event.clear()
        finally:
            self.store.watchers.discard(event)

    def seen(self) -> str:
        return str(self.store.breaks)

    def recall(self, seen: str) -> None:
        self._breaks = int(seen or self._breaks)

    async def restored(self) -> str:
        event = asyncio.Event()
        self.store.watchers.add(event)
        try:
            while self._breaks == self.store.breaks:
                await event.wait()
                event.clear()
        finally:
            self.store.watchers.discard(event)
        self._breaks = self.store.breaks
        return self.store.settling

    async def enter(self, name: str, node_id: str) -> Entry:
        self.store.check()
        record, holder = self.store.nodes.get(name), self.store.live.get(name)
        if holder is not None and holder.entry is not None and holder.entry.node_id != node_id:
            raise name_taken(name, holder.entry.node_id, record.addresses if record else ())
        blocks = [block for block in self.store.blocks.values() if block.node == name]
        generation = next_generation(node_id, record, blocks)
        reowned = tuple(
            msgspec.structs.replace(block, node_id=node_id, generation=generation)
            for block in blocks
            if block.node_id != node_id
        )
        self.store.blocks.update((block.cidr, block) for block in reowned)
        self.entry = Entry(name=name, node_id=node_id, generation=generation, reowned=reowned)
        self.store.live[name] = self
        self._lost = asyncio.get_running_loop().create_future()
        if holder is not None and holder is not self:
            holder.renew()
        return self.entry

    def renew(self) -> None:
        """What the lease's keep-alive does: takes an expired name again, or finds it lost."""
        assert self.entry is not None
        assert self._lost is not None, "enter comes first"
        holder = self.store.live.setdefault(self.entry.name, self)
        if holder is not self and holder.entry is not None and not self._lost.done():
            self._lost.set_result(name_taken(self.entry.name, holder.entry.node_id, ()))

    async def look_at_name(self) -> None:
        self.store.check()
        if self.entry is not None:
            self.renew()

    async def lost(self) -> NodeNameTaken:
        assert self._lost is not None, "enter comes first"
        return await asyncio.shield(self._lost)

    async def leave(self) -> None:
        self.store.check()
        if self.entry is not None and self.store.live.get(self.entry.name) is self:
            del self.store.live[self.entry.name]
        self.entry = None

    async def load_blocks(self, name: str) -> tuple[Block, ...]:
        self.store.check()
        found = [block for block in self.store.blocks.values() if block.node == name]
        return tuple(sorted(found, key=lambda block: str(block.cidr)))

    async def claim_block(self, pool: Pool, node: str, node_id: str, generation: int) -> Block:
        self.store.check()
        if self.store.settling:
            raise StoreRestored(f"etcd was wiped or restored ({self.store.settling}): no new block for now")
        cidr = next(free_blocks(pool, self.store.blocks, node), None)
        if cidr is None:
            raise exhausted(pool, self.store.blocks)
        block = Block(cidr=cidr, pool=pool.name, node=node, node_id=node_id, generation=generation)
        self.store.blocks[cidr] = block
        return block

    async def reclaim_block(self, block: Block) -> str | None:
        self.store.check()
        for holder in self.store.blocks.values():
            if overlap(holder.cidr, block.cidr):
                if (holder.node_id, holder.cidr) != (block.node_id, block.cidr):
                    return holder.node
                if holder.node != block.node:
                    if holder.node in self.store.live:
                        raise still_lives(holder)
                    self.store.blocks[block.cidr] = block
                return None
        self.store.blocks[block.cidr] = block
        if not self.store.settling:
            self.store.lost(f"it had lost {block.cidr}")
        return None

    async def release_block(self, block: Block) -> bool:
        self.store.check()
        stored = self.store.blocks.get(block.cidr)
        if stored is None or (stored.node_id, stored.generation) != (block.node_id, block.generation):
            return False
        del self.store.blocks[block.cidr]
        return True

    async def publish(self, record: NodeRecord) -> None:
        self.store.check()
        stored = self.store.nodes.get(record.name)
        if stored is not None and not may_publish(record, stored):
            raise name_taken(record.name, stored.node_id, stored.addresses)
        self.store.nodes[record.name] = record
        self.store.touch()

    async def watch_nodes(self) -> AsyncGenerator[Mapping[str, NodeRecord], None]:
        await self.store.settled()
        event = asyncio.Event()
        event.set()
        self.store.watchers.add(event)
        known: dict[str, NodeRecord] = {}
        former: dict[str, NodeRecord] = {}
        breaks = self.store.breaks
        own = self.entry.name if self.entry is not None else ""
        try:
            while True:
                await event.wait()
                event.clear()
                if breaks != self.store.breaks:
                    breaks, former = self.store.breaks, {**former, **known}
                    former.pop(own, None)
                known = dict(self.store.nodes)
                former = keep_former(former, known)
                yield MappingProxyType({**former, **known})
        finally:
            self.store.watchers.discard(event)
