"""Attachments against the kernel, periodically: what somebody took apart is mended, what nobody has is freed.

A wire dies with its pod's namespace, and a pod without a namespace runs no more. So a journaled wire that the kernel no
longer has belongs to nobody, and its address is freed after it was missed in two rounds: the runtime's own DEL is
usually on its way, and comes first. No API is asked, since what an API says of a pod lags behind what runs.

A wire of ours that the journal does not know was somebody's when the journal was lost: after it was found in two rounds
it is taken in, or deleted when its attachment or its address is another's (Attachments.settle). One that only has
another name gets its own back at once, before it would count as missed.

Ports of the node that lead to pods are brought to what the journal says, and queues whose wire is gone are deleted.

An attachment that is still being added while nobody holds its lock is one whose ADD failed and could not be undone (a
full disk, say): it is removed. The journal's own file is looked after first.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterable

from ipam_daemon.attachments import Attachments
from ipam_daemon.errors import CniError
from ipam_daemon.identity import boottime_ns
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment, AttachmentKey, AttachmentState
from ipam_daemon.plan import is_same_wire
from ipam_daemon.wires import WireState

log = logging.getLogger(__name__)


class Reconciler:
    """The periodic round over this node's attachments."""

    def __init__(self, journal: Journal, attachments: Attachments, metrics: Metrics) -> None:
        self._journal = journal
        self._attachments = attachments
        self._metrics = metrics
        self._missed: frozenset[AttachmentKey] = frozenset()
        self._strays: frozenset[str] = frozenset()

    async def run_forever(self, interval: float) -> None:
        """A round every `interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.round()

    async def round(self) -> None:
        """Looks at every attachment once. One wire at a time, so that an ADD never waits for the whole round.

        What fails is counted and comes again in the next round; the other wires do not wait for it. Raises
        JournalDamaged, which the next daemon's start mends.
        """
        self._look_after_journal()
        await self._look_at_ports_and_queues(await self._sweep())
        moment = boottime_ns()
        missed = set()
        for attachment in self._journal.attachments():
            if attachment.created_ns >= moment:
                continue
            try:
                if attachment.state is AttachmentState.ADDING:
                    await self._undo(attachment, moment)
                elif await self._look(attachment, moment):
                    missed.add(attachment.key)
            except (CniError, sqlite3.Error) as error:
                self._failed(attachment.host_ifname, error)
        self._missed = frozenset(missed)

    def _look_after_journal(self) -> None:
        try:
            if self._journal.look_after():
                self._metrics.repaired("journal", "wrote the journal's file again, which was gone")
                log.error("the journal's file was gone; it is written again")
        except sqlite3.OperationalError as error:
            self._failed("the journal", error)

    async def _undo(self, attachment: Attachment, moment: int) -> None:
        if await self._attachments.forget(attachment, moment):
            self._metrics.repaired("unfinished-add", f"undid the ADD of {attachment.key}, which was not finished")

    async def _sweep(self) -> tuple[Attachment, ...]:
        """Wires without a row. Returns what was found."""
        try:
            orphans = await self._attachments.strays.orphans()
        except CniError as error:
            self._failed("looking for wires", error)
            return ()
        rows = self._journal.attachments()
        for wire in orphans:
            if wire.host_ifname not in self._strays and not any(is_same_wire(wire, row) for row in rows):
                continue
            try:
                done = await self._attachments.strays.settle(wire)
            except (CniError, sqlite3.Error) as error:
                self._failed(wire.host_ifname, error)
                continue
            if done:
                self._metrics.repaired("orphan-wire", done)
                log.warning("found a wire that the journal does not know: %s", done)
        self._strays = frozenset(wire.host_ifname for wire in orphans)
        return orphans

    async def _look_at_ports_and_queues(self, undecided: Iterable[Attachment]) -> None:
        """Ports of the node that lead to pods, and ifb devices of wires that are gone."""
        try:
            changed = await self._attachments.mend_host_ports(undecided)
            strays = await self._attachments.strays.sweep()
        except (CniError, sqlite3.Error) as error:
            self._failed("ports of the node and queues", error)
            return
        if changed:
            self._metrics.repaired("host-ports", f"changed {changed} rules and elements for ports of the node", changed)
            log.warning("ports of the node did not lead where they should; mended")
        if strays:
            self._metrics.repaired("orphan-queue", f"deleted the queues of {', '.join(strays)}", len(strays))

    def _failed(self, link: str, error: Exception) -> None:
        self._metrics.repairs.labels("failed").inc()
        log.warning("reconciling failed: %s", error, extra={"fields": {"link": link}})

    async def _look(self, attachment: Attachment, moment: int) -> bool:
        """Mends or frees one attachment. True when its wire was missed for the first time."""
        state = await self._attachments.mend(attachment)
        if state is WireState.MENDED:
            self._metrics.repaired("port", f"mended the port {attachment.host_ifname} ({attachment.key})")
            log.warning("put a port back into the bridge", extra={"fields": {"link": attachment.host_ifname}})
        elif (
            state is WireState.GONE
            and attachment.key in self._missed
            and await self._attachments.forget(attachment, moment)
        ):
            self._metrics.repaired("vanished-wire", f"freed the addresses of {attachment.key}, whose wire is gone")
        return state is WireState.GONE and attachment.key not in self._missed
