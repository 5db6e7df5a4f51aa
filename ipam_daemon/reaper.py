"""Wires on the way out: killed by a DEL, deleted here, off its path.

    DEL ─▶ wake ─▶ 50 ms for others to join ─▶ deleted as a group ─▶ seen gone ─▶ their addresses cool

Deleting a veth takes the kernel 20–35 ms, twenty of them in one group hardly longer. An address whose wire is not seen
gone is nobody's; what cannot be deleted is tried again every second.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable

from ipam_daemon.addresses import Addresses
from ipam_daemon.errors import CniError
from ipam_daemon.faults import point
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.wires import Wires

_DELAY = 0.05  # seconds for more wires to join the group: deleting many costs as much as deleting one
_RETRY = 1.0

log = logging.getLogger(__name__)


class Reaper:
    """Deletes what the journal says is to be deleted."""

    def __init__(
        self,
        *,
        journal: Journal,
        wires: Wires,
        thread: NetlinkThread,
        metrics: Metrics,
        addresses: Addresses,
        cooldown: float,
        clock: Callable[[], float],
    ) -> None:
        """`cooldown` in seconds; `clock` gives the seconds since boot."""
        self._journal = journal
        self._wires = wires
        self._thread = thread
        self._metrics = metrics
        self._addresses = addresses
        self._cooldown = cooldown
        self._clock = clock
        self._due = asyncio.Event()
        self._reaping = asyncio.Lock()

    def wake(self) -> None:
        """There may be a wire to delete."""
        self._due.set()

    async def run_forever(self) -> None:
        """Deletes killed wires by group and lets their addresses cool, until cancelled."""
        while True:
            await self._due.wait()
            await asyncio.sleep(_DELAY)
            self._due.clear()
            try:
                left = await self.reap()
            except (CniError, sqlite3.Error) as error:
                log.warning("deleting wires failed, trying again: %s", error)
                left = True
            if left:
                await asyncio.sleep(_RETRY)
                self._due.set()

    async def reap(self) -> bool:
        """Deletes every wire that is to be deleted. True when some are still there."""
        async with self._reaping:  # two at once would let the same addresses cool twice
            return await self._reap()

    async def _reap(self) -> bool:
        releasing = self._journal.releasing()
        if not releasing:
            return False
        with self._metrics.phase("DEL", "reap"):
            gone = await self._thread.run(self._wires.reap, [each.host_ifname for each in releasing])
        point("reap.deleted")
        for each in releasing:
            if each.host_ifname not in gone:  # somebody took it out of the group that is deleted
                await self._thread.run(self._wires.kill, each.host_ifname)
        done = [each for each in releasing if each.host_ifname in gone]
        now = self._clock()
        until = now + self._cooldown
        self._journal.cool(done, now, until)
        for each in done:
            self._addresses.cool(each.addresses, until)
        point("reap.cooled")
        return len(done) < len(releasing)
