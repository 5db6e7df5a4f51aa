"""Looks at this node from all sides, and repairs what differs through the daemon's own ways. For `podwire ipam check`.

    look ─▶ nothing differs ─▶ answer
      └───▶ half a second later look again ─▶ what both found is reported  (one look may catch things on their way)
                └─ with `fix` ─▶ queue ─▶ etcd ─▶ kernel ─▶ wires, twice ─▶ count ─▶ look until it is better, or 5 s

Nothing is repaired here that the daemon does not repair by itself, sooner or later: this only does it now, and says
what. So there is one place that knows when an address may be freed, and it takes two looks for that whoever asks.
A look costs some dumps of netlink, one nft process and three reads of etcd, 11 ms together, and 2.5 ms a pod for what
is inside, one pod at a time, so that an ADD waits for one at the most.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import msgspec

from ipam_daemon.agent import Agent
from ipam_daemon.attachments import Attachments
from ipam_daemon.audit import compare
from ipam_daemon.delqueue import DelQueue
from ipam_daemon.devices import wanted_sysctls
from ipam_daemon.differences import KINDS, Difference, lasting
from ipam_daemon.errors import CniError
from ipam_daemon.facts import Facts, Journaled, Kernel, Registered, Runtime, Sandbox
from ipam_daemon.firewall import Firewall
from ipam_daemon.identity import boottime_ns
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment, AttachmentState
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.nodes import read_registered
from ipam_daemon.readback import read_kernel
from ipam_daemon.reconcile import Reconciler
from ipam_daemon.sandboxes import list_sandboxes
from ipam_daemon.wires import Wires
from podwire.errors import PodwireError
from podwire.etcd import EtcdSession
from podwire.netns import NetnsError, open_netns

_BETWEEN = 0.5  # seconds between two looks: several times what it takes to delete the wires of twenty DELs
_BETTER_S, _BETTER_POLL = 5.0, 0.25
_MISCOUNTED = ("address-unheld", "address-leaked")

log = logging.getLogger(__name__)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What differed, what was done about it, and what differs still."""

    differences: tuple[Difference, ...]
    done: tuple[str, ...] = ()
    remaining: tuple[Difference, ...]


