"""A lease and its renewal."""

from __future__ import annotations

import msgspec

from podwire.backoff import Backoff
from podwire.etcd import wire
from podwire.etcd.connection import Connection
from podwire.etcd.errors import EtcdUnavailable


class Lease(msgspec.Struct, frozen=True):
    """A lease of `ttl` seconds; keys put under it go when it is not renewed for that long."""

    id: int
    ttl: int


async def keep_alive(connection: Connection, lease: Lease) -> None:
    """Renews `lease` three times in its life, over any endpoint; returns when etcd says that it is gone.

    Only etcd's word counts. Its leases live on by a new full term when a leader is elected or the server comes back, so
    that our own clock cannot tell: while etcd is away, renewal is tried again and again, with a back-off. A member gets
    a sixth of the life to answer, so that two that do not answer leave time for a third.
    """
    backoff = Backoff(most=lease.ttl / 3)
    while True:
        try:
            async with await connection.stream("LeaseKeepAlive") as stream:
                while True:
                    await stream.write(wire.keep_alive_request(lease.id))
                    answer = await stream.read(within=max(1.0, lease.ttl / 6))
                    if answer.TTL <= 0:
                        return
                    backoff.reset()
                    await connection.clock.sleep(lease.ttl / 3)
        except EtcdUnavailable:  # the connection has counted it
            await connection.clock.sleep(backoff.next())
