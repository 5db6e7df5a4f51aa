"""Who has gone, from what a watch over the living says, however much of it comes at once."""

from __future__ import annotations

from typing import Any

import pytest

from ipam_daemon.departures import Departures
from ipam_daemon.live_name import Live
from ipam_daemon.model import encode
from podwire.etcd.records import Changes, Deleted, Item, Snapshot, Written

PREFIX = "/live/"


def came(name: str, process: str) -> Written:
    value = encode(Live(node_id=f"id-{name}", process=process))
    return Written(Item(key=f"{PREFIX}{name}", value=value, mod_revision=1))


def went(name: str) -> Deleted:
    return Deleted(key=f"{PREFIX}{name}")


STORIES: dict[str, tuple[tuple[Written | Deleted, ...], list[tuple[str, str]]]] = {
    "one of the first list goes": ((went("a"),), [("a", "1")]),
    "one comes and stays": ((came("b", "2"),), []),
    "one comes and goes": ((came("b", "2"), went("b")), [("b", "2")]),
    "one goes and comes back": ((went("a"), came("a", "2")), []),
    "one goes, comes back and goes": ((went("a"), came("a", "2"), went("a")), [("a", "2")]),
    "one that nobody knew goes": ((went("c"),), []),
}


@pytest.mark.parametrize(("events", "expected"), STORIES.values(), ids=STORIES.keys())
def test_who_has_gone(events: tuple[Written | Deleted, ...], expected: list[tuple[str, str]]) -> None:
    nobody: Any = None
    departures = Departures(nobody, "/")
    departures._departed(Snapshot(items=(came("a", "1").item,), revision=1), PREFIX)
    assert departures._departed(Changes(events=events, revision=2), PREFIX) == expected
