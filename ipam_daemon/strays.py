"""Wires that the kernel has and the journal has not: taken in, or killed.

A wire's alias says whose it is, so that a journal that was lost, with its file or in part, is made again from the
kernel. At the start everything that is found is taken in, before any call. While the daemon runs a wire without a row
may also be one whose DEL was done, or whose attachment or address is another's by now: then it is killed, and its
deletion frees nothing that it did not have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ipam_daemon.addresses import Addresses
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment
from ipam_daemon.netlink import NetlinkThread, index_of
from ipam_daemon.plan import is_same_wire
from ipam_daemon.reaper import Reaper
from ipam_daemon.turns import Turns
from ipam_daemon.wires import Wires

log = logging.getLogger(__name__)


class Strays:
    """What becomes of a wire without a row."""

    def __init__(
        self,
        *,
        journal: Journal,
        wires: Wires,
        thread: NetlinkThread,
        metrics: Metrics,
        addresses: Addresses,
        turns: Turns,
        reaper: Reaper,
        stranded: Callable[[], None],
    ) -> None:
        """`stranded` is called when a wire was taken in whose block is another node's."""
        self._journal = journal
        self._wires = wires
        self._thread = thread
        self._metrics = metrics
        self._addresses = addresses
        self._turns = turns
        self._reaper = reaper
        self._stranded = stranded

    async def adopt_all(self) -> None:
        """For the start: what the journal has lost, with its file or a part of it, comes from the wires' aliases.

        Killed wires go first: nobody may remember that their addresses are not free.
        """
        await self._thread.run(self._wires.reap, ())
        lost = await self.orphans()
        for attachment in lost:
            if self._journal.get(attachment.key) is None:
                self._journal.adopt(await self._thread.run(self._wires.recall, attachment))
            else:
                await self._thread.run(self._wires.delete, attachment.host_ifname)
        if lost or self._journal.set_aside:
            self._metrics.repaired("journal", f"took {len(lost)} wires from the kernel into the journal")
            fields = {"set_aside": str(self._journal.set_aside or ""), "attachments": [str(each.key) for each in lost]}
            log.error("the journal lacked wires that the kernel has, and has them again", extra={"fields": fields})

    async def orphans(self) -> tuple[Attachment, ...]:
        """Wires that the kernel has, and the journal has not, as their aliases describe them."""
        found = await self._thread.run(self._wires.found, time.time())
        known = self._names()
        return tuple(each for each in found if each.host_ifname not in known)

    async def settle(self, wire: Attachment) -> str:
        """Decides about a wire that was found by its alias and has no row. Returns what was done; empty for nothing."""
        async with self._turns.of(wire.key):
            row = self._journal.get(wire.key)
            known = {each.host_ifname for each in self._journal.releasing()} | {row.host_ifname if row else ""}
            if wire.host_ifname in known or not await self._thread.run(self._wires.has, wire):
                return ""
            if row is not None and is_same_wire(wire, row) and not await self._thread.run(index_of, row.host_ifname):
                await self._thread.run(self._wires.rename, wire.host_ifname, row.host_ifname)
                return f"gave {wire.host_ifname} its name {row.host_ifname} back"
            lost = row is None and not self._turns.is_buried(wire.key, wire.created_ns)
            if lost and self._adopt(await self._thread.run(self._wires.recall, wire)):
                if self._addresses.is_stranded(wire):
                    await self._thread.run(self._wires.cut, wire.host_ifname)
                    self._stranded()
                return f"took {wire.host_ifname} ({wire.key}, {', '.join(map(str, wire.addresses))}) into the journal"
            await self._condemn(wire.host_ifname)
            return f"deleted {wire.host_ifname} ({wire.key}), which is nobody's any more"

    async def sweep(self) -> tuple[str, ...]:
        """Deletes what is left of wires that are gone. Returns their names."""
        strays = await self._thread.run(self._wires.strays, self._names())
        for name in strays:
            await self._condemn(name)
        return strays

    async def _condemn(self, host_ifname: str) -> None:
        await self._thread.run(self._wires.kill, host_ifname)
        self._journal.condemn(host_ifname)
        self._reaper.wake()

    def _names(self) -> set[str]:
        """The wires that the journal knows."""
        names = {each.host_ifname for each in self._journal.attachments()}
        return names | {each.host_ifname for each in self._journal.releasing()}

    def _adopt(self, wire: Attachment) -> bool:
        """Journals the wire, and so takes its addresses. False when one of them is another's, and nothing changes."""
        held = {each.ip for row in self._journal.attachments() for each in row.addresses}
        held |= {each.ip for row in self._journal.releasing() for each in row.addresses}
        if any(each.ip in held for each in wire.addresses):
            return False
        self._journal.adopt(wire)
        self._addresses.recount()
        return True
