"""Batches of objects, taken in where they belong, and when everything that there is has been said.

A run before that would take for removed what only has not been read yet, so `complete` says when the first may be. It
stays so: an API that is away is silent, and everybody goes on with what is known.

A kind that is of use but can be done without (`spared`) is waited for when all others are complete, and then for
`patience` seconds only: a role that does not allow to read it must not leave the node without rules.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import aclosing
from typing import Any

from podwire.kube.kinds import Key, Kind, Wanted
from podwire.kube.source import Batch, Source

log = logging.getLogger(__name__)
Door = tuple[Callable[[Any], None], Callable[[Key], None]]
"""What takes an object that is new or has changed, and what takes the key of one that is gone."""


class Intake:
    """The doors by kind. `changed` is called after each batch once all kinds are complete."""

    def __init__(
        self,
        doors: Mapping[str, Door],
        changed: Callable[[], None],
        *,
        spared: Collection[str] = (),
        patience: float = 5.0,
        noted: Callable[[str, int], None] = lambda _resource, _objects: None,
        unreadable: Mapping[str, Callable[[Key], None]] | None = None,
    ) -> None:
        """`doors` has the kinds' resource names, as `Kind.resource` says them. `noted` is told how many objects of a
        kind have come or gone; `unreadable` of kinds whose objects count even where they cannot be decoded."""
        self._doors = dict(doors)
        self._awaited = set(doors)
        self._changed = changed
        self._spared = frozenset(spared)
        self._patience = patience
        self._noted = noted
        self._unreadable = dict(unreadable or {})
        self._impatient: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        """Whether every kind has said what there is."""
        return not self._awaited

    def take(self, batch: Batch[Any]) -> None:
        """Takes a batch in."""
        setter, dropper = self._doors[batch.kind.resource]
        for key in batch.deletes:
            dropper(key)
        for obj in batch.upserts:
            setter(obj)
        closer = self._unreadable.get(batch.kind.resource)
        for one in batch.skipped if closer else ():
            if one.key is not None and closer is not None:
                closer(one.key)
        self._noted(batch.kind.resource, len(batch.deletes) + len(batch.upserts))
        if batch.synced:
            self._awaited.discard(batch.kind.resource)
        if self.complete:
            self._changed()
        elif self._awaited <= self._spared and self._impatient is None:
            self._impatient = asyncio.get_running_loop().call_later(self._patience, self._spare)

    def _spare(self) -> None:
        if self._awaited:
            log.warning("going on without %s, of which the API says nothing", ", ".join(sorted(self._awaited)))
            self._awaited.clear()
            self._changed()

    async def follow(self, source: Source, wanted: Wanted[Any]) -> None:
        """Takes what `source` says of one kind, until cancelled."""
        async with aclosing(source.follow(wanted)) as batches:
            async for batch in batches:
                self.take(batch)


def door(kind: Kind[Any], setter: Callable[[Any], None], dropper: Callable[[Key], None]) -> tuple[str, Door]:
    """An item of Intake's `doors`."""
    return kind.resource, (setter, dropper)
