"""ADD, DEL, CHECK and GC: where addresses, journal and kernel change together.

    ADD   lock(key) ─▶ allocate ─▶ journal: intent ─▶ wire ─▶ policies ─▶ ports of the node ─▶ journal: commit ─▶ answer
    DEL   tombstone ─▶ lock(key) ─▶ kill the wire ─▶ ports of the node ─▶ journal: releasing ─▶ answer
          …   reap ─▶ cooling ─▶ free    (ipam_daemon/reaper.py)

The lock of an attachment spans all of it, rollback included. A DEL leaves its mark (a tombstone with the moment it was
issued) before it waits for the lock, so an ADD in flight that was issued earlier sees it and undoes itself, and one
that arrives later is refused: the DEL wins whichever way they cross. Moments are CLOCK_BOOTTIME as the executable read
it.

An ADD or DEL that was begun is finished or undone, whether or not its caller still waits: callers shield it. Failing
halfway, the order of steps decides what a killed daemon leaves. An intent without a commit is undone at the next start.
A wire that was killed but is still journaled as attached belongs to a DEL that got no answer; the executable queued it.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import msgspec

from ipam_daemon import bandwidth, cni, hostports
from ipam_daemon.addresses import Addresses
from ipam_daemon.cni import Call
from ipam_daemon.errors import (
    CheckFailed,
    CniError,
    DeletedMeanwhile,
    Exhausted,
    InterfaceExists,
    InvalidConfig,
    TryAgainLater,
)
from ipam_daemon.faults import point
from ipam_daemon.hostport_table import HostPorts
from ipam_daemon.identity import boottime
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment, AttachmentKey, AttachmentState
from ipam_daemon.netlink import NetlinkThread, index_of
from ipam_daemon.plan import plan_attachment
from ipam_daemon.podwatch import PodWatch
from ipam_daemon.reaper import Reaper
from ipam_daemon.strays import Strays
from ipam_daemon.turns import Turns
from ipam_daemon.wires import Wires, WireState

MoreAddresses = Callable[[Exhausted], Awaitable[None]]

log = logging.getLogger(__name__)


class Attachments:
    """The attachments of this node."""

    def __init__(
        self,
        *,
        journal: Journal,
        wires: Wires,
        thread: NetlinkThread,
        metrics: Metrics,
        cooldown: float,
        clock: Callable[[], float] = boottime,
        nft: Sequence[str] = ("nft",),
        podwatch: PodWatch | None = None,
    ) -> None:
        """`clock` gives the seconds since boot, which nobody sets; `cooldown` is in seconds. `nft` is HostPorts'.
        Without `podwatch` no pod waits for its policies."""
        self._journal = journal
        self._wires = wires
        self._thread = thread
        self._metrics = metrics
        self._host_ports = HostPorts(thread, journal, self._with_host_ports, nft)
        self._podwatch = podwatch or PodWatch(enabled=False)
        self._turns = Turns()
        self.addresses = Addresses(journal, cooldown, clock, self._blocks_changed)
        self.reaper = Reaper(
            journal=journal,
            wires=wires,
            thread=thread,
            metrics=metrics,
            addresses=self.addresses,
            cooldown=cooldown,
            clock=clock,
        )
        self.strays = Strays(
            journal=journal,
            wires=wires,
            thread=thread,
            metrics=metrics,
            addresses=self.addresses,
            turns=self._turns,
            reaper=self.reaper,
            stranded=self._count_fenced,
        )
        self.more: MoreAddresses | None = None
        """Waits until there may be addresses again, or raises a CniError that says why there will be none."""
        self.mtu = 0
        """The MTU of new pods in bytes; 0 while it is not known, and then no pod is added."""
        self.fenced = 0
        """How many attachments sit in a block that went to another node."""
        self.waiting_for = "the daemon has just started"
        """Why there is no block or no MTU yet."""

    @property
    def in_flight(self) -> frozenset[AttachmentKey]:
        """The attachments that something works on."""
        return self._turns.in_flight

    def _blocks_changed(self) -> None:
        self._podwatch.blocks_changed()
        self.reaper.wake()

    # --- the commands

    async def add(self, call: Call) -> bytes:
        """Makes the attachment. Returns the CNI result, raises a CniError when nothing was made."""
        self._refuse_if_unready(call)
        async with self._locked(call):
            self._refuse_if_deleted(call)
            existing = self._journal.get(call.key)
            if existing is not None and existing.state is AttachmentState.ADDING:
                await self._release(existing)  # of an ADD that could not even be undone: no other holds the lock
            elif existing is not None:
                raise InterfaceExists(
                    f"{call.key} is attached already, with {', '.join(map(str, existing.addresses))}; DEL comes first"
                )
            await self._host_ports.refuse_listened(call.wanted.port_mappings)
            attachment = await self._intend_patiently(call)
            self._podwatch.announce(attachment)
            point("add.intended")
            try:
                with self._metrics.phase("ADD", "wire"):
                    await self._thread.run(
                        self._wires.attach, attachment, self.addresses.gateways, last=bool(call.config.last)
                    )
            except Exception:
                await self._undo(attachment)
                raise
            point("add.wired")
            if not self._is_deleted(call):
                await self._await_policies(attachment)
            if self._is_deleted(call):
                await self._release(attachment)
                self._refuse_if_deleted(call)
            point("add.settled")
            await self._open_host_ports(attachment)
            attached = await self._commit(attachment)
            point("add.committed")
        log.info("added", extra={"fields": _fields(attached)})
        return cni.result(attached, self.addresses.gateways, call.config)

    async def delete(self, call: Call) -> None:
        """Removes the attachment; success when there is none. When it returns, nothing passes the wire any more."""
        self._turns.bury(call.key, call.issued_ns)
        under_way = self._journal.get(call.key)
        if under_way is not None and self._turns.is_buried(call.key, under_way.created_ns):
            self._podwatch.interrupt(call.key)
        point("del.marked")
        async with self._locked(call):
            attachment = self._journal.get(call.key)
            if attachment is None or attachment.created_ns > call.issued_ns:
                return  # nothing to delete, or this DEL was queued before the attachment that is there now was added
            await self._release(attachment)
            point("del.released")
        log.info("deleted", extra={"fields": _fields(attachment)})

    async def check(self, call: Call) -> None:
        """Compares journal, kernel and the previous result. Raises CheckFailed with everything that differs."""
        async with self._locked(call):
            attachment = self._journal.get(call.key)
            if attachment is None:
                raise CheckFailed(f"{call.key} is not attached")
            if self.addresses.is_stranded(attachment):
                raise TryAgainLater(f"{call.key}: its block is not known yet: {self.waiting_for}")
            differences = await self._thread.run(
                self._wires.differences, attachment, call.netns, self.addresses.gateways
            )
            if attachment.port_mappings:
                differences += await self._host_ports.missing(attachment)
        differences += _previous_differences(call, attachment)
        if differences:
            raise CheckFailed(f"{call.key}: {'; '.join(differences)}")

    async def collect_garbage(self, call: Call) -> None:
        """Removes the attachments of this network that the runtime does not list.

        An absent list is not an empty one, and says nothing: the Go library leaves it out when it was given none.
        Attachments of other networks are not this one's. What fails does not stop the rest; the first error is raised.
        """
        valid = call.config.valid_attachments
        if valid is None:
            valid = call.config.attachments
        if valid is None:
            log.warning("GC without a list of attachments to keep: nothing is removed")
            return
        keep = {AttachmentKey(call.config.name, each.container_id, each.ifname) for each in valid}
        failures: list[CniError | sqlite3.Error] = []
        for attachment in self._journal.attachments():
            key = attachment.key
            if key.network == call.config.name and key not in keep and attachment.created_ns < call.issued_ns:
                try:
                    await self.forget(attachment, call.issued_ns)
                except (CniError, sqlite3.Error) as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    async def forget(self, attachment: Attachment, moment_ns: int) -> bool:
        """Removes an attachment that nobody asks for any more, unless it has changed since it was looked at. True when
        it did."""
        async with self._turns.of(attachment.key):
            current = self._journal.get(attachment.key)
            if current == attachment and current.created_ns < moment_ns:
                await self._release(attachment)
                log.warning("removed an attachment that nobody has", extra={"fields": _fields(attachment)})
                return True
        return False

    async def mend(self, attachment: Attachment) -> WireState | None:
        """Puts the wire's port right, and says what was found; None when the attachment has changed since it was read.

        Under the lock: a DEL that comes in between would have its dead wire revived.
        """
        async with self._turns.of(attachment.key):
            if self._journal.get(attachment.key) != attachment or self.addresses.is_stranded(attachment):
                return None
            return await self._thread.run(self._wires.mend, attachment)

    async def resize(self, mtu: int, *, only_shrink: bool = False) -> None:
        """Gives every wire this MTU, in bytes. Raises the first CniError when all were tried.

        Packets that are too large for what they come to are dropped: so wires shrink before the bridge and the routes
        do, and grow after them (`only_shrink` first). An ADD in flight is waited for.
        """
        if self.mtu > mtu:
            self.mtu = mtu
        failures: list[CniError] = []
        for each in self._journal.attachments():
            wanted = min(mtu, each.mtu) if only_shrink else mtu
            if each.resizing or each.mtu != wanted:
                try:
                    await self._resize_one(each.key, wanted)
                except CniError as error:
                    failures.append(error)
                except sqlite3.Error as error:
                    failures.append(TryAgainLater(f"the journal cannot be written: {error}"))
        if failures:
            raise failures[0]

    async def _resize_one(self, key: AttachmentKey, mtu: int) -> None:
        async with self._turns.of(key):
            row = self._journal.get(key)
            if row is None or row.state is not AttachmentState.ATTACHED or not row.netns:
                return
            if row.resizing:  # it was not finished; what either end has of it is ours, and not somebody's who came by
                await self._thread.run(self._wires.resize, msgspec.structs.replace(row, mtu=row.resizing), row.mtu)
                row = msgspec.structs.replace(row, resizing=0)
                self._journal.replace(row)
            if row.mtu != mtu:
                self._journal.replace(msgspec.structs.replace(row, resizing=mtu))
                await self._thread.run(self._wires.resize, row, mtu)
                point("mtu.resized")
                self._journal.replace(msgspec.structs.replace(row, mtu=mtu))

    # --- blocks that went to another node

    def stranded(self) -> tuple[Attachment, ...]:
        """Attachments with an address of a block that is not this node's (any more)."""
        return tuple(
            each
            for each in self._journal.attachments()
            if each.state is AttachmentState.ATTACHED and self.addresses.is_stranded(each)
        )

    def _count_fenced(self) -> None:
        self.fenced = len(self.stranded())

    async def fence(self) -> int:
        """Cuts the wires of stranded attachments: their addresses may be in use elsewhere. Returns how many there are.

        Only once etcd has said which blocks are this node's. The attachments stay until their DEL, and while there are
        any no pod is added: the node says so in STATUS, and whoever reads it moves its pods away.
        """
        stranded = self.stranded()
        for attachment in stranded:
            await self._thread.run(self._wires.cut, attachment.host_ifname)
        self.fenced = len(stranded)
        if any(each.port_mappings for each in stranded):
            await self._host_ports.ensure()
        return self.fenced

    # --- the start

    async def resume(self) -> int:
        """Takes up what a killed daemon left: kills wires that it released, undoes ADDs that it did not finish.

        For the start, before calls are taken. Returns how many ADDs were undone.
        """
        for wire in self._journal.releasing():
            await self._thread.run(self._wires.kill, wire.host_ifname)
        undone = 0
        for attachment in self._journal.attachments():
            if attachment.state is AttachmentState.ADDING:
                await self._thread.run(self._wires.kill, attachment.host_ifname)
                point("start.undoing")
                await self._release(attachment)
                undone += 1
        try:
            await self.mend_host_ports()
        except CniError as error:
            log.warning("ports of the node are not as they should be yet: %s", error)
        return undone

    async def _await_policies(self, attachment: Attachment) -> None:
        """Returns when the pod's policies are in the kernel, or its DEL has come."""
        try:
            with self._metrics.phase("ADD", "policies"):
                await self._podwatch.settled(attachment)
        except Exception:
            await self._release(attachment)
            raise

    # --- ports of the node

    async def mend_host_ports(self, undecided: Iterable[Attachment] = ()) -> int:
        """Brings the ports of the node that lead to pods to what the journal says, but for wires that it may take in.
        Returns how much had to be done."""
        return await self._host_ports.ensure({each.ip for wire in undecided for each in wire.addresses})

    def _with_host_ports(self) -> list[Attachment]:
        """Those whose ports lead to them; not to a pod whose address is another node's by now."""
        return [
            each
            for each in self._journal.attachments()
            if each.port_mappings and not (self.fenced and self.addresses.is_stranded(each))
        ]

    async def _open_host_ports(self, attachment: Attachment) -> None:
        if not attachment.port_mappings:
            return
        try:
            with self._metrics.phase("ADD", "hostports"):
                await self._host_ports.open(attachment)
        except Exception:
            await self._release(attachment)
            raise
        point("add.host-ports-open")

    # --- steps

    async def _intend_patiently(self, call: Call) -> Attachment:
        """Waits for another block when there is no address, as often as others were quicker to take what came."""
        while True:
            try:
                return self._intend(call)
            except Exhausted as shortage:
                if self.more is None:
                    raise
                await self.more(shortage)

    def _intend(self, call: Call) -> Attachment:
        bandwidth.check_bursts(call.wanted.bandwidth, self.mtu)
        self._host_ports.refuse_taken(call.wanted.port_mappings)
        with self._metrics.phase("ADD", "allocate"):
            addresses = self.addresses.allocate(call.wanted.addresses)
        point("add.allocated")
        attachment = plan_attachment(call, addresses, self.mtu, time.time())
        try:
            hostports.check_families(attachment.port_mappings, addresses)
            with self._metrics.phase("ADD", "journal"):
                self._journal.intend(attachment)
        except CniError:
            self.addresses.give_back(addresses)
            raise
        except sqlite3.Error as error:
            self.addresses.give_back(addresses)
            raise TryAgainLater(f"the journal cannot be written: {error}") from error
        return attachment

    async def _commit(self, attachment: Attachment) -> Attachment:
        """A wire that cannot be journaled as made is none: the runtime is told to try again."""
        try:
            with self._metrics.phase("ADD", "journal"):
                return self._journal.commit(attachment)
        except sqlite3.Error:
            await self._release(attachment)
            raise

    async def _undo(self, attachment: Attachment) -> None:
        """Without a wire nobody ever had the address; with one that would not go, it is released like any other."""
        if await self._thread.run(index_of, attachment.host_ifname):
            await self._release(attachment)
            return
        point("undo.begun")
        self._podwatch.withdraw(attachment.key)
        if attachment.port_mappings:
            await self._host_ports.close(attachment)  # a round may have opened them since the intent
        self._journal.forget(attachment.key)
        point("undo.forgotten")
        self.addresses.give_back(attachment.addresses)

    async def _release(self, attachment: Attachment) -> None:
        with self._metrics.phase("DEL", "kill"):
            await self._thread.run(self._wires.kill, attachment.host_ifname)
        point("del.killed")
        self._podwatch.withdraw(attachment.key)
        if attachment.port_mappings:
            with self._metrics.phase("DEL", "hostports"):
                await self._host_ports.close(attachment)
            point("del.host-ports-closed")  # nothing may wait from here on: ensure() would open them again
        with self._metrics.phase("DEL", "journal"):
            self._journal.release(attachment)
        self.addresses.release(attachment.addresses)
        if self.fenced:
            self._count_fenced()
        self.reaper.wake()

    def _refuse_if_unready(self, call: Call) -> None:
        if not self.addresses.allocator.blocks or not self.mtu:
            raise TryAgainLater(f"{call.key}: this node cannot add pods yet: {self.waiting_for}")
        if self.fenced:
            raise TryAgainLater(f"{call.key}: {self.fenced} pods of this node sit in a block that went to another node")

    def _is_deleted(self, call: Call) -> bool:
        return self._turns.is_buried(call.key, call.issued_ns)

    def _refuse_if_deleted(self, call: Call) -> None:
        if self._is_deleted(call):
            raise DeletedMeanwhile(f"{call.key} was deleted after this ADD was issued")

    @asynccontextmanager
    async def _locked(self, call: Call) -> AsyncIterator[None]:
        began = time.perf_counter()
        async with self._turns.of(call.key):
            self._metrics.seconds.labels(call.command, "lock").observe(time.perf_counter() - began)
            yield


