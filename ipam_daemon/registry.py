"""Who has what in the cluster, kept in etcd: the configuration, blocks of addresses, nodes, and which of them live.

    /podwire/v1/config          ClusterConfig    written by the first daemon, compared by all others
    /podwire/v1/blocks/<cidr>   Block            one key per block and family; permanent until released
    /podwire/v1/nodes/<name>    NodeRecord       what peers need to reach the node's pods; permanent
    /podwire/v1/live/<name>     Live             under a lease: says only that the daemon lives (ipam_daemon.live_name)

Every claim is one transaction on the key that it is about, so two nodes cannot both win. A claim also holds only under
the configuration that was agreed on: since the block size cannot change unseen, no two claims of different sizes can
overlap by crossing each other; older blocks of another size are seen in the listing and stepped around.

A claim costs one listing of keys (30 bytes a block) and one transaction, and one more for every other node that wanted
the same block in the same moment. A transaction whose answer was lost may have been carried out: its block is looked
at first the next time, so that it does not leak.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Protocol, TypeVar

import msgspec

from ipam_daemon.claims import (
    ConfigMismatch,
    Entry,
    NodeNameTaken,
    PoolExhausted,
    RecordDamaged,
    check_same,
    exhausted,
    free_blocks,
    may_publish,
    name_taken,
    next_generation,
    overlap,
    parse_network,
)
from ipam_daemon.live_name import LiveName
from ipam_daemon.model import Block, ClusterConfig, Network, NodeRecord, Pool, decode, encode
from podwire.etcd import EtcdSession, EtcdUnavailable
from podwire.etcd.records import Compare, Deleted, Get, Item, Put, Snapshot, absent, unchanged
from podwire.etcd.records import Delete as DeleteKey

__all__ = [
    "ConfigMismatch",
    "Entry",
    "EtcdRegistry",
    "EtcdUnavailable",
    "NodeNameTaken",
    "PoolExhausted",
    "RecordDamaged",
    "Registry",
]

log = logging.getLogger(__name__)
ROOT = "/podwire/v1/"
LIVE_S = 10
T = TypeVar("T")


class Registry(Protocol):
    """The port. All but `watch_nodes` and `lost` raise EtcdUnavailable (TryAgain) while the store is away."""

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        """Writes the cluster's configuration if there is none; returns the one that holds. Raises ConfigMismatch."""

    async def enter(self, name: str, node_id: str) -> Entry:
        """Takes the node's name and keeps it until `leave`. Raises NodeNameTaken at once when another machine has it.

        A former process of the same machine is succeeded at once. Blocks of a former machine of the name go over to
        this one, under a higher generation.
        """

    async def lost(self) -> NodeNameTaken:
        """Returns when the name went to someone else after `enter`, and says to whom: the daemon must stop."""

    async def leave(self) -> None:
        """Gives the name back on an orderly end. Does nothing without `enter`."""

    async def load_blocks(self, name: str) -> tuple[Block, ...]:
        """The blocks of a node, by name, lowest key first."""

    async def claim_block(self, pool: Pool, node: str, node_id: str, generation: int) -> Block:
        """One more block of `pool` for `node`. Raises PoolExhausted."""

    async def reclaim_block(self, block: Block) -> str | None:
        """Claims a block that its owner remembers and the store has lost. Returns the name of the node that has it, or
        part of it, instead; None when it is claimed, or was never lost."""

    async def release_block(self, block: Block) -> bool:
        """Deletes `block` if its owner and generation are still these; returns whether it did."""

    async def publish(self, record: NodeRecord) -> None:
        """Tells the peers. Raises NodeNameTaken when the name's record is another machine's of no lower generation."""

    def watch_nodes(self) -> AsyncGenerator[Mapping[str, NodeRecord], None]:
        """All nodes by name, and all again whenever something changed; changes in quick succession may come as one.

        A record that cannot be decoded is left out and logged once. Waits out outages; close it when done (aclosing).
        """


