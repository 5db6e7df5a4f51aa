"""Objects from the API: list, watch, and what comes in between.

                    ┌──────────────────────────────────────────────────────────────┐
                    ▼                                                              │ 410 · garbled
    streamed list (one watch) ──▶ watch ──▶ time is up, connection broken ──▶ watch from where it was
       │ 400, 422, no mark: never again                                            ▲
       │ broken off: this once                                                     │
       └──▶ chunked list ──────────────────────────────────────────────────────────┘

**Which objects a list gives.** Lists name no resourceVersion, so they are consistent: nothing older than the request.
Servers since 1.31 answer that from memory; older ones ask etcd, which costs them more. Version 0 ("whatever you have")
would be cheaper there and may be from before the last change: a proxy that starts with it takes out what it has set up
a moment ago. A streamed list is as consistent, and the server need not build it in memory.

**Dead connections.** A server ends each watch after 5 to 10 minutes (we ask for a random time, so that nodes spread).
Bookmarks come once a minute; a watch that says nothing for `silence` seconds is begun again at the next endpoint, from
where it was, which costs next to nothing. A host that is gone is noticed by TCP in 30 s (client.py).

**Pauses.** Full jitter, from 0.25 up to 15 s; what the server asks for (Retry-After) if that is longer. What somebody
must change first (401, 403, an unknown kind) is said in words and tried again every minute or so.

**Memory.** A version a key (known.py), one page or 1 to 2 MB of a stream, one batch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from enum import Enum
from typing import Generic

import msgspec

from podwire.backoff import Backoff
from podwire.kube.client import Client
from podwire.kube.errors import (
    ApiError,
    ApiUnavailable,
    BadRequest,
    CredentialsUnavailable,
    Expired,
    Garbled,
    NotFound,
    NotStreamed,
    Silence,
)
from podwire.kube.follower import Follower
from podwire.kube.kinds import Key, T, Wanted
from podwire.kube.lines import LONGEST
from podwire.kube.source import Batch

logger = logging.getLogger(__name__)
CHUNK = 500
_NAMED_AT_ONCE = 10  # skipped objects of one batch that the log names


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `mark`: how long a streamed list may be silent before its end; `silence`: the same for a watch;
    `watch`: how long one lasts, from this to twice as long; `short`: one that ends before, with nothing said, is a
    failure; `first` and `most`: pauses between failures, which begin anew when something went well for `lasting`;
    `slow`: the longest pause between refusals."""

    mark: float = 10.0
    silence: float = 90.0
    watch: float = 300.0
    short: float = 1.0
    lasting: float = 10.0
    first: float = 0.25
    most: float = 15.0
    slow: float = 60.0


class ApiSource:
    """A Source. `problems` says by kind what hinders it now, `skipped` which objects are left out, and why.

    `chance` gives numbers from 0 to 1; `longest_line` of a watch is in bytes.
    """

    def __init__(
        self,
        client: Client,
        *,
        pace: Pace | None = None,
        chance: Callable[[], float] = random.random,
        longest_line: int = LONGEST,
    ) -> None:
        self.longest_line = longest_line
        self.problems: dict[str, str] = {}
        self.skipped: dict[str, dict[Key, str]] = {}
        self.client = client
        self.pace = pace or Pace()
        self.chance = chance
        self.streams = True

    async def follow(self, wanted: Wanted[T]) -> AsyncGenerator[Batch[T], None]:
        """See source.Source."""
        thread = _Thread(self, wanted)
        while True:
            pause = 0.0
            try:
                async with aclosing(thread.round()) as batches:
                    async for batch in batches:
                        self._account(batch)
                        yield batch
            except (ApiError, ApiUnavailable, CredentialsUnavailable, Garbled) as error:
                if isinstance(error, NotFound) and wanted.optional and not thread.follower.synced:
                    yield thread.follower.absent()
                pause = thread.failed(error)
            await self.client.clock.sleep(pause)

    def report(self, kind: str, reason: str) -> None:
        """A kind is hindered by `reason`; empty: it is not."""
        if self.problems.get(kind, "") == reason:
            return
        if reason:
            self.problems[kind] = reason
            logger.warning(f"{kind}: {reason}", extra={"fields": {"kind": kind}})
        else:
            del self.problems[kind]
            logger.info(f"{kind}: followed again", extra={"fields": {"kind": kind}})
        self.client.observer.problem(kind, reason)

    def _account(self, batch: Batch[T]) -> None:
        """Keeps `skipped`, and names what is new in it."""
        resource = batch.kind.resource
        left_out = self.skipped.setdefault(resource, {})
        if left_out:
            for key in (*(obj.key for obj in batch.upserts), *batch.deletes):
                left_out.pop(key, None)
        for number, one in enumerate(batch.skipped):
            name = "/".join(part for part in one.key or () if part)
            self.client.observer.skipped(resource, name, one.reason)
            if one.key is not None:
                if left_out.get(one.key) == one.reason:
                    continue
                left_out[one.key] = one.reason
            if number < _NAMED_AT_ONCE:
                what = batch.kind.called(one.key) if one.key else f"a {batch.kind.name} without a name"
                logger.warning(f"{what} is left out: {one.reason}", extra={"fields": {"kind": resource}})
        if len(batch.skipped) > _NAMED_AT_ONCE:
            logger.warning(f"{len(batch.skipped)} {resource} in one batch are left out, of which some were named")


