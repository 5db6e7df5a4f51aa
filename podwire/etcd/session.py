"""The session with etcd that every part of Podwire uses: typed calls, leases and watches over several endpoints.

It is the protocol and no more: keys and records are the business of who uses it (ipam_daemon.registry). Calls end
within `call_s` seconds and raise EtcdUnavailable when no endpoint answered; watches and lease renewals wait out an
outage by themselves. One session is one TCP connection to one endpoint, with as many calls and streams on it as wanted.
It belongs to one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from types import TracebackType

from podwire.backoff import Clock, SystemClock
from podwire.etcd import lease as leases
from podwire.etcd import watch as watches
from podwire.etcd import wire
from podwire.etcd.connection import Connection, Observer, Silent
from podwire.etcd.errors import Compacted
from podwire.etcd.history import History
from podwire.etcd.lease import Lease
from podwire.etcd.options import EtcdOptions
from podwire.etcd.records import (
    Changes,
    Compare,
    Header,
    Item,
    Listing,
    MemberStatus,
    Operation,
    Put,
    Snapshot,
    TxnResult,
)

PAGE = 1000  # keys a Range call; a page of node records is about 300 kB


class EtcdSession:
    """Use as `async with EtcdSession(options) as session`. Making one does no I/O."""

    def __init__(
        self,
        options: EtcdOptions,
        *,
        clock: Clock | None = None,
        observer: Observer | None = None,
        call_s: float = 5.0,
    ) -> None:
        self._connection = Connection(options, clock or SystemClock(), observer or Silent(), call_s)

    async def __aenter__(self) -> EtcdSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the session; leases that it kept alive run out by themselves."""
        await self._connection.close()

    # --- what is known about the server ----------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True when the last thing heard was an answer."""
        return self._connection.connected

    @property
    def last_error(self) -> str:
        """Endpoint and reason of the last failure; empty while all is well."""
        return self._connection.last_error

    @property
    def header(self) -> Header | None:
        """Cluster id and revision of the last answer: another id, or a revision that went back, is a restored etcd."""
        return self._connection.header

    @property
    def history(self) -> History:
        """How far the store has come, and whether it was wiped or restored."""
        return self._connection.history

    @property
    def clock(self) -> Clock:
        """The clock that the session waits by."""
        return self._connection.clock

    async def status(self) -> MemberStatus:
        """Of the member that is asked first, as it sees itself, leader or not."""
        return wire.member_status(await self._connection.call("Status", wire.status_request(), repeatable=True))

    # --- keys ------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> Item | None:
        """The item of `key`, or None."""
        answer = await self._connection.call("Range", wire.range_request(wire.raw(key)), repeatable=True)
        return wire.item(answer.kvs[0]) if answer.kvs else None

    async def get_prefix(self, prefix: str, *, keys_only: bool = False) -> Listing:
        """All items whose key begins with `prefix`, as of one revision, read in pages of PAGE keys."""
        while True:
            try:
                return await self._get_pages(prefix, keys_only)
            except Compacted:  # between two pages; the next attempt reads a newer revision
                await self.clock.sleep(0)

    async def _get_pages(self, prefix: str, keys_only: bool) -> Listing:
        start, end = wire.raw(prefix), wire.after_prefix(prefix)
        items: list[Item] = []
        revision = 0
        more = True
        while more:
            request = wire.range_request(start, end, limit=PAGE, revision=revision, keys_only=keys_only)
            answer = await self._connection.call("Range", request, repeatable=True)
            items += (wire.item(pair) for pair in answer.kvs)
            revision = revision or answer.header.revision
            more = answer.more and bool(answer.kvs)
            start = answer.kvs[-1].key + b"\0" if more else b""
        return Listing(tuple(items), revision)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Writes `key`; returns the revision."""
        answer = await self._connection.call("Put", wire.put_request(Put(key, value, lease)), repeatable=False)
        return int(answer.header.revision)

    async def delete(self, key: str, *, prefix: bool = False) -> int:
        """Deletes `key`, or all keys that begin with it; returns how many were there."""
        answer = await self._connection.call("DeleteRange", wire.delete_request(key, prefix=prefix), repeatable=False)
        return int(answer.deleted)

    async def txn(
        self, when: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        """Carries out `then` if all of `when` holds, else `otherwise`, in one revision."""
        request = wire.txn_request(when, then, otherwise)
        answer = await self._connection.call("Txn", request, repeatable=False)
        return wire.txn_result(answer, then, otherwise)

    async def compact(self, revision: int) -> None:
        """Forgets what was before `revision`; watches from there on get a new Snapshot."""
        await self._connection.call("Compact", wire.compact_request(revision), repeatable=False)

    def watch_prefix(self, prefix: str) -> AsyncGenerator[Snapshot | Changes, None]:
        """A Snapshot of `prefix`, then Changes, through failures, for ever (podwire.etcd.watch)."""
        return watches.watch_prefix(self._connection, prefix, partial(self.get_prefix, prefix))

    # --- leases ----------------------------------------------------------------------------------------------

    async def grant(self, ttl: int) -> Lease:
        """A new lease of `ttl` seconds (etcd may make it longer: at least 1.5 election timeouts)."""
        answer = await self._connection.call("LeaseGrant", wire.grant_request(ttl), repeatable=True)
        return Lease(answer.ID, answer.TTL)

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease and deletes its keys. Raises EtcdError with code NOT_FOUND when it is gone already."""
        await self._connection.call("LeaseRevoke", wire.revoke_request(lease_id), repeatable=False)

    async def keep_alive(self, lease: Lease) -> None:
        """Renews `lease` until etcd says that it is gone, then returns. Outages are waited out. Run it as a task."""
        await leases.keep_alive(self._connection, lease)