class EtcdRegistry:
    """The registry in etcd. `root` ends in a slash; `live_s` is the TTL of the live key in seconds."""

    def __init__(self, session: EtcdSession, *, root: str = ROOT, live_s: int = LIVE_S) -> None:
        self._session = session
        self._root = root
        self._live_s = live_s
        self._live: LiveName | None = None
        self._agreed: tuple[ClusterConfig, int] | None = None  # with the mod revision of its key
        self._unsure: list[Network] = []  # claimed perhaps: the answer was lost

    # --- configuration ---------------------------------------------------------------------------------------

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        key = f"{self._root}config"
        result = await self._session.txn([absent(key)], [Put(key, encode(config))], [Get(key)])
        if result.succeeded:
            self._agreed = (config, result.revision)
            return config
        (item,) = result.found
        assert item is not None, "the transaction found it there"
        theirs = _decoded(item, ClusterConfig)
        check_same(config, theirs, key)
        self._agreed = (theirs, item.mod_revision)
        return theirs

    # --- the name --------------------------------------------------------------------------------------------

    async def enter(self, name: str, node_id: str) -> Entry:
        live = LiveName(self._session, self._root, name, node_id, self._live_s)
        await live.take()
        try:
            record = await self._node(name)
            items = await self._blocks_of(name)
            generation = next_generation(node_id, record, items.values())
            reowned = [
                block
                for item, former in items.items()
                if former.node_id != node_id and (block := await self._reown(item, former, node_id, generation))
            ]
        except BaseException:
            await live.give_up()
            raise
        live.hold(generation)
        self._live = live
        return Entry(name=name, node_id=node_id, generation=generation, reowned=tuple(reowned))

    async def lost(self) -> NodeNameTaken:
        assert self._live is not None, "enter comes first"
        return await self._live.lost()

    async def leave(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            await live.leave()

    async def _reown(self, item: Item, former: Block, node_id: str, generation: int) -> Block | None:
        block = msgspec.structs.replace(former, node_id=node_id, generation=generation)
        result = await self._session.txn([unchanged(item.key, item.mod_revision)], [Put(item.key, encode(block))])
        return block if result.succeeded else None  # the former machine has just released it

    # --- blocks ----------------------------------------------------------------------------------------------

    async def load_blocks(self, name: str) -> tuple[Block, ...]:
        return tuple((await self._blocks_of(name)).values())

    async def claim_block(self, pool: Pool, node: str, node_id: str, generation: int) -> Block:
        found = await self._claimed_unsure(pool, node_id, generation)
        if found is not None:
            return found
        taken: set[Network] = set()
        while True:
            known, taken = taken, await self._taken()
            for cidr in free_blocks(pool, taken, node):
                block = Block(cidr=cidr, pool=pool.name, node=node, node_id=node_id, generation=generation)
                if await self._claim(block):
                    return block
            if known == taken:  # a second look has found nothing new
                raise exhausted(pool, taken)

    async def reclaim_block(self, block: Block) -> str | None:
        while True:
            for item in (await self._session.get_prefix(f"{self._root}blocks/")).items:
                holder = _readable(item, Block)
                if holder is not None and overlap(holder.cidr, block.cidr):
                    return None if (holder.node_id, holder.cidr) == (block.node_id, block.cidr) else holder.node
            if await self._claim(block):
                return None

    async def release_block(self, block: Block) -> bool:
        key = self._block_key(block.cidr)
        while (item := await self._session.get(key)) is not None:
            stored = _readable(item, Block)
            if stored is None or (stored.node_id, stored.generation) != (block.node_id, block.generation):
                return False
            if (await self._session.txn([unchanged(key, item.mod_revision)], [DeleteKey(key)])).succeeded:
                return True
        return False

    async def _claim(self, block: Block) -> bool:
        """Whether the block is ours now; False when someone else has it."""
        key, guard = self._block_key(block.cidr), self._guard()
        try:
            result = await self._session.txn([absent(key), *guard], [Put(key, encode(block))], [Get(key)])
        except EtcdUnavailable:
            self._unsure.append(block.cidr)
            raise
        if result.succeeded or result.found[0] is not None:
            return result.succeeded
        assert self._agreed is not None, "the key is free, so the guard has failed"
        await self.agree(self._agreed[0])
        return await self._claim(block)

    async def _claimed_unsure(self, pool: Pool, node_id: str, generation: int) -> Block | None:
        for cidr in tuple(self._unsure):
            item = await self._session.get(self._block_key(cidr))
            self._unsure.remove(cidr)
            block = _readable(item, Block) if item is not None else None
            if block and (block.node_id, block.generation, block.pool) == (node_id, generation, pool.name):
                return block
        return None

    async def _taken(self) -> set[Network]:
        prefix = f"{self._root}blocks/"
        keys = (await self._session.get_prefix(prefix, keys_only=True)).items
        networks = {parse_network(item.key.removeprefix(prefix)) for item in keys}
        return {network for network in networks if network is not None}

    async def _blocks_of(self, name: str) -> dict[Item, Block]:
        items = (await self._session.get_prefix(f"{self._root}blocks/")).items
        blocks = {item: _readable(item, Block) for item in items}
        return {item: block for item, block in blocks.items() if block is not None and block.node == name}

    def _guard(self) -> list[Compare]:
        return [] if self._agreed is None else [unchanged(f"{self._root}config", self._agreed[1])]

    def _block_key(self, cidr: Network) -> str:
        return f"{self._root}blocks/{cidr}"

    # --- nodes -----------------------------------------------------------------------------------------------

    async def publish(self, record: NodeRecord) -> None:
        key = f"{self._root}nodes/{record.name}"
        while True:
            item = await self._session.get(key)
            stored = None if item is None else _decoded(item, NodeRecord)
            if stored is not None and not may_publish(record, stored):
                raise name_taken(record.name, stored.node_id, stored.addresses)
            before = unchanged(key, 0 if item is None else item.mod_revision)
            if (await self._session.txn([before], [Put(key, encode(record))])).succeeded:
                return

    async def watch_nodes(self) -> AsyncGenerator[Mapping[str, NodeRecord], None]:
        nodes = _Nodes(f"{self._root}nodes/")
        pump = asyncio.create_task(self._pump(nodes), name="watch-nodes")
        try:
            while True:
                changed = asyncio.create_task(nodes.changed.wait())
                await asyncio.wait({changed, pump}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if not nodes.changed.is_set():
                    pump.result()  # it ends only by an exception
                nodes.changed.clear()
                yield MappingProxyType(dict(nodes.known))
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(self, nodes: _Nodes) -> None:
        async with aclosing(self._session.watch_prefix(nodes.prefix)) as batches:
            async for batch in batches:
                if isinstance(batch, Snapshot):
                    nodes.replace(batch.items)
                else:
                    for event in batch.events:
                        if isinstance(event, Deleted):
                            nodes.drop(event.key)
                        else:
                            nodes.set(event.item)
                nodes.changed.set()

    async def _node(self, name: str) -> NodeRecord | None:
        item = await self._session.get(f"{self._root}nodes/{name}")
        return None if item is None else _decoded(item, NodeRecord)


class _Nodes:
    """The records under nodes/ as they are now; what cannot be read is not in `known`, and was logged."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.known: dict[str, NodeRecord] = {}
        self.changed = asyncio.Event()
        self._damaged: set[str] = set()

    def replace(self, items: tuple[Item, ...]) -> None:
        names = {item.key.removeprefix(self.prefix) for item in items}
        for name in (self.known.keys() | self._damaged) - names:
            self.drop(self.prefix + name)
        for item in items:
            self.set(item)

    def set(self, item: Item) -> None:
        name = item.key.removeprefix(self.prefix)
        record = _readable(item, NodeRecord, report=self._report(name))
        if record is not None and record.name != name:
            self._report(name)(f"it is the record of {record.name!r}")
            record = None
        if record is None:
            self._damaged.add(name)
            self.known.pop(name, None)
        else:
            self._damaged.discard(name)
            self.known[name] = record

    def drop(self, key: str) -> None:
        name = key.removeprefix(self.prefix)
        self.known.pop(name, None)
        self._damaged.discard(name)

    def _report(self, name: str) -> Callable[[str], None]:
        def report(why: str) -> None:
            if name not in self._damaged:
                log.error("node record %r is skipped: %s", name, why, extra={"fields": {"node": name}})

        return report


def _decoded(item: Item, kind: type[T]) -> T:
    """The record in `item`. Raises RecordDamaged naming the key."""
    try:
        return decode(item.value, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordDamaged(f"etcd key {item.key} cannot be read ({error}): mend or delete it") from error


def _readable(item: Item, kind: type[T], report: Callable[[str], None] | None = None) -> T | None:
    """The record in `item`, or None when it is damaged, which is reported (by default: logged)."""
    try:
        return _decoded(item, kind)
    except RecordDamaged as error:
        (report or log.error)(str(error))
        return None
