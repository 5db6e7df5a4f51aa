"""Lists and watches of one kind, made into batches: bytes in, batches out, and no input or output of its own.

                 ┌──────────── begin ────────────┐
                 ▼                               │ expired · garbled · a version that goes back
    chunked list: page, page, …, last page ──▶ version ──▶ watch: events ──▶ version ──▶ watch …
    streamed list: a watch whose events begin          ▲
    with everything, up to a marked bookmark ──────────┘

Where a watch carries on (`version`) moves with the events and bookmarks that were read whole, so a connection may break
anywhere: what comes again is known by its version and passed over, what did not come is asked for again. A line that
cannot be read at all may have been a deletion; after it, as after 410, all is listed and compared (known.py).

`feed` and `page` return a batch for everything that they have understood, also when something went wrong halfway;
`failure` then says what, and nothing more may be fed before the next `begin` or `watch`.
"""

from __future__ import annotations

from typing import Generic

from podwire.kube.decode import Bookmark, Broken, Event, Failure, Gone, Page, Reader, Written
from podwire.kube.errors import Expired, Garbled, NotStreamed
from podwire.kube.kinds import Key, T, Wanted
from podwire.kube.known import Known
from podwire.kube.lines import LONGEST, LineSplitter
from podwire.kube.source import Batch, Skipped

_EXPIRED = 410


class Follower(Generic[T]):
    """The state of following one selection. `synced`: a first list is complete. `failure`: see the module."""

    def __init__(self, wanted: Wanted[T], longest_line: int = LONGEST) -> None:
        self.wanted = wanted
        self.known = Known()
        self.synced = False
        self.failure: Expired | Garbled | NotStreamed | None = None
        self._reader = Reader(wanted.kind)
        self._longest = longest_line
        self._lines = LineSplitter(longest_line)
        self._changes: dict[Key, T | None] = {}
        self._skipped: list[Skipped] = []

    @property
    def version(self) -> str:
        """Where a watch carries on; empty when a list must come first."""
        return "" if self.known.listing else self.known.version

    def begin(self) -> None:
        """A list begins, chunked or streamed."""
        self.known.begin()
        self.watch()

    def watch(self) -> None:
        """A connection begins: bytes of the one before are dropped."""
        self._lines = LineSplitter(self._longest)
        self.failure = None

    def lose(self) -> None:
        """The thread is lost: the next thing must be a list."""
        self.known.version = ""

    def page(self, body: bytes | bytearray) -> tuple[Batch[T] | None, str]:
        """The batch of one page, and the token of the next; the last page has none. Raises Garbled, Expired."""
        page: Page[T] = self._reader.page(body)
        if not page.version:
            raise Garbled("a list without a resourceVersion")
        self._check_history(page.version)
        for item in page.items:
            self._item(item)
        if not page.token:
            return self._complete(page.version), ""
        return self._batch(), page.token

    def feed(self, data: bytes) -> Batch[T] | None:
        """The batch of what bytes of a watch complete; None when there is nothing to tell."""
        said = None
        try:
            for line in self._lines.feed(data):
                said = self._event(self._reader.event(line)) or said
        except (Garbled, Expired, NotStreamed) as error:
            self.failure = error
        if said is not None:  # the end of a streamed list: what it found gone is news, and so is that it is complete
            return self._batch() or said
        return self._batch()

    def absent(self) -> Batch[T]:
        """The server does not have the kind: there are no objects."""
        self.known.begin()
        batch = self._complete("")
        assert batch is not None
        return batch

    def _event(self, event: Event[T]) -> Batch[T] | None:
        match event:
            case Written(obj):
                self._advance(obj.metadata.resource_version)
                self._item(obj)
            case Gone(key, version):
                self._advance(version)
                if self.known.gone(key):
                    self._changes[key] = None
            case Broken():
                self._advance(event.version)
                self._item(event)
            case Bookmark(version, ends_list):
                if ends_list and self.known.listing:
                    if not version:
                        raise Garbled("the end of a streamed list without a resourceVersion")
                    self._check_history(version)
                    return self._mark(version)
                if self.known.listing:  # only a server that does not know streamed lists sends one before the mark
                    raise NotStreamed("a bookmark before the end of the list")
                self._advance(version)
            case Failure(code, message):
                raise Expired(message, code) if code == _EXPIRED else Garbled(f"the server ended the watch: {message}")
        return None

    def _item(self, item: T | Broken) -> None:
        if isinstance(item, Broken):
            if item.key is not None:
                self.known.broken(item.key)
            self._skipped.append(Skipped(key=item.key, reason=item.reason))
        elif self.known.written(item.key, item.metadata.resource_version):
            self._changes[item.key] = item

    def _advance(self, version: str) -> None:
        """A streamed list is in no order, so only what comes after it moves the version."""
        if self.known.listing or not version:
            return
        self._check_history(version)
        self.known.advance(version)

    def _check_history(self, version: str) -> None:
        if self.known.goes_back(version):
            before = self.known.reached
            self.known.forget()
            raise Expired(f"resourceVersion went back from {before} to {version}: restored, or another cluster", 410)

    def _mark(self, version: str) -> Batch[T]:
        for key in self.known.finish(version):
            self._changes[key] = None
        self.synced = True
        return Batch(kind=self.wanted.kind, synced=True)

    def _complete(self, version: str) -> Batch[T]:
        nothing = self._mark(version)
        return self._batch() or nothing

    def _batch(self) -> Batch[T] | None:
        if not self._changes and not self._skipped:
            return None
        changes, self._changes = self._changes, {}
        skipped, self._skipped = self._skipped, []
        return Batch(
            kind=self.wanted.kind,
            upserts=tuple(obj for obj in changes.values() if obj is not None),
            deletes=tuple(key for key, obj in changes.items() if obj is None),
            skipped=tuple(skipped),
            synced=self.synced,
        )
