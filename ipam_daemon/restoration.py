"""A store that was wiped, or restored from an old backup, and what is done about it (DESIGN.md, section 4).

    noticed ──▶ every node claims its journaled blocks again and publishes its record, at once
        └─────▶ /podwire/v1/restored, under a lease of `settle_s`: no node claims a new block while it is there

It is noticed in one of two ways. An answer's revision went back, or its cluster id is another (podwire.etcd.history):
at the first answer after the outage. Or a key that this node has written is gone, or older than it was written: that
finds also a store that has overtaken the old revision, by one cheap read of a node's own few keys (its record and its
blocks) every `live_s` seconds. A node that lost nothing need not notice.

A node that was forgotten (`podwire node forget`) misses its keys, too. Who forgets leaves a trace, `forgotten/<node>`,
in the same transaction, so that nobody takes the one for the other: the node joins again, and nobody waits. The node
deletes the trace when it has published its record.

The key in etcd makes the others wait, too, a new node above all, which cannot know what the store has lost. A node
waits by its own clock besides, so that a key that cannot be written (a role without that permission) costs safety
between nodes only as far as they do not notice themselves.
"""

from __future__ import annotations

import asyncio
import logging

from ipam_daemon.claims import StoreRestored
from ipam_daemon.model import Record, encode
from podwire.etcd import Backoff, EtcdError, EtcdSession, EtcdUnavailable, SessionClosed
from podwire.etcd.records import Get, Item, Put, absent

log = logging.getLogger(__name__)
_KEYS_A_TXN = 100  # etcd takes 128 operations in one


class Restored(Record, frozen=True, kw_only=True):
    """The value of the key: who has noticed what. For people."""

    node: str
    why: str


class Forgotten(Record, frozen=True, kw_only=True):
    """The value of forgotten/<node>: when it was forgotten, in seconds since the epoch. For people."""

    at: float


class Restoration:
    """One node's part in it. `key` is the cluster's, `settle_s` for how long new claims wait."""

    def __init__(self, session: EtcdSession, root: str, settle_s: int, look_s: float) -> None:
        self.key = f"{root}restored"
        self.node = ""
        self._root = root
        self._session = session
        self._settle_s = settle_s
        self._look_s = look_s
        self._witnesses: dict[str, int] = {}
        self._noticed = asyncio.Event()
        self._until: float | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        session.history.on_break(self._on_break)

    # --- what this node has written

    def wrote(self, key: str, mod_revision: int) -> None:
        """This node has written `key`, and nobody else does while it lives."""
        self._witnesses[key] = mod_revision

    def gave_up(self, key: str) -> None:
        """`key` is, or is about to be, no longer this node's."""
        self._witnesses.pop(key, None)

    @property
    def trace(self) -> str:
        """The key that says that this node was forgotten."""
        return f"{self._root}forgotten/{self.node}"

    async def missed(self, key: str) -> None:
        """The store had not `key`, which was this node's: lost, or given up with the node when that was forgotten."""
        if not self.node or await self._session.get(self.trace) is None:
            self.found_lost(key)

    def found_lost(self, key: str) -> None:
        """The store has lost `key`, which was this node's. Says nothing new while claims wait anyway."""
        if not self.waits:
            self._session.history.broken(f"it had lost {key}")

    # --- noticing

    async def restored(self) -> str:
        """Returns when the store was found to be wiped or restored since the last time, and says how."""
        await self._noticed.wait()
        self._noticed.clear()
        return self._session.history.reason

    def begin(self) -> None:
        """Looks after this node's keys from now on."""
        self._looking = self._looking or asyncio.create_task(self._look_forever(), name="look-after-own-keys")

    async def end(self) -> None:
        """Stops everything that runs in the background."""
        tasks = [task for task in (self._looking, self._announcing) if task is not None]
        self._looking = self._announcing = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Compares this node's keys with what it has written. Raises EtcdUnavailable, EtcdError."""
        known = list(self._witnesses.items())
        for start in range(0, len(known), _KEYS_A_TXN):
            some = known[start : start + _KEYS_A_TXN]
            *found, trace = (await self._session.txn([], [*(Get(key) for key, _ in some), Get(self.trace)])).found
            for (key, revision), item in zip(some, found, strict=True):
                if self._witnesses.get(key) == revision and (item is None or item.mod_revision < revision):
                    self.gave_up(key)  # told once; who writes it again says so
                    if trace is None:
                        self.found_lost(key)

    async def _look_forever(self) -> None:
        while True:
            await self._session.clock.sleep(self._look_s)
            try:
                await self.look()
            except EtcdUnavailable:  # the connection has counted it
                continue
            except SessionClosed:
                return
            except EtcdError as error:
                log.error("this node's keys in etcd cannot be read: %s", error)

    def _on_break(self, reason: str) -> None:
        log.error("etcd was wiped or restored: %s; new blocks wait for %d s", reason, self._settle_s)
        self._until = self._session.clock.now() + self._settle_s
        self._noticed.set()
        if self._announcing is None or self._announcing.done():
            self._announcing = asyncio.create_task(self._announce(reason), name="announce-restored")

    async def _announce(self, why: str) -> None:
        """Puts the key, unless another node has."""
        put, backoff = encode(Restored(node=self.node, why=why)), Backoff()
        while True:
            try:
                if await self._session.get(self.key) is None:
                    lease = await self._session.grant(self._settle_s)
                    await self._session.txn([absent(self.key)], [Put(self.key, put, lease.id)])
                return
            except EtcdUnavailable:
                await self._session.clock.sleep(backoff.next())
            except SessionClosed:
                return
            except EtcdError as error:
                log.error("other nodes cannot be told that etcd was restored (%s): %s", self.key, error)
                return

    # --- waiting

    @property
    def waits(self) -> bool:
        """Whether this node waits of its own knowledge; others' is in etcd."""
        unannounced = self._announcing is not None and not self._announcing.done()
        return unannounced or (self._until is not None and self._session.clock.now() < self._until)

    def check(self, marker: Item | None = None) -> None:
        """Raises StoreRestored while new claims wait. `marker` is what is at `key`."""
        if marker is not None or self.waits:
            why = self._session.history.reason or "another node has found it so"
            raise StoreRestored(
                f"etcd was wiped or restored ({why}): no new block until the nodes have claimed theirs again, "
                f"{self._settle_s} s at most"
            )

    async def settled(self) -> None:
        """Returns when the nodes have had time to say again who they are; at once in the ordinary case."""
        backoff = Backoff()
        while True:
            try:
                if await self._session.get(self.key) is None and not self.waits:
                    return
            except EtcdUnavailable:
                pass
            await self._session.clock.sleep(backoff.next())
