"""Which addresses somebody has or had lately, and which blocks are the node's, kept across a reboot.

The journal lives in memory and dies with the machine, as the pods do. Their peers do not: elsewhere a connection to an
old pod may still be retried, a name still be cached. So the addresses that were in use, releasing or cooling when the
machine went down cool once more when it comes back, all for the whole cooldown, and rotation goes on where it was.

The blocks are there for a node that comes back from a power cut before etcd does: it adds pods in them, as a daemon
does that is restarted while etcd is away. A block is permanent until it is released; so it is out of this file before
it is out of etcd, and one that somebody gave away meanwhile (the node was forgotten) is found, and its pods cut off,
when etcd answers (Agent).

The file holds addresses, not times: a machine without a battery wakes up in 1970. It is written and synced in a thread,
at most once a second, only when something changed, and never while an ADD or DEL waits for it; what happened in the
last second before a power cut is not in it, and rotation reaches those addresses late anyway. A disk that cannot be
written is warned of and tried again; pods start all the same. 250 addresses are 3 kB and take 0.1 ms to list.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from ipam_daemon.attachments import Attachments
from ipam_daemon.faults import point
from ipam_daemon.identity import boottime, sync_directory
from ipam_daemon.journal import Journal
from ipam_daemon.model import Address, Block, Record, decode, encode

_PAUSE = 1.0  # seconds between two writes
_RETRY = 10.0

log = logging.getLogger(__name__)


class Held(Record, frozen=True, kw_only=True):
    """`addresses` are not free; `last` were handed out last, one per family; `blocks` are the node's."""

    addresses: tuple[Address, ...] = ()
    last: tuple[Address, ...] = ()
    blocks: tuple[Block, ...] = ()


class HeldFile:
    """The file, which is written as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Held:
        """What was written last; nothing when there is no file, or one that cannot be read."""
        try:
            return decode(self._path.read_bytes(), Held)
        except FileNotFoundError:
            return Held()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.error("%s: %s; addresses of the time before the boot may be reused early", self._path, error)
            return Held()

    def write(self, held: Held) -> None:
        """Replaces the file, durably. Raises OSError, and then the former one is there."""
        temporary = self._path.with_suffix(".new")
        with open(temporary, "wb") as file:
            file.write(encode(held))
            file.flush()
            os.fsync(file.fileno())
        point("held.written")
        temporary.rename(self._path)
        sync_directory(self._path.parent)


class HeldKeeper:
    """Writes the file when it is out of date, and reads it after a boot."""

    def __init__(
        self,
        file: HeldFile,
        journal: Journal,
        attachments: Attachments,
        cooldown: float,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._file = file
        self._journal = journal
        self._attachments = attachments
        self._cooldown = cooldown
        self._clock = clock
        self._written: Held | None = None
        self._writing = asyncio.Lock()

    def recall(self) -> int:
        """Lets the addresses of an earlier boot cool, in the journal, and tells it the blocks, if it has none. Returns
        how many addresses; 0 when this boot has a journal.

        Before the attachments are restored. A journal that was lost within a boot has lost its cooling addresses, too,
        and gets them back in the same way; those that a wire of the kernel still has are in use, and that counts.
        """
        if not self._journal.begun:
            return 0
        held = self._file.read()
        self._journal.begin_with(held.addresses, self._clock() + self._cooldown, held.last)
        if not self._journal.blocks():
            self._journal.set_blocks(held.blocks)
        return len(held.addresses)

    async def keep_forever(self) -> None:
        """Writes what changed, until cancelled."""
        changed = self._attachments.addresses.changed
        while True:
            await changed.wait()
            await asyncio.sleep(_PAUSE)
            changed.clear()
            if not await self.keep():
                await asyncio.sleep(_RETRY)

    async def keep(self) -> bool:
        """Writes the file if it says something else. Whether it does now; what cannot be written is tried again."""
        try:
            await self.write()
        except OSError as error:
            log.warning("the addresses in use cannot be kept for the next boot: %s", error)
            self._attachments.addresses.changed.set()
            return False
        return True

    async def write(self) -> None:
        """Writes the file if it says something else. Raises OSError."""
        async with self._writing:
            held = Held(
                addresses=self._attachments.addresses.allocator.not_free(),
                last=self._journal.last(),
                blocks=self._journal.blocks(),
            )
            if held != self._written:
                await asyncio.to_thread(self._file.write, held)
                self._written = held