class Inspection:
    """One inspection at a time; it holds nothing between them."""

    def __init__(
        self,
        *,
        agent: Agent,
        attachments: Attachments,
        journal: Journal,
        thread: NetlinkThread,
        wires: Wires,
        session: EtcdSession,
        reconciler: Reconciler,
        queue: DelQueue,
        metrics: Metrics,
        firewall: Firewall | None = None,
    ) -> None:
        self._agent = agent
        self._attachments = attachments
        self._journal = journal
        self._thread = thread
        self._wires = wires
        self._session = session
        self._reconciler = reconciler
        self._queue = queue
        self._metrics = metrics
        self._firewall = firewall or Firewall()
        self._lock = asyncio.Lock()
        self._runtime_endpoint = ""  # of the inspection under way

    async def run(self, fix: bool, runtime_endpoint: str = "") -> Outcome:
        """Looks, and repairs if asked to. The runtime's sandboxes are compared, too, if it is said where it is.

        Raises a CniError when the kernel cannot be read.
        """
        async with self._lock:
            self._runtime_endpoint = runtime_endpoint
            found = await self.look()
            if found:
                await asyncio.sleep(_BETWEEN)
                found = lasting(found, await self.look())
            if not fix or not found:
                return Outcome(differences=found, remaining=found)
            done = await self._repair(found)
            remaining = await self._until_better(found)
            left = {each.identity for each in remaining}
            right = [f"{each.kind} {each.subject}: right again" for each in found if each.identity not in left]
            return Outcome(differences=found, done=(*done, *right), remaining=remaining)

    async def look(self) -> tuple[Difference, ...]:
        """What differs at this moment, things on their way included."""
        return compare(await self.facts())

    async def _until_better(self, found: Iterable[Difference]) -> tuple[Difference, ...]:
        """The last look. A wire that is being deleted, a name that is being taken again need a moment."""
        fixable = {each.identity for each in found if KINDS[each.kind].patient}
        deadline = time.monotonic() + _BETTER_S
        left = await self.look()
        while any(each.identity in fixable for each in left) and time.monotonic() < deadline:
            await asyncio.sleep(_BETTER_POLL)
            left = await self.look()
        if not left:
            return ()
        await asyncio.sleep(_BETWEEN)
        return lasting(left, await self.look())

    # --- repairing

    async def _repair(self, found: Iterable[Difference]) -> tuple[str, ...]:
        """Does what the daemon does periodically, now. What fails does not stop the rest."""
        before = tuple(self._metrics.recent)
        done: list[str] = []
        self._attachments.addresses.recount()
        if any(each.kind in _MISCOUNTED for each in found):
            done.append("counted the addresses again from the journal")
        done += await self._forget_sandboxless(found)
        replayed = await self._attempt("replaying the queue", self._queue.replay)
        if replayed:
            done.append(f"replayed {replayed} queued DELs")
        await self._attempt("joining the cluster again", self._agent.rejoin)
        await self._attempt("bringing the kernel to the plan", self._agent.resync)
        for _ in range(2):  # what vanished is freed when it was missed in two rounds
            await self._attempt("looking at the wires", self._reconciler.round)
        for _ in range(2):  # the first kills what is not in the group of dead wires any more
            await self._attempt("deleting wires", self._attachments.reaper.reap)
        done += [each.detail for each in self._metrics.recent if each not in before]
        return tuple(done)

    async def _forget_sandboxless(self, found: Iterable[Difference]) -> list[str]:
        """Does for an attachment whose sandbox both looks have missed what the runtime's GC would do."""
        gone = {each.subject for each in found if each.kind == "sandbox-gone"}
        done = []
        for row in self._journal.attachments():
            if row.host_ifname in gone and await self._attempt(
                "removing an attachment", partial(self._attachments.forget, row, boottime_ns())
            ):
                self._metrics.repairs.labels("sandbox-gone").inc()
                done.append(f"removed {row.key}, whose sandbox is gone")
        return done

    async def _attempt(self, what: str, act: Callable[[], Awaitable[object]]) -> object:
        try:
            return await act()
        except (PodwireError, sqlite3.Error) as error:
            self._metrics.repairs.labels("failed").inc()
            log.warning("%s failed: %s", what, error)
            return None

    # --- looking

    async def facts(self) -> Facts:
        """What every source says now. The kernel is read before the journal, in which a wire is before it is made."""
        plan = self._agent.plan
        sysctls = {} if plan is None else wanted_sysctls(plan.bridge)
        etcd, etcd_error = await self._registered()
        pools = () if plan is None else plan.bridge.pools
        kernel = await read_kernel(self._thread, self._firewall, sysctls, pools)
        limits = await self._thread.run(self._wires.limits, self._journal.attachments())
        kernel = msgspec.structs.replace(kernel, limits=limits)
        facts = Facts(
            now=time.time(),
            record=self._agent.record,
            plan=plan,
            waiting_for=self._attachments.waiting_for,
            journal=self._journaled(),
            kernel=kernel,
            etcd=etcd,
            etcd_error=etcd_error,
            held=self._attachments.addresses.allocator.held,
            sysctls=sysctls,
            in_flight=self._attachments.in_flight,
            waiting_dels=self._queue.waiting,
            unreadable_dels=self._queue.unreadable,
        )
        return msgspec.structs.replace(facts, runtime=await self._runtime(facts, kernel))

    def _journaled(self) -> Journaled:
        return Journaled(
            attachments=self._journal.attachments(),
            releasing={each.host_ifname: each.addresses for each in self._journal.releasing()},
            blocks=self._journal.blocks(),
        )

    async def _registered(self) -> tuple[Registered | None, str]:
        try:
            return await read_registered(self._session, self._agent.record.name), ""
        except PodwireError as error:
            return None, str(error)

    async def _runtime(self, facts: Facts, kernel: Kernel) -> Runtime:
        """One pod after the other, so that an ADD never waits for all of them."""
        gone: dict[str, str] = {}
        changed: dict[str, tuple[str, ...]] = {}
        for row in facts.journal.attachments:
            if row.state is not AttachmentState.ATTACHED or not row.netns or row.key in facts.in_flight:
                continue
            why = await self._thread.run(_why_gone, row.netns)
            if why:
                gone[row.host_ifname] = why
            elif row.host_ifname in kernel.links and not facts.is_stranded(row):
                found = await self._inside(row)
                if found:
                    changed[row.host_ifname] = tuple(found)
        sandboxes, error = await self._sandboxes(facts)
        return Runtime(gone=gone, changed=changed, sandboxes=sandboxes, error=error)

    async def _sandboxes(self, facts: Facts) -> tuple[tuple[Sandbox, ...] | None, str]:
        """What the runtime has, if it is to be asked, and why it did not answer."""
        if not self._runtime_endpoint:
            return None, ""
        try:
            rows = {row.key.container_id for row in facts.journal.attachments}
            return await list_sandboxes(self._runtime_endpoint, rows), ""
        except PodwireError as error:
            return None, str(error)

    async def _inside(self, row: Attachment) -> list[str]:
        try:
            return await self._thread.run(self._wires.inside, row, row.netns, self._attachments.addresses.gateways)
        except CniError as error:  # it is being deleted
            return [str(error)]


def _why_gone(path: str) -> str:
    """Why the path leads to no namespace of a pod; empty when it does."""
    try:
        os.close(open_netns(path))
    except NetnsError as error:
        return str(error)
    return ""
