"""The node's kernel, brought to its plan: the appliers in their order, and what a plan hangs on besides etcd.

    underlay ─▶ plan_node() ─▶ wires shrink ─▶ devices ─▶ firewall ─▶ peers ─▶ wires grow
    records ──▶ PeerTable ──┘

The order is a contract. A wire shrinks before anything behind it takes less, and grows after all of it takes more. The
devices are there before anything is said about them, and a packet is filtered before there is a way for it.

Only what differs is sent: a plan that is the one before costs its own making, and a peer more costs three kernel
objects. A resync reads all of it back; so does word that the underlay has changed, for everything that leads over it:
an interface that was down has lost its routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ipam_daemon.attachments import Attachments
from ipam_daemon.conntrack import forget_udp_of
from ipam_daemon.devices import Devices
from ipam_daemon.errors import CniError, EntriesRefused, PlumbingFailed, TryAgainLater
from ipam_daemon.faults import point
from ipam_daemon.firewall import Firewall
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Address, BackendType, Block, ClusterConfig, NodeRecord
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.peer_table import PeerTable
from ipam_daemon.peers import Peers
from ipam_daemon.plan import VXLAN, FirewallPlan, NodePlan, plan_node, plan_peers, with_peers
from ipam_daemon.settings import Settings
from ipam_daemon.underlay import OwnAddresses, Underlay, UnderlayWatch, find_underlay, look_at_addresses
from ipam_daemon.wires import Wires

log = logging.getLogger(__name__)


class DataPlane:
    """The kernel of this node. Its coroutines are called one at a time."""

    def __init__(
        self,
        *,
        settings: Settings,
        attachments: Attachments,
        thread: NetlinkThread,
        wires: Wires,
        metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when the underlay has changed: it is time for `bring`."""
        self._settings = settings
        self._attachments = attachments
        self._thread = thread
        self._wires = wires
        self._metrics = metrics
        self._changed = changed
        self._devices = Devices(thread)
        self._firewall = Firewall()
        self._peers = Peers(thread, pools=(pool.cidr for pool in settings.pools))
        self._table: PeerTable | None = None
        self._table_of: object = None  # the circumstances that the table was made in
        self._applied: PeerTable | None = None  # the one that the kernel was last brought to
        self._underlay: Underlay | None = None
        self._stale = True  # what is known of the underlay
        self._watch = UnderlayWatch(thread, self._underlay_changed)
        self._own = OwnAddresses(settings.node_addresses, settings.families)
        self._look_again: asyncio.TimerHandle | None = None
        self.plan: NodePlan | None = None
        """What the kernel was last brought to, None before the first time."""
        self.refused = ""
        """What the kernel refused of that: entries towards other nodes, which pods need not wait for."""

    # --- the underlay

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The node's own addresses on the underlay, that of the VXLAN end point first."""
        return self._own.addresses

    @property
    def lacks(self) -> list[str]:
        """Which of these no interface has any more, in words."""
        return self._own.lacks

    @property
    def is_stale(self) -> bool:
        """Whether the underlay has to be looked at."""
        return self._stale

    async def find_addresses(self) -> None:
        """Looks whether the node's own addresses are others by now. Raises TryAgainLater when there is none.

        Word that comes from here on makes the underlay stale again: `bring` looks at it after this in any case.
        """
        self._stale, self._underlay = False, None
        standing = await self._thread.run(look_at_addresses, self._thread, self._own.searches)
        before = self.addresses
        for word in self._own.follow(standing, asyncio.get_running_loop().time()):
            log.warning(word)
        self._look_at_addresses_at(self._own.due)
        if before and self.addresses != before:
            self._underlay_changed()  # somebody may be bringing the kernel to what the former ones have
        if not self.addresses:
            raise TryAgainLater("nodeAddresses is empty and this node has no default route to find its address by")

    def _look_at_addresses_at(self, due: float | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        loop = asyncio.get_running_loop()
        self._look_again = None if due is None else loop.call_at(due, self._underlay_changed)

    async def vtep_addresses(self) -> tuple[Address, ...]:
        """The addresses of the VXLAN device as it is; none when there is none."""
        return await self._thread.run(self._devices.vtep_addresses, VXLAN)

    async def _look_at_underlay(self) -> Underlay:
        found = await self._thread.run(find_underlay, self._thread, self.addresses)
        if await self._watch.follow(found.devices):  # what changed between the two was not told
            found = await self._thread.run(find_underlay, self._thread, self.addresses)
        if not found.mtu and not self._settings.mtu:
            raise TryAgainLater(f"{self.addresses[0]} is on lo and there is no default route: set mtu, or add one")
        self._underlay = found
        return found

    def _underlay_changed(self) -> None:
        self._stale = True
        self._changed()

    def close(self) -> None:
        """Listens for nothing any more."""
        if self._look_again is not None:
            self._look_again.cancel()
        self._watch.close()

    # --- the plan

    async def bring(
        self,
        config: ClusterConfig,
        record: NodeRecord,
        blocks: Sequence[Block],
        records: Mapping[str, NodeRecord] | None,
        resync: bool,
        *,
        tunnelled: bool,
    ) -> NodePlan:
        """Brings the kernel to what these say, and returns the plan. `records` of all nodes, None while they are not
        known: then `tunnelled` says whether one is reached by VXLAN. `resync` reads back all that the kernel has.
        Raises a CniError."""
        looks = resync or self._stale or self._underlay is None
        try:
            return await self._bring(config, record, blocks, records, resync, looks, tunnelled)
        except BaseException:
            self._stale = True  # what was not done yet is not known
            raise

    async def _bring(
        self,
        config: ClusterConfig,
        record: NodeRecord,
        blocks: Sequence[Block],
        records: Mapping[str, NodeRecord] | None,
        resync: bool,
        looks: bool,
        tunnelled: bool,
    ) -> NodePlan:
        underlay = await self._look_at_underlay() if looks or self._underlay is None else self._underlay
        table, peers = self._table_for(config.backend.type, underlay), None
        if records is not None:
            table.update(records, (block.cidr for block in blocks))
            peers = table.peers
            tunnelled = peers.has_tunnels
        settings = self._settings
        plan = plan_node(config, record, blocks, underlay.mtu, settings.mtu, settings.non_masquerade_cidrs, tunnelled)
        if peers is not None:
            plan = with_peers(plan, peers, table.vteps)
        resized = resync or self.plan is None or self.plan.mtu != plan.mtu
        if resized:
            with suppress(CniError):  # one wire must not keep the node from its plan; it is tried again at the end
                await self._attachments.resize(plan.mtu, only_shrink=True)
        made = await self._ensure_devices(plan, underlay, resync)
        point("converge.bridge")
        done = list(made)
        if resync or self.plan is None:
            done += await self._thread.run(self._wires.ensure_guard)
        known = None if resync or self.plan is None else self.plan.firewall
        if known != plan.firewall:
            changed_rules = await self._firewall.ensure(plan.firewall, known)
            done += ["changed nft elements or rules"] if changed_rules else []
            if changed_rules or known is not None:
                await self._forget_vxlan(plan.firewall, known)
        point("converge.firewall")
        if plan.peers is not None:
            changed = await self._bring_peers(plan, table, anew=bool(looks or made))
            if changed:
                done.append(f"changed {changed} neighbours, FDB entries and routes")
        if done:
            log.info("kernel brought to its plan", extra={"fields": {"done": done}})
            if self.plan is not None:
                self._metrics.repaired("node", "; ".join(done), len(done))
        self.plan = plan
        return plan

    async def _forget_vxlan(self, plan: FirewallPlan, known: FirewallPlan | None) -> None:
        """What pods had sent to a node's port before it was one of VXLAN; only first packets meet the rules."""
        same_port = known is not None and known.vxlan_port == plan.vxlan_port
        nodes = (plan.vteps or frozenset()) - ((known.vteps if known and same_port else None) or frozenset())
        if not nodes:
            return
        try:
            await asyncio.to_thread(forget_udp_of, plan.local_blocks, plan.vxlan_port, nodes)
        except OSError as error:
            raise PlumbingFailed(f"the connections of pods to other nodes cannot be read: {error.strerror}") from error

    async def _bring_peers(self, plan: NodePlan, table: PeerTable, anew: bool) -> int:
        assert plan.peers is not None
        if anew:
            await self._thread.run(self._peers.resync)
        touched = None if anew or table is not self._applied else table.touched
        changed, self.refused = 0, ""
        try:
            changed = await self._thread.run(self._peers.apply, plan.peers, touched)
        except EntriesRefused as error:  # it keeps them in mind, and tries them again with the next change
            self.refused = str(error)
        table.settle()
        self._applied = table
        point("converge.peers")
        return changed

    async def _ensure_devices(self, plan: NodePlan, underlay: Underlay, resync: bool) -> list[str]:
        known = self.plan
        wanted = (plan.bridge, plan.vxlan, plan.backend)
        if not resync and known is not None and (known.bridge, known.vxlan, known.backend) == wanted:
            return []
        devices, names = self._devices, tuple(underlay.devices.values())
        direct = plan.backend is not BackendType.VXLAN
        done = await self._thread.run(devices.prepare_underlay, names, self._settings.families, direct)
        done += await self._thread.run(devices.ensure_bridge, plan.bridge)
        return done + await self._thread.run(devices.ensure_vxlan, plan.vxlan)

    def _table_for(self, backend: BackendType, underlay: Underlay) -> PeerTable:
        circumstances = (backend, underlay.on_link, self.addresses)
        if self._table is None or self._table_of != circumstances:
            family = self.addresses[0].version
            plan = partial(plan_peers, backend=backend, on_link=underlay.on_link, underlay_family=family)
            self._table, self._table_of = PeerTable(self._settings.node, plan, self.addresses), circumstances
        return self._table