def _previous_differences(call: Call, attachment: Attachment) -> list[str]:
    """What the previous result says otherwise. Interfaces and addresses that others chained to it are theirs."""
    previous = call.config.previous
    if previous is None:
        raise InvalidConfig("prevResult is missing, expected the result of the ADD that is to be checked")
    addresses = {each.address for each in previous.ips}
    names = {each.name for each in previous.interfaces}
    found = [f"prevResult has no address {each}" for each in attachment.addresses if str(each) not in addresses]
    if attachment.key.ifname not in names:
        found.append(f"prevResult has no interface {attachment.key.ifname}")
    return found + [
        f"prevResult gives {each.name} the MAC {each.mac}, which a plugin after Podwire has set: what the pod sends is "
        f"dropped, since it is bound to the MAC of its ADD, {attachment.mac}; ask for another one by the capability mac"
        for each in previous.interfaces
        if each.name == attachment.key.ifname and each.sandbox and each.mac.lower() not in ("", attachment.mac)
    ]


def _fields(attachment: Attachment) -> dict[str, str]:
    return {
        "attachment": str(attachment.key),
        "pod": f"{attachment.pod.namespace}/{attachment.pod.name}" if attachment.pod.name else "",
        "addresses": ",".join(map(str, attachment.addresses)),
        "link": attachment.host_ifname,
    }
