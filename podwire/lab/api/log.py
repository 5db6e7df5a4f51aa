"""What happened, in order, for those who watch: one entry a write, numbered by the global resourceVersion.

Every write takes the next number and makes exactly one entry, so an entry's place follows from its number and a watch
resumes in constant time. The log is bounded: who asks for an older number is told 410 Gone and lists again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from itertools import islice
from typing import Any

import msgspec

from podwire.lab.api.errors import Gone
from podwire.lab.api.kinds import Kind


class EventType(StrEnum):
    """The types of watch events (meta/v1 WatchEvent)."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One write. `before` is None for a creation, `after` for a removal; both are shared with the store: read only."""

    version: int
    kind: Kind
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ChangeLog:
    """The last `keep` changes. `head` is the newest version given out; listeners are called after every append."""

    def __init__(self, keep: int, first: int = 0) -> None:
        self._changes: deque[Change] = deque(maxlen=keep)
        self.head = first
        self.listeners: set[Callable[[], None]] = set()

    def append(self, kind: Kind, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        """Records the change whose version is `head + 1`."""
        self.head += 1
        self._changes.append(Change(version=self.head, kind=kind, before=before, after=after))
        for listener in tuple(self.listeners):
            listener()

    def after(self, version: int) -> list[Change]:
        """The changes newer than `version`, oldest first.

        Raises Gone when some of them are forgotten, or when `version` was never given out (another lab's, most likely).
        """
        oldest = self.head - len(self._changes)
        if not oldest <= version <= self.head:
            raise Gone(f"too old resource version: {version} ({oldest})")
        return list(islice(self._changes, version - oldest, None))
