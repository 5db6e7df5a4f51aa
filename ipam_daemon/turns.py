"""Who may touch an attachment now, and which DEL has already come for it.

One lock an attachment, made when somebody wants it and forgotten when nobody does. And a tombstone for each DEL, with
the moment at which it was issued (CLOCK_BOOTTIME, nanoseconds): an ADD that was issued earlier is too late, however the
two crossed on their way. The last few thousand are kept; an ADD does not travel that long.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ipam_daemon.model import AttachmentKey

_TOMBSTONES = 4096


class Turns:
    """The locks and tombstones of this node's attachments. For one event loop."""

    def __init__(self) -> None:
        self._locks: dict[AttachmentKey, tuple[asyncio.Lock, int]] = {}
        self._tombstones: OrderedDict[AttachmentKey, int] = OrderedDict()

    @property
    def in_flight(self) -> frozenset[AttachmentKey]:
        """The attachments that something works on, or waits for."""
        return frozenset(self._locks)

    @asynccontextmanager
    async def of(self, key: AttachmentKey) -> AsyncIterator[None]:
        """Holds the attachment; whoever comes later waits."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = (lock, users - 1)

    def bury(self, key: AttachmentKey, moment_ns: int) -> None:
        """A DEL that was issued at that moment has come."""
        self._tombstones[key] = max(moment_ns, self._tombstones.get(key, 0))
        self._tombstones.move_to_end(key)
        while len(self._tombstones) > _TOMBSTONES:
            self._tombstones.popitem(last=False)

    def is_buried(self, key: AttachmentKey, moment_ns: int) -> bool:
        """Whether a DEL has come that was issued after that moment."""
        return self._tombstones.get(key, 0) > moment_ns