class _Round(Enum):
    """What a thread does at a time."""

    LIST = "list"
    STREAM = "stream"  # a streamed list, which goes on as a watch
    WATCH = "watch"


class _Thread(Generic[T]):
    """One kind, followed: what to ask next, and how long to wait before."""

    def __init__(self, source: ApiSource, wanted: Wanted[T]) -> None:
        self.follower = Follower(wanted, source.longest_line)
        self._source = source
        self._client = source.client
        self._pace = source.pace
        self._wanted = wanted
        self._pauses = Backoff(self._pace.first, self._pace.most, least=0.0, chance=source.chance)
        self._slow = Backoff(self._pace.slow / 16, self._pace.slow, chance=source.chance)
        self._round = _Round.LIST
        self._opened = 0.0  # when the round had its answer; 0: it has none
        self._in_chunks = False

    async def round(self) -> AsyncGenerator[Batch[T], None]:
        """One list, or one watch, to its end. Raises what ended it; returns when it ended as it should."""
        self._opened = 0.0
        if self.follower.version:
            self._round = _Round.WATCH
        else:
            streamed = self._source.streams and not self._in_chunks
            self._round, self._in_chunks = _Round.STREAM if streamed else _Round.LIST, False
        self._say(self._round.value)
        was = self.follower.synced
        async with aclosing(self._list() if self._round is _Round.LIST else self._watch()) as batches:
            async for batch in batches:
                if batch.synced and not was:
                    was = True
                    self._say("synced")
                yield batch

    def failed(self, error: Exception) -> float:
        """What follows from a failure: where to begin again, what to say, and how many seconds to wait."""
        streaming = self._round is _Round.STREAM and self.follower.known.listing
        if streaming and isinstance(error, NotStreamed | BadRequest | Silence):
            self._source.streams = False
            return 0.0
        self._in_chunks = streaming and bool(self._opened)
        if self._opened and self._client.clock.now() - self._opened >= self._pace.lasting:
            self._pauses.reset()
        if isinstance(error, Expired):
            self._say("expired")
            self.follower.lose()
            return self._pauses.next()
        if isinstance(error, NotFound) and self._wanted.optional:
            return self._slow.next()
        self._source.report(self._wanted.kind.resource, str(error))
        if isinstance(error, Garbled):
            self._say("garbled")
            self.follower.lose()
            return self._pauses.next()
        self._say("lost")
        if isinstance(error, ApiError):
            return self._slow.next()
        asked = error.retry_after * (1.0 + 0.5 * self._source.chance()) if isinstance(error, ApiUnavailable) else 0.0
        return max(asked, self._pauses.next())

    async def _list(self) -> AsyncGenerator[Batch[T], None]:
        self.follower.begin()
        path, token, limit = self._wanted.kind.path, "", CHUNK
        while True:
            part = {"limit": str(limit) if limit else "", "continue": token}
            query = {**self._wanted.query(), **{name: value for name, value in part.items() if value}}
            try:
                body = await self._client.get(path, query)
            except Expired:
                if not token:
                    raise
                self._say("expired")  # the list took longer than the server remembers: all at once, then
                self.follower.begin()
                token, limit = "", 0
                continue
            batch, following = self.follower.page(body)
            self._well()
            if batch is not None:
                yield batch
            if not following:
                return
            if following == token:
                raise Garbled(f"{path}: a list that does not move on")
            token = following

    async def _watch(self) -> AsyncGenerator[Batch[T], None]:
        path, began_at = self._wanted.kind.path, self.follower.version
        query = self._query()
        if self._round is _Round.STREAM:
            self.follower.begin()
        else:
            self.follower.watch()
        async with self._client.open(path, query) as answer:
            self._well()
            while data := await answer.read(self._patience()):
                batch = self.follower.feed(data)
                if batch is not None:
                    yield batch
                if self.follower.failure is not None:
                    raise self.follower.failure
        if self.follower.known.listing:
            raise ApiUnavailable(f"{path}: the streamed list ended before its mark")
        lived = self._client.clock.now() - self._opened
        if self.follower.version == began_at and lived < self._pace.short:
            raise ApiUnavailable(f"{path}: the watch ended at once")

    def _patience(self) -> float:
        return self._pace.mark if self.follower.known.listing else self._pace.silence

    def _query(self) -> dict[str, str]:
        lasts = self._pace.watch * (1.0 + self._source.chance())
        query = {**self._wanted.query(), "watch": "true", "allowWatchBookmarks": "true"}
        query["timeoutSeconds"] = str(max(1, int(lasts)))
        if self._round is _Round.STREAM:
            return {**query, "sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        return {**query, "resourceVersion": self.follower.version}

    def _well(self) -> None:
        """There is an answer."""
        self._opened = self._opened or self._client.clock.now()
        self._slow.reset()
        self._source.report(self._wanted.kind.resource, "")

    def _say(self, event: str) -> None:
        self._client.observer.follow(self._wanted.kind.resource, event)
