"""The daemon of one node: what etcd says becomes a plan, the plan becomes the kernel's state, again and again.

    etcd ──membership──▶ blocks, record ─┐
    etcd ──watch nodes──────▶ peers ─────┼─▶ plan_node() ─▶ devices, firewall, peers   converge(), level-triggered
    underlay ───────────▶ MTU, addresses ┘

Membership (agree on the configuration, take the name, claim a block, publish the record) is tried until it succeeds;
the node works without it as far as its journal goes, so a daemon that is restarted while etcd is away adds pods at
once, in the blocks that the journal remembers, over the routes that the kernel still has (after a reboot: none, until
etcd says who the others are). Nothing that the kernel holds of other nodes is removed before etcd has said that.

A task that dies takes the daemon with it: a daemon that limps on without its watch is worse than one that restarts.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress

import msgspec

import podwire
from ipam_daemon.attachments import Attachments
from ipam_daemon.blocks import BlockKeeper
from ipam_daemon.claims import PoolExhausted
from ipam_daemon.dataplane import DataPlane
from ipam_daemon.errors import CniError, TryAgainLater
from ipam_daemon.faults import point
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Address, Backend, BackendType, Block, ClusterConfig, NodeRecord, Pool, decode, encode
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.notes import describe, on_backends, on_doubles, on_unreached
from ipam_daemon.plan import NodePlan, is_complete, plan_record
from ipam_daemon.registry import Registry
from ipam_daemon.settings import Settings
from ipam_daemon.supply import short_of
from ipam_daemon.wires import Wires
from podwire.errors import TryAgain
from podwire.etcd import EtcdUnavailable

_CONVERGED = "converged"  # in the journal: the kernel has the routes to the peers, perhaps from an earlier daemon
_TUNNELS = "tunnels"  # in the journal: whether a node was reached by VXLAN when all were last known
_BACKEND = "backend"  # in the journal: what the cluster's was when etcd was last heard
_SEEN = "etcd"  # in the journal: how far etcd has come, so that a restored one is known
_FIRST_RETRY, _LAST_RETRY = 0.2, 5.0

log = logging.getLogger(__name__)


async def _kept_nowhere() -> bool:
    return True


class Agent:
    """The daemon's work, apart from answering calls."""

    def __init__(
        self,
        *,
        settings: Settings,
        node_id: str,
        registry: Registry,
        journal: Journal,
        attachments: Attachments,
        thread: NetlinkThread,
        wires: Wires,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._node_id = node_id
        self._registry = registry
        self._journal = journal
        self._attachments = attachments
        self._thread = thread
        self._wires = wires
        self._metrics = metrics
        self._config = ClusterConfig(pools=settings.pools, backend=settings.backend)
        self._foreign_pools = ""
        self._generation = 1
        self._records: Mapping[str, NodeRecord] | None = None
        self._blocks: tuple[Block, ...] = ()
        self._failure = ""  # why the kernel could not be brought to its plan the last time
        self._alone = False  # etcd did not answer: pods need not wait for the routes to other nodes
        self._converging = asyncio.Lock()
        self._changed = asyncio.Event()
        self._entered = asyncio.Event()
        self._moved = asyncio.Event()  # the node's addresses are others than etcd has
        self._joining = asyncio.Lock()
        self._plane = DataPlane(
            settings=settings,
            attachments=attachments,
            thread=thread,
            wires=wires,
            metrics=metrics,
            changed=self._changed.set,
        )
        self.keeper = BlockKeeper(
            registry=registry,
            attachments=attachments,
            claim=self._claim_block,
            use=self._use_blocks,
            limit=settings.max_blocks,
            idle_s=settings.block_idle,
            keep=lambda: self.keep_blocks(),
        )
        """Claims and returns blocks."""
        self.keep_blocks: Callable[[], Awaitable[bool]] = _kept_nowhere
        """Writes down for after a reboot which blocks are the node's; whether it could."""
        attachments.more = self.keeper.more
        attachments.addresses.allocator.families = settings.families

    # --- what others ask

    def not_ready(self) -> list[str]:
        """Why an ADD cannot succeed now; empty when it can."""
        if not self._attachments.addresses.allocator.blocks:
            return [f"this node has no block of addresses yet: {self._attachments.waiting_for}"]
        if self._attachments.fenced:
            return [f"{self._attachments.fenced} pods sit in a block that went to another node, and are cut off"]
        if not self._attachments.mtu:
            return [f"the node's data path is not set up yet: {self._attachments.waiting_for}"]
        uses = self._attachments.addresses.uses()
        return [self._shortage(family) for family in sorted(short_of(uses, self._settings.families))]

    def _shortage(self, family: int) -> str:
        cidrs = [each.cidr for each in self._attachments.addresses.allocator.blocks if each.cidr.version == family]
        where, why = ", ".join(map(str, cidrs)) or "no block", self.keeper.obstacle or "maxBlocks"
        return f"no IPv{family} address is free in {where}, and no block can be claimed: {why}"

    def notes(self) -> list[str]:
        """What an operator may want to know, and keeps no pod from being added."""
        why = (self._failure or self._plane.refused) if self._attachments.mtu else ""  # else it is why not ready
        notes = [self._foreign_pools] if self._foreign_pools else []
        notes += [f"the kernel is not as it should be, which is tried again: {why}"] if why else []
        notes += self._plane.lacks
        notes += on_backends(self._settings.backend, self._config.backend)
        notes += on_doubles(self.record, self.peers)
        if self.plan is not None and self.plan.peers is not None:
            notes += on_unreached(self.record, self.peers, self.plan.peers.routes, self._config.backend.type)
        return notes

    @property
    def plan(self) -> NodePlan | None:
        """What the kernel was last brought to, None before the first time."""
        return self._plane.plan

    @property
    def backend(self) -> BackendType:
        """How pods of other nodes are reached, as the kernel has it."""
        return self._config.backend.type if self.plan is None else self.plan.backend

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The node's own addresses on the underlay."""
        return self._plane.addresses

    @property
    def record(self) -> NodeRecord:
        """What this node is, as it tells its peers."""
        return self._record(self._blocks)

    @property
    def peers(self) -> tuple[NodeRecord, ...]:
        """The other nodes as etcd last told of them, by name."""
        others = (record for name, record in (self._records or {}).items() if name != self._settings.node)
        return tuple(sorted(others, key=lambda record: record.name))

    @property
    def peer_count(self) -> int:
        """Nodes whose pods are reached, this one not counted."""
        if self.plan is None or self.plan.peers is None:
            return 0
        routes = self.plan.peers.routes
        return sum(is_complete(each) and all(cidr in routes for cidr in each.blocks) for each in self.peers)

    # --- start

    async def restore(self) -> None:
        """Takes up what the journal says, before any call is answered. Needs no etcd."""
        await self._attachments.strays.adopt_all()
        self._registry.recall(self._journal.meta(_SEEN) or "")
        self._recall_backend()
        self._blocks = tuple(await self._first_one_first(list(self._journal.blocks())))
        self._attachments.addresses.use_blocks(self._blocks)
        # before what is unfinished is undone, which unbinds only what is known to be bound
        await self._thread.run(self._wires.adopt, self._journal.attachments())
        undone = await self._attachments.resume()
        if undone:
            self._metrics.repaired("unfinished-add", f"undid {undone} ADDs of the daemon before", undone)
            log.warning("undid %d ADDs that were not finished", undone)
        point("start.restored")

    def _recall_backend(self) -> None:
        """What holds in the cluster, while etcd is away; the configuration's in a journal that was begun anew."""
        known = self._journal.meta(_BACKEND)
        if known is not None:
            with suppress(msgspec.DecodeError):
                self._config = msgspec.structs.replace(self._config, backend=decode(known.encode(), Backend))

    # --- etcd

    async def follow_registry(self) -> None:
        """Joins the cluster and follows the other nodes, until cancelled.

        Raises a PodwireError that trying again does not mend: the node's name is another's, the configuration differs.
        """
        await self._join_patiently()
        async with aclosing(self._registry.watch_nodes()) as changes:
            async for records in changes:
                mine = records.get(self._settings.node)
                if mine is not None:
                    self._records = records
                    self._changed.set()
                if mine is None or self._is_altered(mine):
                    await self._republish(mine)

    def _is_altered(self, mine: NodeRecord) -> bool:
        """Whether somebody else wrote this node's record; another machine's is for `hold_name` to judge."""
        ours = self.record
        return mine.node_id == ours.node_id and msgspec.structs.replace(mine, published=ours.published) != ours

    async def follow_config(self) -> None:
        """Follows the cluster's backend, until cancelled. Pools do not change while a daemon runs."""
        await self._entered.wait()
        async with aclosing(self._registry.watch_config()) as changes:
            async for config in changes:
                self._use_config(config)

    def _use_config(self, config: ClusterConfig) -> None:
        if config.pools != self._config.pools:
            self._foreign_pools = "the pools in etcd are others than this node's, which go on to hold until a restart"
            log.error(self._foreign_pools)
            return
        self._foreign_pools = ""
        before, self._config = self._config.backend, config
        known = encode(config.backend).decode()
        if self._journal.meta(_BACKEND) != known:
            self._remember(_BACKEND, known)
        if config.backend != before:
            log.info(
                "the backend changes", extra={"fields": {"from": describe(before), "to": describe(config.backend)}}
            )
            self._changed.set()

    async def follow_addresses(self) -> None:
        """Tells the peers this node's addresses whenever etcd has others, until cancelled. Not as a part of bringing
        the kernel to its plan, which needs no etcd: a connection from an address that is gone is a silent one."""
        while True:
            await self._moved.wait()
            self._moved.clear()
            delay = _FIRST_RETRY
            while self._has_moved():
                with suppress(TryAgain):
                    async with self._joining, self.keeper.pausing():
                        await self._publish(self._blocks)
                await asyncio.sleep(delay)  # until etcd tells of it
                delay = min(2 * delay, _LAST_RETRY)

    def _has_moved(self) -> bool:
        mine = (self._records or {}).get(self._settings.node)
        return mine is not None and mine.node_id == self._node_id and mine.addresses != self.addresses

    async def hold_blocks(self) -> None:
        """Claims the node's blocks again whenever etcd was wiped or restored, until cancelled."""
        await self._entered.wait()
        while True:
            why = await self._registry.restored()
            log.error("etcd was wiped or restored (%s); saying again which blocks are this node's", why)
            self._metrics.repairs.labels("etcd-restored").inc()
            await self._join_patiently()

    async def _join_patiently(self) -> None:
        delay = _FIRST_RETRY
        while True:
            try:
                await self._join_once()
                return
            except (TryAgain, PoolExhausted, CniError) as error:
                self._attachments.waiting_for = str(error)
                log.warning("joining the cluster waits: %s", error)
                if isinstance(error, EtcdUnavailable) and not self._alone:
                    self._alone = True
                    self._changed.set()
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LAST_RETRY)

    async def _join_once(self) -> None:
        async with self._joining, self.keeper.pausing():
            await self._join()

    async def _republish(self, mine: NodeRecord | None) -> None:
        """A list of nodes that lacks this one is not believed: etcd was wiped or restored, or the node was away and the
        cluster was made to forget it. It joins again, since its blocks may be gone, too; meanwhile the kernel keeps
        what it has of the others. One attempt: the next list, or `hold_blocks`, brings another."""
        with suppress(TryAgain, PoolExhausted, CniError):
            async with self._joining, self.keeper.pausing():
                if mine is not None and not self._is_altered(mine):
                    return  # a block was claimed or returned meanwhile
                log.error("etcd has lost this node's record, or has another; joining again")
                self._metrics.repaired("record", "joined the cluster again: this node's record was not its own")
                await self._join()

    async def rejoin(self) -> None:
        """Brings node and etcd to say the same again: blocks that nobody else has are claimed, those that went to
        others given up and the pods in them cut off, the record is published. Raises TryAgain, PoolExhausted."""
        if not self._entered.is_set():
            raise TryAgainLater(f"this node has not joined the cluster yet: {self._attachments.waiting_for}")
        await self._registry.look_at_name()
        await self._join_once()

    async def resync(self) -> None:
        """Brings the kernel to the plan, after reading back all of it. Raises a CniError."""
        await self._converge(resync=True)

    async def hold_name(self) -> None:
        """Waits until the node's name went to another machine, and raises the NodeNameTaken that says so."""
        await self._entered.wait()
        raise await self._registry.lost()

    async def _join(self) -> None:
        settings = self._settings
        await self._plane.find_addresses()
        self._use_config(await self._registry.agree(self._config))
        if not self._entered.is_set():
            self._generation = (await self._registry.enter(settings.node, self._node_id)).generation
            self._entered.set()
            point("join.entered")
        blocks = await self._own_blocks()
        await self._use_owned(blocks)  # before any claim, which may wait: what is another's is given up at once
        for pool in self._config.pools:
            if not any(pool.has(block) for block in blocks):
                blocks.append(await self._claim_block(pool))
                await self._use_owned(blocks)
        await self._publish(blocks)
        point("join.published")
        self.keeper.begin(self._config, blocks)
        log.info("joined", extra={"fields": {"node": settings.node, "blocks": [str(b.cidr) for b in blocks]}})
        self._changed.set()

    async def _use_owned(self, blocks: Sequence[Block]) -> None:
        self._journal_blocks(blocks)
        self._remember(_SEEN, self._registry.seen())
        self._blocks = tuple(blocks)
        self._attachments.addresses.use_blocks(blocks)
        if await self._attachments.fence():
            log.error("pods sit in a block that went to another node; they are cut off, and no pod is added")
        await self.keep_blocks()

    async def _claim_block(self, pool: Pool) -> Block:
        block = await self._registry.claim_block(pool, self._settings.node, self._node_id, self._generation)
        point("block.claimed")
        return block

    async def _use_blocks(self, blocks: Sequence[Block]) -> None:
        """Makes journal, peers and kernel say that these are the node's blocks; only then are new ones handed out."""
        self._journal_blocks(blocks)
        point("block.journaled")
        await self._publish(blocks)
        point("block.published")
        self._blocks = tuple(blocks)
        await self._converge(resync=False)
        point("block.plumbed")
        self._attachments.addresses.use_blocks(blocks)

    def _journal_blocks(self, blocks: Sequence[Block]) -> None:
        try:
            self._journal.set_blocks(blocks)
        except sqlite3.Error as error:
            raise TryAgainLater(f"the journal cannot be written: {error}") from error

    def _remember(self, name: str, value: str) -> None:
        """For the next process. A disk without room costs it this, and this node nothing."""
        try:
            if self._journal.meta(name) != value:
                self._journal.set_meta(name, value)
        except sqlite3.Error as error:
            log.warning("%s cannot be journaled: %s", name, error)

    async def _own_blocks(self) -> list[Block]:
        """What etcd says, and what the journal says and etcd has lost. A block that went to another node is gone."""
        blocks = list(await self._registry.load_blocks(self._settings.node))
        known = {block.cidr for block in blocks}
        for former in self._journal.blocks():
            if former.cidr in known:
                continue
            block = msgspec.structs.replace(
                former, node=self._settings.node, node_id=self._node_id, generation=self._generation
            )
            holder = await self._registry.reclaim_block(block)
            if holder is None:
                blocks.append(block)
                log.error(
                    "etcd had lost a block of this node, or had it under another name; it is claimed again",
                    extra={"fields": {"block": str(block.cidr)}},
                )
            else:
                self._metrics.repairs.labels("block-conflict").inc()
                log.error(
                    "a block of this node went to another", extra={"fields": {"block": str(block.cidr), "node": holder}}
                )
        return await self._first_one_first(blocks)

    async def _first_one_first(self, blocks: list[Block]) -> list[Block]:
        """The block that the node's VTEP is in stays the first: with another, the peers would have to learn another
        VTEP, and packets are lost until they have. The kernel knows it best, a journal may be gone."""
        vteps = await self._plane.vtep_addresses()
        return sorted(blocks, key=lambda block: not any(vtep in block.cidr for vtep in vteps))

    def _record(self, blocks: tuple[Block, ...]) -> NodeRecord:
        return plan_record(
            self._settings.node, self._node_id, self._generation, self._plane.addresses, blocks, podwire.__version__
        )

    async def _publish(self, blocks: Sequence[Block]) -> None:
        record = self._record(tuple(blocks))
        await self._registry.publish(msgspec.structs.replace(record, published=time.time()))

    # --- the kernel

    async def converge_forever(self) -> None:
        """Brings the kernel to the plan whenever the plan changes, and checks it periodically, until cancelled."""
        resync, delay = True, _FIRST_RETRY
        clock, interval = asyncio.get_running_loop().time, self._settings.reconcile_interval
        due = clock()
        while True:
            try:
                await self._converge(resync)
                self._failure = ""
            except CniError as error:
                self._failure = self._attachments.waiting_for = str(error)
                self._complain(self._failure)
                await asyncio.sleep(delay)
                delay, resync = min(2 * delay, _LAST_RETRY), True
                continue
            if resync:
                due = clock() + interval  # changes, however many, do not put it off
            if self._plane.refused:
                self._complain(self._plane.refused)
                due = min(due, clock() + delay)
            delay, resync = min(2 * delay, _LAST_RETRY) if self._plane.refused else _FIRST_RETRY, False
            try:
                async with asyncio.timeout_at(due):  # Python 3.11's wait_for may lose the cancellation that ends us
                    await self._changed.wait()
            except TimeoutError:
                resync = True
                self._remember(_SEEN, self._registry.seen())

    def _complain(self, why: str) -> None:
        self._metrics.failures.inc()
        log.warning("bringing the kernel to its plan failed, trying again: %s", why)

    async def _converge(self, resync: bool) -> None:
        async with self._converging:
            await self._bring_to_plan(resync)

    async def _bring_to_plan(self, resync: bool) -> None:
        self._changed.clear()
        blocks, plane = self._blocks, self._plane
        if not blocks:
            return
        if plane.is_stale or resync:
            await plane.find_addresses()
        if self._has_moved():
            self._moved.set()
        before = plane.plan
        tunnelled = self._journal.meta(_TUNNELS) != "no"
        record = self._record(blocks)
        plan = await plane.bring(self._config, record, blocks, self._records, resync, tunnelled=tunnelled)
        if plan.peers is not None:
            self._remember(_CONVERGED, "yes")
            self._remember(_TUNNELS, "yes" if plan.peers.has_tunnels else "no")
        if self._alone or plan.peers is not None or self._journal.meta(_CONVERGED):
            self._attachments.mtu = plan.mtu
        if resync or before is None or before.mtu != plan.mtu:
            await self._attachments.resize(plan.mtu)

    def close(self) -> None:
        """Listens for nothing any more."""
        self._plane.close()
