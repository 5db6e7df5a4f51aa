"""The records under nodes/ as a watch tells of them, and what is kept of those that a restored etcd has lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec

from ipam_daemon.claims import RecordDamaged, keep_former
from ipam_daemon.model import NodeRecord, decode
from podwire.etcd.records import Changes, Deleted, Item, Snapshot

log = logging.getLogger(__name__)


T = TypeVar("T")


def decoded(item: Item, kind: type[T]) -> T:
    """The record in `item`. Raises RecordDamaged naming the key."""
    try:
        return decode(item.value, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordDamaged(f"etcd key {item.key} cannot be read ({error}): mend or delete it") from error


class NodeList:
    """What cannot be read is not in the list, and is logged once. `changed` is set when there is something new to tell.

    `own` is this node's name: its own record is never kept when etcd has lost it, so that the node sees that and says
    again who it is.
    """

    def __init__(self, prefix: str, own: str = "") -> None:
        self.prefix = prefix
        self.changed = asyncio.Event()
        self._own = own
        self._known: dict[str, NodeRecord] = {}
        self._former: Mapping[str, NodeRecord] = {}
        self._damaged: set[str] = set()
        self._broken = False

    def mapping(self) -> Mapping[str, NodeRecord]:
        """All nodes by name; what is handed out does not change.

        A node whose record did not change is the same object each time, which is how a change is found among thousands.
        """
        former = keep_former(self._former, self._known) if self._former else {}
        return MappingProxyType({**former, **self._known})

    def history_broke(self, _: str = "") -> None:
        """etcd was wiped or restored: what the next snapshot lacks was lost, and is not gone."""
        self._broken = True
        self.changed.set()

    def take(self, batch: Snapshot | Changes) -> None:
        """What the watch has brought."""
        if isinstance(batch, Snapshot):
            self._replace(batch.items)
        else:
            for event in batch.events:
                if isinstance(event, Deleted):
                    self._drop(event.key)
                else:
                    self._set(event.item)
        self.changed.set()

    def _replace(self, items: Iterable[Item]) -> None:
        former = {**self._former, **self._known} if self._broken else self._former
        self._broken = False
        names = {item.key.removeprefix(self.prefix) for item in items}
        for name in (self._known.keys() | self._damaged) - names:
            self._drop(self.prefix + name)
        for item in items:
            self._set(item)
        self._former = {name: record for name, record in former.items() if name not in (names | {self._own})}

    def _set(self, item: Item) -> None:
        name = item.key.removeprefix(self.prefix)
        try:
            record = decoded(item, NodeRecord)
            if record.name != name:
                raise RecordDamaged(f"it is the record of {record.name!r}")
        except RecordDamaged as error:
            if name not in self._damaged:
                log.error("node record %r is skipped: %s", name, error, extra={"fields": {"node": name}})
            self._damaged.add(name)
            self._known.pop(name, None)
        else:
            self._damaged.discard(name)
            if self._known.get(name) != record:  # a snapshot brings all again
                self._known[name] = record

    def _drop(self, key: str) -> None:
        name = key.removeprefix(self.prefix)
        self._known.pop(name, None)
        self._former = {other: record for other, record in self._former.items() if other != name}
        self._damaged.discard(name)
