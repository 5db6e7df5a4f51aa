"""Following a prefix: a snapshot, then what changes, for as long as anyone listens.

    ┌──────────────▶ read all ──▶ Snapshot (revision r) ──▶ watch from r + 1 ──▶ Changes … ─┐
    │                                                             ▲                         │
    │                                      stream broken: back-off, any endpoint            │
    │                                                             └─────────────────────────┤
    └── compacted · another cluster · a revision that went back ◀───────────────────────────┘

After a Snapshot the consumer diffs, since deletions may have happened out of sight; Changes it applies in order. None
is seen twice or left out between two snapshots, because a resume starts at the last *event's* revision + 1 (the header
may run ahead of events that are still to come), or at the header's after a progress notice, which etcd sends when all
events up to there are delivered.

A server that was restored from a backup would accept a watch from a revision that it has yet to reach, and stay silent:
so the header that confirms the watch is compared, and an older revision or another cluster id begins anew.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from podwire.backoff import Backoff
from podwire.etcd import wire
from podwire.etcd.connection import Connection, Stream
from podwire.etcd.errors import Compacted, EtcdError, EtcdUnavailable
from podwire.etcd.records import Changes, Header, Listing, Snapshot

_DENIED = ("permission denied", "auth token", "user name is empty")
_RESTARTS = ("no leader", "etcdserver: server stopped", "leader changed")


async def watch_prefix(
    connection: Connection, prefix: str, read_all: Callable[[], Awaitable[Listing]]
) -> AsyncGenerator[Snapshot | Changes, None]:
    """Yields a Snapshot, then Changes, with a new Snapshot whenever the thread was lost. Never ends by itself.

    While etcd is away it waits; EtcdError (permission, a closed session) is raised.
    """
    backoff = Backoff()
    cluster: int | None = None
    revision = 0
    while True:
        try:
            if cluster is None:
                listing = await read_all()
                assert connection.header is not None, "an answer has come"
                cluster, revision = connection.header.cluster_id, listing.revision
                connection.observer.watch(prefix, "snapshot")
                yield Snapshot(listing.items, revision)
            async with aclosing(_follow(connection, prefix, Header(cluster, revision))) as batches:
                async for batch in batches:
                    backoff.reset()
                    revision = batch.revision
                    if batch.events:
                        connection.observer.watch(prefix, "changes")
                        yield batch
        except Compacted:
            connection.observer.watch(prefix, "lost")
            cluster = None
            await connection.clock.sleep(backoff.next())
        except EtcdUnavailable:  # the connection has counted it
            await connection.clock.sleep(backoff.next())


async def _follow(connection: Connection, prefix: str, known: Header) -> AsyncGenerator[Changes, None]:
    """One stream, from `known.revision` + 1 on. A batch without events is a progress notice."""
    async with await connection.stream("Watch") as stream:
        await stream.write(wire.watch_request(prefix, known.revision + 1))
        created = await stream.read(within=connection.call_s)
        _raise_if_canceled(created, stream)
        if wire.header(created).cluster_id != known.cluster_id or created.header.revision < known.revision:
            raise Compacted(
                f"etcd is at revision {created.header.revision}, not {known.revision}: restored or replaced"
            )
        while True:
            answer = await stream.read()
            _raise_if_canceled(answer, stream)
            events = tuple(wire.event(message) for message in answer.events)
            last = answer.events[-1].kv.mod_revision if events else answer.header.revision
            yield Changes(events, last)


def _raise_if_canceled(answer: wire.Message, stream: Stream) -> None:
    if answer.compact_revision:
        raise Compacted(f"etcd has compacted up to revision {answer.compact_revision}")
    if answer.canceled:
        reason = answer.cancel_reason or "no reason given"
        if any(text in reason for text in _RESTARTS):
            raise EtcdUnavailable(f"etcd ended the watch: {reason}")
        refused = EtcdError(f"etcd refuses the watch: {reason}", "CANCELED")
        # Some releases say "permission denied" to a token that has run out.
        raise stream.refused(refused) if any(text in reason for text in _DENIED) else refused
