"""ADD, DEL, CHECK and GC against real wires: what the runtime is told, what the journal says, what the kernel has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ipam_daemon.errors import (
    CniError,
    DeletedMeanwhile,
    Exhausted,
    InterfaceExists,
    InvalidNetns,
    TryAgainLater,
)
from ipam_daemon.identity import boottime_ns
from ipam_daemon.model import AttachmentState
from tests.netns.node_fixtures import (
    COOLDOWN,
    IDLE_28,
    Engine,
    Netns,
    engine,
    hold,
    key,
    play,
    pods,
    settle,
)


def nothing_is_there(it: Engine, pod: Netns | None = None) -> None:
    """No address, no row, no wire."""
    assert it.counts() == IDLE_28
    assert it.journal.attachments() == ()
    assert it.journal.releasing() == ()
    assert it.node.links() == {"pw0"}
    assert pod is None or "eth0" not in pod.links()


# --- ADD ----------------------------------------------------------------------------------------------------------


def test_an_added_pod_has_its_address_its_route_and_its_neighbours(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (a, b):
                result = await it.add("a", a.path)
                await it.add("b", b.path)
                assert result["ips"] == [{"interface": 1, "address": "10.244.1.3/28", "gateway": "10.244.1.1"}]
                (eth0,) = a.json("addr", "show", "dev", "eth0")
                assert eth0["address"] == result["interfaces"][1]["mac"] == "0a:58:0a:f4:01:03"
                (ipv4,) = [each for each in eth0["addr_info"] if each["family"] == "inet"]
                assert (ipv4["local"], ipv4["prefixlen"]) == ("10.244.1.3", 28)
                assert [each["gateway"] for each in a.json("route", "show", "default")] == ["10.244.1.1"]
                assert a.pings("10.244.1.1")
                assert a.pings("10.244.1.4")
                assert {each.state for each in it.journal.attachments()} == {AttachmentState.ATTACHED}

    play(story)


def test_a_pod_reaches_itself_by_way_of_the_bridge(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                (port,) = it.node.json("link", "show", "dev", host)
                assert port["linkinfo"]["info_slave_data"]["hairpin"] is True

    play(story)


def test_what_the_pod_was_told_is_what_status_tools_see(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                result = await it.add("a", a.path)
                journaled = it.journal.get(key("a"))
                assert journaled is not None
                assert journaled.host_ifname == result["interfaces"][0]["name"]
                assert [str(each) for each in journaled.addresses] == [each["address"] for each in result["ips"]]
                assert journaled.pod.name == "a"

    play(story)


def a_fifo(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def an_ordinary_file(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("not a namespace")
    return str(tmp_path / "file")


BAD_NAMESPACES: dict[str, Callable[[Path], str]] = {
    "nothing is there": lambda tmp_path: str(tmp_path / "absent"),
    "a FIFO, which must not be waited for": a_fifo,
    "an ordinary file": an_ordinary_file,
    "a folder": str,
    "a device": lambda _: "/dev/zero",
    "another kind of namespace": lambda _: "/proc/self/ns/uts",
    "a path that no file can have": lambda _: "/run/netns/a\0b",
    "a path through a file": lambda _: "/etc/hostname/netns",
}


@pytest.mark.parametrize("make", BAD_NAMESPACES.values(), ids=BAD_NAMESPACES.keys())
def test_a_path_that_is_no_container_namespace_is_refused(tmp_path: Path, make: Callable[[Path], str]) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pytest.raises(InvalidNetns, match="CNI_NETNS"):
                await it.add("a", make(tmp_path))
            nothing_is_there(it)

    play(story)


def test_the_nodes_own_namespace_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pytest.raises(InvalidNetns, match="own network namespace"):
                await it.add("a", it.node.path)
            nothing_is_there(it)

    play(story)


def test_an_interface_that_exists_is_not_taken_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                a.ip("link", "add", "eth0", "type", "veth", "peer", "name", "foreign")
                with pytest.raises(InterfaceExists, match="CNI_IFNAME"):
                    await it.add("a", a.path)
                assert a.links() == {"eth0", "foreign"}
                nothing_is_there(it)

    play(story)


def test_a_wire_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    """A default route of somebody else makes the last step in the pod fail."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                a.ip("link", "add", "other", "type", "veth", "peer", "name", "foreign")
                a.ip("addr", "add", "192.0.2.1/24", "dev", "other")
                a.ip("link", "set", "other", "up")
                a.ip("route", "add", "default", "via", "192.0.2.2")
                with pytest.raises(InterfaceExists, match="has a default route already"):
                    await it.add("a", a.path)
                nothing_is_there(it, a)

    play(story)


