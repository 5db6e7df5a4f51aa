"""Following the change log from asyncio: the same iterator feeds HTTP watches and the lab's own loops.

    list ──(resourceVersion)──▶ changes after it ──▶ wait until the log grows ──▶ …            slow readers: 410 Gone

A change is seen through the watch's namespace and selector: an object that comes into view is ADDED, one that leaves it
is DELETED, whatever was done to it. Nothing is queued for a watcher; it reads the shared log at its own speed, so a
watcher that stands still costs nothing but falls out of the log in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from podwire.lab.api.admission import copied
from podwire.lab.api.kinds import Kind
from podwire.lab.api.log import Change, ChangeLog, EventType
from podwire.lab.api.selectors import Selector


class Event(msgspec.Struct, frozen=True):
    """A watch event: its type, and the object, which is the receiver's own copy."""

    type: EventType
    object: dict[str, Any]

    @property
    def version(self) -> int:
        """The resourceVersion after which a new watch carries on."""
        return int(self.object["metadata"]["resourceVersion"])


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a watch looks at: one kind, one namespace (all if empty), a selector."""

    kind: Kind
    namespace: str = ""
    selector: Selector = Selector()

    def shows(self, obj: dict[str, Any] | None) -> bool:
        """Whether the object is in view; None never is."""
        if obj is None or (self.namespace and obj["metadata"].get("namespace") != self.namespace):
            return False
        return self.selector.matches(obj)

    def event(self, change: Change) -> Event | None:
        """What the change looks like from here; None if it is out of view before and after."""
        if change.kind.key != self.kind.key:
            return None
        before, after = self.shows(change.before), self.shows(change.after)
        if after:
            assert change.after is not None
            return Event(EventType.MODIFIED if before else EventType.ADDED, copied(change.after))
        if not before:
            return None
        assert change.before is not None
        gone = copied(change.before)
        gone["metadata"]["resourceVersion"] = str(change.version)
        return Event(EventType.DELETED, gone)


async def follow(
    log: ChangeLog, view: View, after: int, bookmark_seconds: float | None = None
) -> AsyncGenerator[Event, None]:
    """Events newer than version `after`, for ever, with a BOOKMARK every `bookmark_seconds` (None: without).

    Raises Gone when `after` is not in the log, or the reader is so slow that it falls out of it.
    """
    loop, grown = asyncio.get_running_loop(), asyncio.Event()
    due = None if bookmark_seconds is None else loop.time() + bookmark_seconds
    log.listeners.add(grown.set)
    try:
        while True:
            grown.clear()
            changes = log.after(after)
            for change in changes:
                after = change.version
                event = view.event(change)
                if event is not None:
                    yield event
            if due is not None and bookmark_seconds is not None and loop.time() >= due:
                due = loop.time() + bookmark_seconds
                yield bookmark(view.kind, after)
            elif not changes:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(due):
                        await grown.wait()
    finally:
        log.listeners.discard(grown.set)


def bookmark(kind: Kind, version: int, *, initial_end: bool = False) -> Event:
    """A BOOKMARK: everything up to `version` has been sent; `initial_end` ends the first part of a streamed list."""
    metadata: dict[str, Any] = {"resourceVersion": str(version), "creationTimestamp": None}
    if initial_end:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return Event(EventType.BOOKMARK, {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": metadata})
