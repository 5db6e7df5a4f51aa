"""Since when a node's daemon has not lived, for `podwire node list`.

A live key that ends with its lease leaves nothing behind, and the daemon that could tell is dead. So the others watch
the live keys, and one of them writes down when a key went:

    live/<name> deleted ──▶ each waits a moment, chosen at random ──▶ one writes gone/<name>, the others find it there

Nothing is written periodically: a death costs one write and a small read a node, the watch a stream a daemon. (A time
in the node's own record would have to be written again and again by every node; a second, long lease, renewed without a
write, begins anew with every leader that etcd elects.) The trace stays when the node is back, which knows nothing of
it: it tells of one process of the daemon, and counts while the name is not live. Nobody decides anything by it. What
nobody saw, since no other daemon ran, is not known. An etcd that is away just then, as when it loses the node and a
member at once, is asked again until it has the trace, or the node is back.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import aclosing

import msgspec

from ipam_daemon.live_name import Live
from ipam_daemon.model import Record, decode, encode
from podwire.etcd import EtcdError, EtcdSession, EtcdUnavailable
from podwire.etcd.records import Changes, Deleted, Item, Put, Snapshot, absent, unchanged

_SPREAD = 1.0  # seconds within which the daemons look whether another was first
_RETRY = 5.0  # and within which they ask again when etcd did not answer

log = logging.getLogger(__name__)


class Gone(Record, frozen=True, kw_only=True):
    """The value of gone/<name>: when the live key of that process was seen to go, in seconds since the epoch."""

    at: float
    process: str = ""


class Departures:
    """One node's watch over the others. `root` is the registry's."""

    def __init__(self, session: EtcdSession, root: str) -> None:
        self._session = session
        self._root = root
        self._own = ""
        self._living: dict[str, str] = {}  # name to process
        self._task: asyncio.Task[None] | None = None

    def begin(self, own: str) -> None:
        """Watches from now on; `own` is this node's name."""
        self._own = own
        self._task = self._task or asyncio.create_task(self._watch(), name="watch-departures")

    async def end(self) -> None:
        """Stops watching."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        prefix = f"{self._root}live/"
        try:
            async with aclosing(self._session.watch_prefix(prefix)) as batches, asyncio.TaskGroup() as notes:
                async for batch in batches:
                    for name, process in self._departed(batch, prefix):
                        if name != self._own:
                            notes.create_task(self._note(name, Gone(at=time.time(), process=process)))
        except* EtcdError as errors:
            log.warning("nobody is told since when other nodes have not lived: %s", errors.exceptions[0])

    def _departed(self, batch: Snapshot | Changes, prefix: str) -> list[tuple[str, str]]:
        """Who went, with the process that had the name. One batch may say that a node came and that it went."""
        if isinstance(batch, Snapshot):
            former, self._living = self._living, {item.key.removeprefix(prefix): _process(item) for item in batch.items}
            return [(name, process) for name, process in former.items() if name not in self._living]
        gone: dict[str, str] = {}
        for event in batch.events:
            name = (event.key if isinstance(event, Deleted) else event.item.key).removeprefix(prefix)
            if not isinstance(event, Deleted):
                self._living[name] = _process(event.item)
                gone.pop(name, None)
            elif name in self._living:
                gone[name] = self._living.pop(name)
        return list(gone.items())

    async def _note(self, name: str, gone: Gone) -> None:
        within = _SPREAD
        while name not in self._living:
            await self._session.clock.sleep(random.uniform(0, within))
            try:
                await self._write(name, gone)
                return
            except EtcdUnavailable:
                log.info("since when %s has not lived is not written down yet: etcd is away", name)
            within = _RETRY

    async def _write(self, name: str, gone: Gone) -> None:
        """Leaves what another daemon was first to write. Raises EtcdUnavailable."""
        key = f"{self._root}gone/{name}"
        former = await self._session.get(key)
        if former is None or _gone(former).process != gone.process:
            before = unchanged(key, former.mod_revision if former else 0)
            await self._session.txn([before, absent(f"{self._root}live/{name}")], [Put(key, encode(gone))])


def _process(item: Item) -> str:
    try:
        return decode(item.value, Live).process
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _gone(item: Item) -> Gone:
    try:
        return decode(item.value, Gone)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Gone(at=0.0)
