"""What should be, what is, and what is left to do: one type for every diff between a computed state and an applied one.

               desired                 actual
          ┌───────────────┬───────────────┬──────────────┐
          │               │               │              │
          │  to create    │   in both     │  to delete   │
          │               │ equal │ other │              │
          └───────────────┴───────┴───────┴──────────────┘
           └── update ───┘         └ update ┘ └─ deletion ─┘

    pending updates    keys of `desired` whose value in `actual` is missing or another
    pending deletions  keys of `actual` that are not in `desired`

Computing sets `desired`; reading the kernel (or etcd) back sets `actual`; the applier goes through what is pending and
confirms each key with `set_actual` or `drop_actual` once it is done. A key that could not be applied is simply not
confirmed and stays pending, so that a retry needs no list of its own. A resync replaces `actual` as a whole: what
drifted turns up as pending, what did not costs nothing more.

    for key, value in tracker.pending_updates():
        apply(key, value)
        tracker.set_actual(key, value)
    for key in reversed(tracker.pending_deletions()):
        remove(key)
        tracker.drop_actual(key)

Pending keys are kept as they arise: a change costs O(1) and a round costs what is pending, not what exists. Both views
are copies, so that the applier may confirm, and others may change what is desired, while it goes through them. Values
are compared with `==` and must not be changed once they are handed over.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class DeltaTracker(Generic[K, V]):
    """Desired and actual state by key, and the difference. Not for use from several threads."""

    def __init__(self) -> None:
        self._desired: dict[K, V] = {}
        self._actual: dict[K, V] = {}
        self._updates: dict[K, None] = {}  # dicts for their order: first pending, first applied
        self._deletions: dict[K, None] = {}

    @property
    def desired(self) -> Mapping[K, V]:
        """A live, read-only view of what should be."""
        return MappingProxyType(self._desired)

    @property
    def actual(self) -> Mapping[K, V]:
        """A live, read-only view of what is, as far as it was read back or confirmed."""
        return MappingProxyType(self._actual)

    @property
    def in_sync(self) -> bool:
        """True when nothing is pending."""
        return not self._updates and not self._deletions

    def pending_updates(self) -> tuple[tuple[K, V], ...]:
        """Keys and values to create or change, in the order in which they became pending."""
        return tuple((key, self._desired[key]) for key in self._updates)

    def pending_deletions(self) -> tuple[K, ...]:
        """Keys to delete, in the order in which they became pending."""
        return tuple(self._deletions)

    def set_desired(self, key: K, value: V) -> None:
        """`key` should be there with `value`."""
        self._desired[key] = value
        self._compare(key)

    def drop_desired(self, key: K) -> None:
        """`key` should not be there. A key that was not desired is left as it is."""
        if key in self._desired:
            del self._desired[key]
            self._compare(key)

    def replace_desired(self, state: Mapping[K, V]) -> None:
        """`state` is all that should be there."""
        self._replace(self._desired, state)

    def set_actual(self, key: K, value: V) -> None:
        """`key` is there with `value`: the applier confirms an update, or an event says so."""
        self._actual[key] = value
        self._compare(key)

    def drop_actual(self, key: K) -> None:
        """`key` is not there: the applier confirms a deletion, or an event says so."""
        if key in self._actual:
            del self._actual[key]
            self._compare(key)

    def replace_actual(self, state: Mapping[K, V]) -> None:
        """`state` is all that is there: the answer of a resync."""
        self._replace(self._actual, state)

    def _replace(self, side: dict[K, V], state: Mapping[K, V]) -> None:
        gone = [key for key in side if key not in state]
        for key in gone:
            del side[key]
        side.update(state)
        for key in (*gone, *state):
            self._compare(key)

    def _compare(self, key: K) -> None:
        wanted, there = key in self._desired, key in self._actual
        if wanted and not (there and self._desired[key] == self._actual[key]):
            self._updates[key] = None
        else:
            self._updates.pop(key, None)
        if there and not wanted:
            self._deletions[key] = None
        else:
            self._deletions.pop(key, None)
