"""Who has gone, from what a watch over the living says, however much of it comes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from ipam_daemon.departures import Departures, Gone
from ipam_daemon.live_name import Live
from ipam_daemon.model import decode, encode
from podwire.etcd import EtcdSession, EtcdUnavailable
from podwire.etcd.records import Changes, Deleted, Item, Put, Snapshot, Written

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


class Away:
    """An etcd that does not answer the first `times`, and then has `former`. It sleeps no longer than a task switch."""

    def __init__(self, times: int, former: Item | None = None) -> None:
        self.times = times
        self.former = former
        self.put: list[Put] = []
        self.asked = 0
        self.clock = self

    async def sleep(self, _: float) -> None:
        await asyncio.sleep(0)

    async def get(self, _: str) -> Item | None:
        self.asked += 1
        if self.asked <= self.times:
            raise EtcdUnavailable("away")
        return self.former

    async def txn(self, _: Any, done: Sequence[Put]) -> None:
        self.put += done


def written_by(process: str) -> Item:
    return Item(key="/gone/b", value=encode(Gone(at=1.0, process=process)), mod_revision=7)


AWAY: dict[str, tuple[Away, list[float]]] = {
    "etcd answers": (Away(0), [5.0]),
    "etcd is away for a while": (Away(3), [5.0]),
    "another was first meanwhile": (Away(3, written_by("2")), []),
    "what is there tells of an earlier process": (Away(1, written_by("1")), [5.0]),
}


@pytest.mark.parametrize(("etcd", "written"), AWAY.values(), ids=AWAY.keys())
def test_the_trace_is_written_once_etcd_answers(etcd: Away, written: list[float]) -> None:
    departures = Departures(cast(EtcdSession, etcd), "/")
    asyncio.run(departures._note("b", Gone(at=5.0, process="2")))
    assert [decode(each.value, Gone).at for each in etcd.put] == written


def test_nothing_is_written_of_a_node_that_is_back_before_etcd_is() -> None:
    async def story() -> None:
        etcd = Away(1000)
        departures = Departures(cast(EtcdSession, etcd), "/")
        note = asyncio.ensure_future(departures._note("b", Gone(at=5.0, process="2")))
        while not etcd.asked:  # noqa: ASYNC110  it is another task of this loop
            await asyncio.sleep(0)
        departures._departed(Changes(events=(came("b", "3"),), revision=3), PREFIX)
        await note
        assert (etcd.put, etcd.asked < 1000) == ([], True)

    asyncio.run(story())