def test_a_name_that_the_kernel_would_complete_is_refused(tmp_path: Path) -> None:
    """To the kernel `eth%d` is a pattern: it would make eth0."""

    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                with pytest.raises(CniError):
                    await it.add("a", a.path, ifname="eth%d")
                assert a.links() == set()
                nothing_is_there(it, a)

    play(story)


def test_without_a_bridge_the_add_is_to_be_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            it.node.ip("link", "del", "pw0")
            with pods(1) as (a,):
                with pytest.raises(TryAgainLater, match="pw0"):
                    await it.add("a", a.path)
                assert it.counts() == IDLE_28
                assert it.node.links() == set()

    play(story)


def test_a_second_add_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                with pytest.raises(InterfaceExists, match=r"10\.244\.1\.3"):
                    await it.add("a", a.path)
                assert a.pings("10.244.1.1")
                assert it.counts()["used"] == 1

    play(story)


def test_of_two_adds_at_once_one_succeeds(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                got = await asyncio.gather(it.add("a", a.path), it.add("a", a.path), return_exceptions=True)
                assert sorted(type(each).__name__ for each in got) == ["InterfaceExists", "dict"]
                assert it.counts()["used"] == 1
                assert a.pings("10.244.1.1")

    play(story)


def test_many_adds_at_once_get_an_address_each_and_give_it_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(10) as namespaces:
                got = await asyncio.gather(*(it.add(f"c{i}", pod.path) for i, pod in enumerate(namespaces)))
                assert len({each["ips"][0]["address"] for each in got}) == 10
                await asyncio.gather(*(it.delete(f"c{i}") for i in range(10)))
                await it.reap()
                assert it.node.links() == {"pw0"}
                assert it.counts() == {**IDLE_28, "cooling": 10, "free": 2}

    play(story)


def test_before_the_mtu_is_known_the_add_is_to_be_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            it.attachments.mtu = 0
            it.attachments.waiting_for = "etcd does not answer"
            with pods(1) as (a,), pytest.raises(TryAgainLater, match="etcd does not answer"):
                await it.add("a", a.path)

    play(story)


# --- DEL ----------------------------------------------------------------------------------------------------------


def test_when_del_answers_the_wire_is_dead(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                host = (await it.add("a", a.path))["interfaces"][0]["name"]
                assert it.node.pings("10.244.1.3")
                await it.delete("a")
                (link,) = it.node.json("link", "show", "dev", host)
                assert "UP" not in link["flags"]
                assert "master" not in link
                assert not it.node.pings("10.244.1.3", 1)
                assert it.counts()["releasing"] == 1
                await it.reap()
                assert a.links() == set()
                assert it.counts()["cooling"] == 1

    play(story)


DELETED_ANYWAY: dict[str, Callable[[Netns], object]] = {
    "the namespace went before the DEL": lambda pod: pod.delete(),
    "somebody deleted the pod's end": lambda pod: pod.ip("link", "del", "eth0"),
    "somebody renamed the pod's end": lambda pod: pod.ip("link", "set", "eth0", "down", "name", "other"),
}


@pytest.mark.parametrize("happens", DELETED_ANYWAY.values(), ids=DELETED_ANYWAY.keys())
def test_a_del_succeeds_whatever_became_of_the_wire(tmp_path: Path, happens: Callable[[Netns], object]) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                happens(a)
                await it.delete("a")
                await it.delete("a")
                await it.reap()
                assert it.node.links() == {"pw0"}
                assert it.counts() == {**IDLE_28, "cooling": 1, "free": 11}

    play(story)


def test_a_del_of_what_never_was_succeeds(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            await it.delete("never")
            nothing_is_there(it)

    play(story)


def test_a_del_of_another_interface_leaves_the_pod_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                await it.delete("a", ifname="net1")
                assert a.pings("10.244.1.1")

    play(story)


def test_a_del_that_crosses_an_add_in_flight_wins(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                goes_on = await hold(it.node)
                adding = asyncio.ensure_future(it.add("a", a.path))
                await settle()
                assert it.counts()["used"] == 1, "the ADD must be in flight"
                deleting = asyncio.ensure_future(it.delete("a"))
                await settle()
                goes_on.set()
                with pytest.raises(DeletedMeanwhile):
                    await adding
                await deleting
                await it.reap()
                assert it.journal.attachments() == ()
                assert a.links() == set()

    play(story)


def test_an_add_that_arrives_after_its_del_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                issued = boottime_ns()
                await it.delete("a")
                with pytest.raises(DeletedMeanwhile):
                    await it.add("a", a.path, issued_ns=issued)
                nothing_is_there(it, a)

    play(story)


def test_an_add_issued_after_a_del_that_is_still_under_way_succeeds(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(2) as (old, new):
                await it.add("a", old.path)
                goes_on = await hold(it.node)
                deleting = asyncio.ensure_future(it.delete("a"))
                await settle()
                adding = asyncio.ensure_future(it.add("a", new.path))
                await settle()
                goes_on.set()
                await deleting
                assert (await adding)["ips"][0]["address"] == "10.244.1.4/28"
                await it.reap()
                assert new.pings("10.244.1.1")
                assert old.links() == set()

    play(story)


def test_a_del_that_was_queued_before_the_add_leaves_the_new_pod_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                before = boottime_ns()
                await it.add("a", a.path)
                await it.delete("a", issued_ns=before)
                assert a.pings("10.244.1.1")

    play(story)


def test_calls_for_one_attachment_leave_no_lock_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await asyncio.gather(*(it.add("a", a.path) for _ in range(3)), return_exceptions=True)
                await asyncio.gather(*(it.delete("a") for _ in range(3)))
                assert it.attachments.in_flight == frozenset()

    play(story)


# --- addresses ----------------------------------------------------------------------------------------------------


def test_addresses_rotate_and_a_freed_one_cools(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            with pods(1) as (a,):
                seen = []
                for _ in range(4):
                    seen.append((await it.add("a", a.path))["ips"][0]["address"])
                    await it.delete("a")
                    await it.reap()
                assert seen == [f"10.244.1.{n}/29" for n in (3, 4, 5, 6)]
                assert it.counts()["cooling"] == 4
                reused = (await it.add("a", a.path))["ips"][0]["address"]
                assert reused == "10.244.1.3/29", "oldest first, before its time"
                it.now += COOLDOWN
                assert it.counts() == {"used": 1, "releasing": 0, "cooling": 0, "reserved": 4, "free": 3}

    play(story)


def test_exhaustion_says_how_the_pool_is_used(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            with pods(5) as namespaces:
                for number, pod in enumerate(namespaces[:4]):
                    await it.add(f"c{number}", pod.path)
                await it.delete("c0")
                with pytest.raises(Exhausted) as caught:
                    await it.add("c4", namespaces[4].path)
                assert caught.value.code == 100
                assert "pool default" in str(caught.value)
                assert "10.244.1.0/29: 3 used, 1 releasing, 0 cooling, 4 reserved" in str(caught.value)
                assert it.journal.get(key("c4")) is None

    play(story)


def test_a_releasing_address_is_not_given_even_when_nothing_else_is_there(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            with pods(5) as namespaces:
                for number, pod in enumerate(namespaces[:4]):
                    await it.add(f"c{number}", pod.path)
                await it.delete("c0")
                with pytest.raises(Exhausted):
                    await it.add("c4", namespaces[4].path)
                await it.reap()
                assert (await it.add("c4", namespaces[4].path))["ips"][0]["address"] == "10.244.1.3/29"

    play(story)


def test_killed_wires_are_reaped_as_a_group_and_living_ones_stay(tmp_path: Path) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(4) as namespaces:
                for number, pod in enumerate(namespaces):
                    await it.add(f"c{number}", pod.path)
                for number in range(3):
                    await it.delete(f"c{number}")
                assert len(it.node.links()) == 5
                await it.reap()
                assert len(it.node.links()) == 2
                assert namespaces[3].pings("10.244.1.1")
                assert it.journal.releasing() == ()

    play(story)
