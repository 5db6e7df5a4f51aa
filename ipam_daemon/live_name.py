"""A node's name in etcd, held under a lease for as long as the daemon lives.

    absent ── take ──▶ held ── renewed three times a TTL, and watched ──▶ held
                        │ the lease ran out (an outage longer than the TTL, a wiped etcd), or somebody deleted the key
                        ├── nobody has the name ──▶ taken again, held
                        └── someone has it ──▶ lost: the daemon must stop

The value says which machine (node id) and which process (a random number) holds the name. Another machine's is refused
at once; a former process of the same machine, which was killed and whose lease still runs, is succeeded at once by a
transaction on the key's mod revision. Should that former process live after all, its renewal ends (its lease is
revoked), it finds a process that is not itself, and is the one that loses.

A store that was restored from a backup may show a holder of the past, whose lease nobody renews: for as long as that
lease can last the name is tried again, and only then lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from contextlib import aclosing
from typing import TypeVar

import msgspec

from ipam_daemon.claims import NodeNameTaken, name_taken
from ipam_daemon.model import NodeRecord, Record, decode, encode
from podwire.errors import PodwireError
from podwire.etcd import Backoff, EtcdError, EtcdSession, EtcdUnavailable, Lease
from podwire.etcd.records import Deleted, Get, Item, Put, Snapshot, Written, absent, unchanged

T = TypeVar("T")
_PAST_TTLS = 3  # a leader gives all leases a new term; the lease may have been made with a longer one
log = logging.getLogger(__name__)


class Live(Record, frozen=True, kw_only=True):
    """The value of a live key. `process` is drawn at random by each."""

    node_id: str
    process: str = ""


class LiveName:
    """One name, one holder. `root` is the registry's; `ttl` in seconds."""

    def __init__(self, session: EtcdSession, root: str, name: str, node_id: str, ttl: int) -> None:
        self._session = session
        self._key = f"{root}live/{name}"
        self._node_key = f"{root}nodes/{name}"
        self._name = name
        self._ttl = ttl
        self._us = Live(node_id=node_id, process=secrets.token_hex(8))
        self._lease: Lease | None = None
        self._task: asyncio.Task[PodwireError] | None = None

    async def take(self) -> None:
        """Takes the name for this process. Raises NodeNameTaken, EtcdUnavailable."""
        await self._put(successor=True)

    def hold(self, generation: int) -> None:
        """Renews in the background from now on. `generation`: see NodeRecord."""
        self._task = asyncio.create_task(self._hold(generation), name=f"live-{self._name}")

    async def lost(self) -> NodeNameTaken:
        """Returns once the name is someone else's. Raises what made holding it impossible (a permission)."""
        assert self._task is not None, "hold comes first"
        error = await asyncio.shield(self._task)
        if isinstance(error, NodeNameTaken):
            return error
        raise error

    async def look(self) -> None:
        """Takes the name again when somebody deleted its key while the lease goes on. Raises EtcdUnavailable."""
        if self._lease is not None and await self._session.get(self._key) is None:
            await self._revoke(self._lease)  # the renewal finds it gone, and does what it does then

    async def leave(self) -> None:
        """Stops renewing and deletes the key. Raises EtcdUnavailable; the key then goes with its lease."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._revoke(self._lease)

    async def give_up(self) -> None:
        """`leave` on the way out of an error: without another."""
        with contextlib.suppress(EtcdUnavailable):
            await self.leave()

    async def _hold(self, generation: int) -> PodwireError:
        try:
            while True:
                assert self._lease is not None, "take comes first"
                breaks = self._session.history.breaks
                why = await self._held(self._lease)
                log.warning("%s; taking the name again", why)
                await self._retake(generation, breaks)
        except PodwireError as error:
            log.error("node name %r cannot be held: %s", self._name, error)
            return error

    async def _held(self, lease: Lease) -> str:
        """Returns when the key is no more, or no more ours, and says why. A key may go while its lease lives on."""
        renewing = asyncio.create_task(self._session.keep_alive(lease), name=f"renew-{self._name}")
        watching = asyncio.create_task(self._gone(lease), name=f"watch-{self._name}")
        try:
            done, _ = await asyncio.wait({renewing, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (renewing, watching):
                task.cancel()
            await asyncio.gather(renewing, watching, return_exceptions=True)
        if renewing in done:
            return f"the lease of node name {self._name!r} ran out"
        with contextlib.suppress(EtcdUnavailable):  # it ends by itself, and has nothing left to delete
            await self._revoke(lease)
        return f"somebody deleted or wrote {self._key}"

    async def _gone(self, lease: Lease) -> None:
        """Returns when the key is not there, or under another lease."""
        async with aclosing(self._session.watch_prefix(self._key)) as batches:
            async for batch in batches:
                if isinstance(batch, Snapshot):
                    found = next((each for each in batch.items if each.key == self._key), None)
                    if found is None or found.lease != lease.id:
                        return
                    continue
                for event in batch.events:  # of names that begin with ours, too
                    if isinstance(event, Deleted) and event.key == self._key:
                        return
                    if isinstance(event, Written) and event.item.key == self._key and event.item.lease != lease.id:
                        return

    async def _retake(self, generation: int, breaks: int) -> None:
        """Takes the name again through an outage. `breaks`: of the history when it was held last."""
        backoff, clock = Backoff(), self._session.clock
        began: float | None = None  # when etcd first answered
        while True:
            try:
                await self._check_generation(generation)
                restored = self._session.history.breaks != breaks
                began = clock.now() if began is None else began
                await self._put(successor=restored)
                return
            except EtcdUnavailable:
                await clock.sleep(backoff.next())
            except NodeNameTaken:
                if self._session.history.breaks == breaks or clock.now() - (began or 0.0) > _PAST_TTLS * self._ttl:
                    raise
                await clock.sleep(backoff.next())

    async def _put(self, *, successor: bool) -> None:
        """Writes the key under a new lease. `successor`: in place of a former process of this machine, too."""
        lease = await self._session.grant(self._ttl)
        put = Put(self._key, encode(self._us), lease.id)
        before = absent(self._key)
        former = None
        try:
            while True:
                result = await self._session.txn([before], [put], [Get(self._key), Get(self._node_key)])
                if result.succeeded:
                    break
                former, node = result.found
                if former is None:
                    before = absent(self._key)
                else:
                    self._check_holder(former, node, successor)
                    before = unchanged(self._key, former.mod_revision)
        except NodeNameTaken:
            await self._revoke(lease)
            raise
        self._lease = lease
        if former is not None:
            await self._revoke(Lease(former.lease, 0))

    def _check_holder(self, former: Item, node: Item | None, successor: bool) -> None:
        """Raises NodeNameTaken unless `former` was written by us, or by a process that we may succeed."""
        holder = _readable(former, Live) or Live(node_id="unknown")
        if holder == self._us or (successor and holder.node_id == self._us.node_id):
            return
        if holder.node_id == self._us.node_id:
            raise NodeNameTaken(
                f"node name {self._name!r} was taken over by another process on this machine: run one daemon a node"
            )
        record = _node_record(node)
        here = record is not None and record.node_id == holder.node_id
        raise name_taken(self._name, holder.node_id, record.addresses if record is not None and here else ())

    async def _check_generation(self, generation: int) -> None:
        """Raises NodeNameTaken when another machine had the name in the meantime, even if it has left again."""
        record = _node_record(await self._session.get(self._node_key))
        if record is not None and record.node_id != self._us.node_id and record.generation > generation:
            raise name_taken(self._name, record.node_id, record.addresses)

    async def _revoke(self, lease: Lease | None) -> None:
        if lease is not None and lease.id:
            try:
                await self._session.revoke(lease.id)
            except EtcdError as error:
                if error.code != "NOT_FOUND":
                    raise


def _node_record(item: Item | None) -> NodeRecord | None:
    return None if item is None else _readable(item, NodeRecord)


def _readable(item: Item, kind: type[T]) -> T | None:
    """None for a damaged record: here it only adorns a message, and who needs it reports it."""
    try:
        return decode(item.value, kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
