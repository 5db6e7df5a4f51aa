"""The registry in etcd. What is kept there, and what each call promises, is ipam_daemon/registry.py's.

Every claim is one transaction on the key that it is about, so two nodes cannot both win. A claim also holds only under
the configuration that was agreed on: since the block size cannot change unseen, no two claims of different sizes can
overlap by crossing each other; older blocks of another size are seen in the listing and stepped around.

A claim costs one listing of keys (30 bytes a block) and one transaction, and one more for every other node that wanted
the same block in the same moment. A transaction whose answer was lost may have been carried out: its block is looked
at first the next time, so that it does not leak.

A store that was wiped or restored may have lost what is somebody's: new claims wait, what nodes remember is claimed
again at once, and the list of nodes keeps whom the store has lost until they are back or their blocks are another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TypeVar

import msgspec

from ipam_daemon.claims import (
    ConfigMissing,
    Entry,
    NodeNameTaken,
    RecordDamaged,
    check_same,
    exhausted,
    free_blocks,
    may_publish,
    name_taken,
    next_generation,
    overlap,
    parse_network,
    still_lives,
)
from ipam_daemon.departures import Departures
from ipam_daemon.live_name import LiveName
from ipam_daemon.model import Block, ClusterConfig, Network, NodeRecord, Pool, encode
from ipam_daemon.node_list import NodeList, decoded
from ipam_daemon.registry import ROOT
from ipam_daemon.restoration import Restoration
from podwire.etcd import EtcdError, EtcdSession, EtcdUnavailable
from podwire.etcd.records import (
    Changes,
    Compare,
    Get,
    Header,
    Item,
    Put,
    Snapshot,
    TxnResult,
    Written,
    absent,
    unchanged,
)
from podwire.etcd.records import Delete as DeleteKey

log = logging.getLogger(__name__)
LIVE_S = 10
T = TypeVar("T")


class EtcdRegistry:
    """The registry in etcd. `root` ends in a slash; `live_s` is the TTL of the live key in seconds.

    `settle_s` is for how long new claims wait when etcd was wiped or restored: twice `live_s` by default, in which
    every daemon that lives has noticed and claimed its blocks again.
    """

    def __init__(
        self, session: EtcdSession, *, root: str = ROOT, live_s: int = LIVE_S, settle_s: int | None = None
    ) -> None:
        self._session = session
        self._root = root
        self._live_s = live_s
        self._restoration = Restoration(session, root, settle_s or 2 * live_s, look_s=live_s)
        self._departures = Departures(session, root)
        self._live: LiveName | None = None
        self._agreed: tuple[ClusterConfig, int] | None = None  # with the mod revision of its key
        self._unsure: list[Network] = []  # claimed perhaps: the answer was lost

    # --- configuration ---------------------------------------------------------------------------------------

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        key = f"{self._root}config"
        item = await self._session.get(key)  # first: a role that may only read must get by
        if item is None:
            result = await self._write_config(key, config)
            if result.succeeded:
                self._agreed = (config, result.revision)
                return config
            (item,) = result.found
            assert item is not None, "the transaction found it there"
        theirs = decoded(item, ClusterConfig)
        check_same(config, theirs, key)
        self._agreed = (theirs, item.mod_revision)
        return theirs

    async def _write_config(self, key: str, config: ClusterConfig) -> TxnResult:
        try:
            return await self._session.txn([absent(key)], [Put(key, encode(config))], [Get(key)])
        except EtcdError as error:
            if error.code != "PERMISSION_DENIED":
                raise
            raise ConfigMissing(
                f"etcd has no configuration of the cluster at {key}, and this node may not write it: "
                f"put {encode(config).decode()} there as an administrator"
            ) from error

    async def watch_config(self) -> AsyncGenerator[ClusterConfig, None]:
        key = f"{self._root}config"
        async with aclosing(self._session.watch_prefix(key)) as batches:
            async for batch in batches:
                for item in latest(batch):
                    config = _readable(item, ClusterConfig) if item.key == key else None
                    if config is not None:
                        yield config

    # --- a store that was restored ---------------------------------------------------------------------------

    def seen(self) -> str:
        header = self._session.history.seen
        return "" if header is None else f"{header.cluster_id:x}/{header.revision}"

    def recall(self, seen: str) -> None:
        cluster, _, revision = seen.partition("/")
        with contextlib.suppress(ValueError):  # written by another version: then nothing is known
            self._session.history.recall(Header(int(cluster, 16), int(revision)))

    async def restored(self) -> str:
        return await self._restoration.restored()

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
        self._restoration.node = name
        self._restoration.begin()
        self._departures.begin(name)
        return Entry(name=name, node_id=node_id, generation=generation, reowned=tuple(reowned))

    async def look_at_name(self) -> None:
        if self._live is not None:
            await self._live.look()

    async def lost(self) -> NodeNameTaken:
        assert self._live is not None, "enter comes first"
        return await self._live.lost()

    async def leave(self) -> None:
        await self._restoration.end()
        await self._departures.end()
        live, self._live = self._live, None
        if live is not None:
            await live.leave()

    async def _reown(self, item: Item, former: Block, node_id: str, generation: int) -> Block | None:
        block = msgspec.structs.replace(former, node_id=node_id, generation=generation)
        result = await self._session.txn([unchanged(item.key, item.mod_revision)], [Put(item.key, encode(block))])
        return block if result.succeeded else None  # the former machine has just released it

    # --- blocks ----------------------------------------------------------------------------------------------

    async def load_blocks(self, name: str) -> tuple[Block, ...]:
        items = await self._blocks_of(name)
        if name == self._restoration.node:
            for item in items:
                self._restoration.wrote(item.key, item.mod_revision)
        return tuple(items.values())

    async def claim_block(self, pool: Pool, node: str, node_id: str, generation: int) -> Block:
        found = await self._claimed_unsure(pool, node_id, generation)
        if found is not None:
            return found
        self._restoration.check()
        breaks = self._session.history.breaks
        taken: set[Network] = set()
        while True:
            known, taken = taken, await self._taken()
            for cidr in free_blocks(pool, taken, node):
                block = Block(cidr=cidr, pool=pool.name, node=node, node_id=node_id, generation=generation)
                if await self._claim(block, breaks):
                    return block
            if known == taken:  # a second look has found nothing new
                raise exhausted(pool, taken)

    async def reclaim_block(self, block: Block) -> str | None:
        while True:
            for item in (await self._session.get_prefix(f"{self._root}blocks/")).items:
                holder = _readable(item, Block)
                if holder is not None and overlap(holder.cidr, block.cidr):
                    if (holder.node_id, holder.cidr) != (block.node_id, block.cidr):
                        return holder.node
                    if holder.node == block.node:
                        self._restoration.wrote(item.key, item.mod_revision)
                        return None
                    if await self._rename(item, holder, block):
                        return None
                    break
            if await self._claim(block):
                await self._restoration.missed(self._block_key(block.cidr))
                return None

    async def _rename(self, item: Item, holder: Block, block: Block) -> bool:
        """This machine had another name. Whether the block is under the new one; False when it has just changed.

        Raises TryAgain while the former name lives: for some seconds, or for as long as there is another machine that
        is a copy of this one.
        """
        if await self._session.get(f"{self._root}live/{holder.node}") is not None:
            raise still_lives(holder)
        result = await self._session.txn([unchanged(item.key, item.mod_revision)], [Put(item.key, encode(block))])
        if result.succeeded:
            self._restoration.wrote(item.key, result.revision)
        return result.succeeded

    async def release_block(self, block: Block) -> bool:
        key = self._block_key(block.cidr)
        self._restoration.gave_up(key)
        while (item := await self._session.get(key)) is not None:
            stored = _readable(item, Block)
            if stored is None or (stored.node_id, stored.generation) != (block.node_id, block.generation):
                return False
            if (await self._session.txn([unchanged(key, item.mod_revision)], [DeleteKey(key)])).succeeded:
                return True
        return False

    async def _claim(self, block: Block, breaks: int | None = None) -> bool:
        """Whether the block is ours now; False when someone else has it.

        `breaks`: of the history when the claim began; None for a block that was ours before. Raises StoreRestored.
        """
        key, new = self._block_key(block.cidr), breaks is not None
        guard = [*self._guard(), *([absent(self._restoration.key)] if new else [])]
        otherwise = [Get(key), Get(self._restoration.key)]
        try:
            result = await self._session.txn([absent(key), *guard], [Put(key, encode(block))], otherwise)
        except (EtcdUnavailable, asyncio.CancelledError):  # an ADD waits for a claim as long as it may, and no longer
            self._unsure.append(block.cidr)
            raise
        if result.succeeded:
            if new and breaks != self._session.history.breaks:  # restored between our listing and this
                await self._session.txn([unchanged(key, result.revision)], [DeleteKey(key)])
                self._restoration.check()
            self._restoration.wrote(key, result.revision)
            return True
        holder, marker = result.found
        if holder is not None:
            return False
        if new:
            self._restoration.check(marker)
        assert self._agreed is not None, "the key is free, so the guard has failed"
        await self.agree(self._agreed[0])
        return await self._claim(block, breaks)

    async def _claimed_unsure(self, pool: Pool, node_id: str, generation: int) -> Block | None:
        for cidr in tuple(self._unsure):
            item = await self._session.get(self._block_key(cidr))
            self._unsure.remove(cidr)
            block = _readable(item, Block) if item is not None else None
            if block and (block.node_id, block.generation, block.pool) == (node_id, generation, pool.name):
                assert item is not None, "the block was read from it"
                self._restoration.wrote(item.key, item.mod_revision)
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
            stored = None if item is None else decoded(item, NodeRecord)
            if stored is not None and not may_publish(record, stored):
                raise name_taken(record.name, stored.node_id, stored.addresses)
            before = unchanged(key, 0 if item is None else item.mod_revision)
            trace = self._restoration.trace if self._restoration.node == record.name else ""
            asked = [Get(trace)] if trace else []
            result = await self._session.txn([before], [Put(key, encode(record)), *asked])
            if result.succeeded:
                self._restoration.wrote(key, result.revision)
                if any(result.found):
                    await self._clear(trace)
                return

    async def _clear(self, trace: str) -> None:
        """The node is back: from now on keys that it misses were lost."""
        try:
            await self._session.delete(trace)
        except EtcdError as error:
            if error.code != "PERMISSION_DENIED":
                raise
            log.warning("%s stays, since this node's role may not delete it: see docs/etcd.md", trace)

    async def watch_nodes(self) -> AsyncGenerator[Mapping[str, NodeRecord], None]:
        await self._restoration.settled()
        nodes = NodeList(f"{self._root}nodes/", own=self._restoration.node)
        history = self._session.history
        forget = history.on_break(nodes.history_broke)
        pump, breaks = self._pump(nodes), history.breaks
        try:
            while True:
                changed = asyncio.create_task(nodes.changed.wait())
                await asyncio.wait({changed, pump}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if not nodes.changed.is_set():
                    pump.result()  # it ends only by an exception
                nodes.changed.clear()
                if breaks != history.breaks:  # the watch may go on as if nothing had happened, so it is begun anew
                    breaks = history.breaks
                    pump.cancel()
                    pump = self._pump(nodes)
                else:
                    yield nodes.mapping()
        finally:
            forget()
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    def _pump(self, nodes: NodeList) -> asyncio.Task[None]:
        async def pump() -> None:
            async with aclosing(self._session.watch_prefix(nodes.prefix)) as batches:
                async for batch in batches:
                    nodes.take(batch)

        return asyncio.create_task(pump(), name="watch-nodes")

    async def _node(self, name: str) -> NodeRecord | None:
        item = await self._session.get(f"{self._root}nodes/{name}")
        return None if item is None else decoded(item, NodeRecord)


def latest(batch: Snapshot | Changes) -> tuple[Item, ...]:
    """What a watch says that is there."""
    if isinstance(batch, Snapshot):
        return batch.items
    return tuple(event.item for event in batch.events if isinstance(event, Written))


def _readable(item: Item, kind: type[T]) -> T | None:
    """The record in `item`, or None when it is damaged, which is logged."""
    try:
        return decoded(item, kind)
    except RecordDamaged as error:
        log.error("%s", error)
        return None
