"""What a consumer of Kubernetes objects sees, wherever they come from: batches of changes.

    async with aclosing(source.follow(proxied_services())) as batches:
        async for batch in batches:
            for service in batch.upserts: ...        the object as it is now
            for key in batch.deletes: ...            (namespace, name); may be one that was never seen
            if batch.synced: ...                     everything that there was at the start has been said

A key stands in a batch at most once, so the order of upserts and deletes within it does not matter; only the order of
batches does. Batches come as they are read: a list in chunks, a watch in what one read of the socket gave. The source
reads no further while the consumer works, and what happens meanwhile to one object is one change when it reads again.

The source keeps no objects; the consumer does. After an outage it hears of what is different, and of nothing else.
Once `synced` it stays so: a source that is away is silent, and its consumer goes on with what it knows.

`skipped` names objects that could not be understood. What the consumer has of them from before stays as it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Generic, Protocol

import msgspec

from podwire.kube.kinds import Key, Kind, T, Wanted


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """An object that is left out: `key` None when it does not even say its name; `reason` in words."""

    key: Key | None
    reason: str


class Batch(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """See the module. `synced` is False until the first list is complete, and True from then on."""

    kind: Kind[T]
    upserts: tuple[T, ...] = ()
    deletes: tuple[Key, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    synced: bool = False


class Source(Protocol):
    """Where objects come from."""

    def follow(self, wanted: Wanted[T]) -> AsyncGenerator[Batch[T], None]:
        """Batches for ever. Never raises for an outage: it waits, and says so to its observer."""
        ...


class Observer(Protocol):
    """Is told what happens, for metrics and for tests. Must return at once and not raise."""

    def attempt(self, endpoint: str, outcome: str, seconds: float) -> None:
        """A request: `outcome` is "ok", "no connection", "no answer", "broken off" or an HTTP status."""

    def follow(self, kind: str, event: str) -> None:
        """`kind` as in `services`; `event` is "list", "stream" (a list as a stream), "watch", "synced", "expired",
        "garbled" or "lost"."""

    def skipped(self, kind: str, name: str, reason: str) -> None:
        """An object was left out. `name` is `namespace/name`, or empty."""

    def problem(self, kind: str, reason: str) -> None:
        """Following a kind, or a path of manifests, is hindered by `reason`; an empty one: it works (again)."""


class Silent:
    """An observer that does nothing."""

    def attempt(self, endpoint: str, outcome: str, seconds: float) -> None:
        """Passed over."""

    def follow(self, kind: str, event: str) -> None:
        """Passed over."""

    def skipped(self, kind: str, name: str, reason: str) -> None:
        """Passed over."""

    def problem(self, kind: str, reason: str) -> None:
        """Passed over."""
