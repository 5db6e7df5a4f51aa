"""How far the store has come, and whether it is still the one that we knew.

etcd never takes back a revision that it has confirmed. So an answer that had to be current (a linearizable read, a
write) and has another cluster id, or a lower revision than was known when the request was sent, comes from an etcd
that was wiped, replaced, or restored from a backup: its history breaks. Answers to requests sent before that moment are
still under way then, from either side; a mark taken when a request is sent tells them apart.

Not every break shows in a revision: an etcd that was restored may have overtaken the old one before we look. Who knows
keys that it has lost says so itself (`broken`).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from podwire.etcd.records import Header


class Mark(msgspec.Struct, frozen=True):
    """What was known when a request was sent."""

    breaks: int
    seen: Header | None


class History:
    """Of one session. `seen` is the newest that etcd has confirmed, `breaks` counts, `reason` tells of the last."""

    def __init__(self) -> None:
        self.seen: Header | None = None
        self.breaks = 0
        self.reason = ""
        self._listeners: list[Callable[[str], None]] = []

    def recall(self, seen: Header) -> None:
        """What an earlier process had seen. Only before the first answer; later it says nothing new."""
        if self.seen is None:
            self.seen = seen

    def on_break(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """`listener(reason)` is called at each break; it must return at once and not raise. Returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def mark(self) -> Mark:
        return Mark(self.breaks, self.seen)

    def heard(self, header: Header, since: Mark, *, current: bool) -> None:
        """An answer has come to a request sent at `since`; `current`: it may not be older than what was known then."""
        if since.breaks != self.breaks:
            return
        known = since.seen
        if known is not None and header.cluster_id != known.cluster_id:
            self._break(header, "it is another cluster")
        elif known is not None and current and header.revision < known.revision:
            self._break(header, f"its revision went back from {known.revision} to {header.revision}")
        elif self.seen is None or header.revision > self.seen.revision:
            self.seen = header

    def broken(self, reason: str) -> None:
        """Somebody has found a key gone, or older than it was written."""
        self._break(self.seen, reason)

    def _break(self, header: Header | None, reason: str) -> None:
        self.seen = header
        self.breaks += 1
        self.reason = reason
        for listener in tuple(self._listeners):
            listener(reason)
