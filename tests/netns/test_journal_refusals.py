"""The journal refuses one write, where an ADD or a DEL makes one: what is left is mended by whoever comes next."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.netns.node_fixtures import IDLE_28, Engine, engine, play, pods

PROMISES = ("the call says so", "nothing is held after the runtime's DEL, or once reconciled")


def refuse(monkeypatch: pytest.MonkeyPatch, it: Engine, *writes: str) -> None:
    """These writes of the journal fail from now on."""

    def refused(*_: object) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    for write in writes:
        monkeypatch.setattr(it.journal, write, refused)


async def reconciled(it: Engine) -> None:
    await it.reconciler.round()
    await it.reap()


async def deleted(it: Engine) -> None:
    await it.delete("a")
    await it.reap()


def wires_up(it: Engine) -> list[str]:
    """The wires on which something could pass."""
    links = it.node.json("link", "show")
    return [each["ifname"] for each in links if "UP" in each["flags"] and each["ifname"] not in ("lo", "pw0")]


WRITES = {
    "the commit": ("commit",),
    "the commit, and the release of what it leaves": ("commit", "release"),
    "the intent": ("intend",),
}


@pytest.mark.parametrize("mended", [reconciled, deleted])
@pytest.mark.parametrize(
    "writes",
    [
        pytest.param(
            writes, id=name, marks=pytest.mark.fault(f"the journal refuses {name} of an ADD", promises=PROMISES)
        )
        for name, writes in WRITES.items()
    ],
)
def test_an_add_that_cannot_be_journaled_is_none(
    tmp_path: Path, writes: tuple[str, ...], mended: Callable[[Engine], Awaitable[None]]
) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                with pytest.MonkeyPatch.context() as patch:
                    refuse(patch, it, *writes)
                    with pytest.raises(Exception, match="disk is full"):
                        await it.add("a", a.path)
                    assert wires_up(it) == []
                await mended(it)
                assert it.counts()["used"] == it.counts()["releasing"] == 0
                assert it.journal.attachments() == ()
                assert it.node.links() == {"pw0"}
                await it.add("a", a.path)

    play(story)


@pytest.mark.fault("the journal refuses the commit and the undoing of an ADD, which is tried again", promises=PROMISES)
def test_an_add_takes_the_place_of_one_that_could_not_be_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                with pytest.MonkeyPatch.context() as patch:
                    refuse(patch, it, "commit", "release")
                    with pytest.raises(sqlite3.OperationalError):
                        await it.add("a", a.path)
                assert (await it.add("a", a.path))["ips"][0]["address"] == "10.244.1.4/28"
                await it.reap()
                assert it.counts() == {**IDLE_28, "used": 1, "cooling": 1, "free": 10}

    play(story)


@pytest.mark.fault(
    "the journal refuses a DEL", promises=("it fails", "the wire is dead", "the runtime's next DEL frees all")
)
def test_a_del_that_cannot_be_journaled_is_done_by_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                with pytest.MonkeyPatch.context() as patch:
                    refuse(patch, it, "release")
                    with pytest.raises(sqlite3.OperationalError):
                        await it.delete("a")
                assert wires_up(it) == []
                await deleted(it)
                assert it.counts() == {**IDLE_28, "cooling": 1, "free": 11}

    play(story)


def test_what_somebody_wrote_into_the_journal_is_what_counts(tmp_path: Path) -> None:
    """One address is used and has a row which says that its wire is being deleted; one has no row any more."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(3) as (a, b, c):
                for name, pod in (("a", a), ("b", b), ("c", c)):
                    await it.add(name, pod.path)
                rows = {each.key.container_id: each for each in it.journal.attachments()}
                with sqlite3.connect(tmp_path / "journal.db") as other:
                    other.execute("DELETE FROM attachment WHERE container_id IN ('a', 'b')")
                    wire = rows["a"]
                    addresses = ",".join(map(str, wire.addresses))
                    other.execute("INSERT INTO releasing VALUES (?, ?)", (wire.host_ifname, addresses))
                await it.reap()
                assert it.counts() == IDLE_28 | {"used": 1, "cooling": 1, "free": 10}
                it.attachments.addresses.release(rows["b"].addresses)
                it.attachments.addresses.give_back(rows["b"].addresses)
                assert it.counts() == IDLE_28 | {"used": 1, "cooling": 1, "free": 10}

    play(story)
