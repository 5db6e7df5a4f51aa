"""The registry in memory, for tests of everything above it: several registries on one store are several nodes.

`store.away = True` is an outage; `store.expire(name)` ends a lease. One suite runs against this and against etcd
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
    check_same,
    exhausted,
    free_blocks,
    may_publish,
    name_taken,
    next_generation,
    overlap,
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

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        self.store.check()
        if self.store.config is None:
            self.store.config = config
        check_same(config, self.store.config, "/podwire/v1/config")
        return self.store.config

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
                return None if (holder.node_id, holder.cidr) == (block.node_id, block.cidr) else holder.node
        self.store.blocks[block.cidr] = block
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
        event = asyncio.Event()
        event.set()
        self.store.watchers.add(event)
        try:
            while True:
                await event.wait()
                event.clear()
                yield MappingProxyType(dict(self.store.nodes))
        finally:
            self.store.watchers.discard(event)
