"""Wires of ours that the journal does not know: taken in, or deleted when their attachment or address is another's."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ipam_daemon.errors import Exhausted
from tests.netns.node_fixtures import Engine, Netns, block, engine, key, play, pods

SMALL = "10.244.1.0/29"  # four addresses for pods


async def lose(it: Engine, name: str) -> str:
    """The journal loses a row, and the daemon what it made of it. Returns the wire's name."""
    row = it.journal.get(key(name))
    assert row is not None
    it.journal.forget(row.key)
    it.attachments.addresses.recount()
    return row.host_ifname


async def rounds(it: Engine, number: int) -> None:
    for _ in range(number):
        await it.reconciler.round()


async def is_taken_in(it: Engine, a: Netns, b: Netns) -> None:  # noqa: ARG001
    before = it.journal.get(key("a"))
    assert before is not None
    await lose(it, "a")
    await rounds(it, 1)
    assert it.journal.get(key("a")) is None, "one look is not enough"
    await rounds(it, 1)
    after = it.journal.get(key("a"))
    assert after is not None
    assert (after.host_ifname, after.addresses, after.mac) == (before.host_ifname, before.addresses, before.mac)
    assert it.counts()["used"] == 1
    assert a.pings("10.244.1.1")
    await it.delete("a")


async def loses_to_another_pod_with_its_address(it: Engine, a: Netns, b: Netns) -> None:
    name = await lose(it, "a")
    while (await it.add("b", b.path))["ips"][0]["address"] != "10.244.1.3/29":  # addresses rotate
        await it.delete("b")
        await it.reap()
        it.now += 3600
    await rounds(it, 2)
    await it.reap()
    assert name not in it.node.links()
    assert it.counts()["used"] == 1
    assert it.counts()["cooling"] == 0, "its deletion frees nothing: the address is another's"
    assert b.pings("10.244.1.1")
    assert not a.pings("10.244.1.1", 1)
    await it.delete("b")


async def loses_to_the_newer_wire_of_its_attachment(it: Engine, a: Netns, b: Netns) -> None:  # noqa: ARG001
    name = await lose(it, "a")
    await it.add("a", b.path)
    await rounds(it, 2)
    await it.reap()
    assert name not in it.node.links()
    assert b.pings("10.244.1.1")
    await it.delete("a")


async def is_not_revived_after_its_del(it: Engine, a: Netns, b: Netns) -> None:  # noqa: ARG001
    name = await lose(it, "a")
    await it.delete("a")
    await rounds(it, 2)
    await it.reap()
    assert name not in it.node.links()
    assert it.journal.attachments() == ()


async def keeps_its_address_under_another_name(it: Engine, a: Netns, b: Netns) -> None:  # noqa: ARG001
    row = it.journal.get(key("a"))
    assert row is not None
    it.node.ip("link", "set", row.host_ifname, "down")
    it.node.ip("link", "set", row.host_ifname, "name", "mine", "up")
    await rounds(it, 3)
    assert it.journal.get(key("a")) == row
    assert row.host_ifname in it.node.links()
    assert it.counts()["used"] == 1
    assert a.pings("10.244.1.1")
    await it.delete("a")


async def is_cut_off_when_its_block_is_not_this_nodes(it: Engine, a: Netns, b: Netns) -> None:
    await lose(it, "a")
    it.attachments.addresses.use_blocks([block(ipaddress.ip_network("10.244.9.0/29"))])
    await rounds(it, 2)
    assert it.attachments.fenced == 1
    assert not a.pings("10.244.1.1", 1)
    with pytest.raises(Exception, match="went to another node"):
        await it.add("b", b.path)
    await it.delete("a")
    assert it.attachments.fenced == 0


Story = Callable[[Engine, Netns, Netns], Awaitable[None]]
STORIES: tuple[Story, ...] = (
    is_taken_in,
    loses_to_another_pod_with_its_address,
    loses_to_the_newer_wire_of_its_attachment,
    is_not_revived_after_its_del,
    keeps_its_address_under_another_name,
    is_cut_off_when_its_block_is_not_this_nodes,
)


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_wire_that_the_journal_does_not_know(tmp_path: Path, story: Story) -> None:
    async def whole() -> None:
        async with engine(tmp_path, SMALL) as it:
            with pods(2) as (a, b):
                await it.add("a", a.path)
                await story(it, a, b)
                await it.reap()
                assert it.node.links() == {"pw0"}

    play(whole)


def test_a_dead_wire_that_left_its_group_is_killed_again(tmp_path: Path) -> None:
    """Its address is nobody's until it is gone, however often it is looked at."""

    async def story() -> None:
        async with engine(tmp_path, SMALL) as it:
            with pods(5) as namespaces:
                for number, pod in enumerate(namespaces[:4]):
                    await it.add(f"c{number}", pod.path)
                row = it.journal.get(key("c0"))
                assert row is not None
                await it.delete("c0")
                it.node.ip("link", "set", row.host_ifname, "group", "default")
                assert await it.attachments.reaper.reap()
                with pytest.raises(Exhausted):
                    await it.add("late", namespaces[4].path)
                await it.reap()
                assert (await it.add("late", namespaces[4].path))["ips"][0]["address"] == "10.244.1.3/29"

    play(story)
