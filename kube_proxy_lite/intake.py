"""Batches of objects, taken in where they belong, and when everything that there is has been said.

A run before that would take for removed what only has not been read yet, so `complete` says when the first may be. It
stays so: an API that is away is silent, and everybody goes on with what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

from podwire.kube.kinds import Key, Kind, Wanted
from podwire.kube.source import Batch, Source

Door = tuple[Callable[[Any], None], Callable[[Key], None]]
"""What takes an object that is new or has changed, and what takes the key of one that is gone."""


class Intake:
    """The doors by kind. `changed` is called after each batch once all kinds are complete."""

    def __init__(self, doors: Mapping[str, Door], changed: Callable[[], None]) -> None:
        """`doors` has the kinds' resource names, as `Kind.resource` says them."""
        self._doors = dict(doors)
        self._awaited = set(doors)
        self._changed = changed

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
        if batch.synced:
            self._awaited.discard(batch.kind.resource)
        if self.complete:
            self._changed()

    async def follow(self, source: Source, wanted: Wanted[Any]) -> None:
        """Takes what `source` says of one kind, until cancelled."""
        async with aclosing(source.follow(wanted)) as batches:
            async for batch in batches:
                self.take(batch)


def door(kind: Kind[Any], setter: Callable[[Any], None], dropper: Callable[[Key], None]) -> tuple[str, Door]:
    """An item of Intake's `doors`."""
    return kind.resource, (setter, dropper)
