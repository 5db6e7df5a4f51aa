"""The small parts of podwire-proxy: what comes in, who keeps up, drift, causes, the node's addresses and limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kube_proxy_lite.apply import addresses
from kube_proxy_lite.apply.sysctls import set_conntrack, wanted
from kube_proxy_lite.drift import Drift
from kube_proxy_lite.health import Keeping
from kube_proxy_lite.intake import Intake, door
from kube_proxy_lite.programming import ANNOTATION, TriggerTimes
from kube_proxy_lite.settings import ConntrackOptions
from podwire.kube.kinds import ENDPOINT_SLICES, SERVICE_CIDRS, SERVICES, Kind
from podwire.kube.objects import EndpointSlice, Node
from podwire.kube.source import Batch
from podwire.runner import Runner
from tests.unit.service_objects import node, service, slice_of
from tests.unit.test_runner import play


class Intakes:
    """Two kinds that are needed, and one that can be done without; what they have said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.runs = 0
        self.noted: list[tuple[str, int]] = []
        kinds: Iterable[Kind[Any]] = (SERVICES, ENDPOINT_SLICES, SERVICE_CIDRS)
        self.intake = Intake(
            dict(door(kind, lambda obj: self.said.append(f"+{obj.metadata.name}"),
                      lambda key: self.said.append(f"-{key[1]}")) for kind in kinds),
            self.changed, spared=(SERVICE_CIDRS.resource,), patience=5.0,
            noted=lambda resource, objects: self.noted.append((resource, objects)),
        )  # fmt: skip

    def changed(self) -> None:
        self.runs += 1

    def take(
        self, kind: Kind[Any], *upserts: Any, deletes: tuple[tuple[str, str], ...] = (), synced: bool = True
    ) -> None:
        self.intake.take(Batch(kind=kind, upserts=upserts, deletes=deletes, synced=synced))


def test_nothing_is_changed_before_everybody_has_said_what_there_is() -> None:
    async def story() -> None:
        made = Intakes()
        made.take(SERVICES, service("a"), synced=False)
        made.take(SERVICES, service("b"))
        made.take(SERVICE_CIDRS)
        assert (made.runs, made.intake.complete) == (0, False)
        made.take(ENDPOINT_SLICES, slice_of("1"))
        assert (made.runs, made.intake.complete) == (1, True)
        made.take(SERVICES, service("c"), deletes=(("default", "a"),))
        assert made.runs == 2
        assert made.said == ["+a", "+b", "+web-1", "-a", "+c"]
        assert made.noted[-1] == ("services", 2)

    play(story)


def test_what_can_be_done_without_is_waited_for_but_not_for_ever() -> None:
    async def story() -> None:
        made = Intakes()
        made.take(SERVICES)
        await asyncio.sleep(60)
        assert not made.intake.complete, "the others are waited for"
        made.take(ENDPOINT_SLICES)
        await asyncio.sleep(4)
        assert made.runs == 0
        await asyncio.sleep(2)
        assert (made.runs, made.intake.complete) == (1, True)
        made.take(SERVICE_CIDRS)
        assert made.runs == 2

    play(story)


def test_what_can_be_done_without_and_comes_in_time_is_not_done_without() -> None:
    async def story() -> None:
        made = Intakes()
        for kind in (SERVICES, ENDPOINT_SLICES, SERVICE_CIDRS):
            made.take(kind)
        await asyncio.sleep(60)
        assert made.runs == 1

    play(story)


# --- drift ----------------------------------------------------------------------------------------------------------


class Drifting:
    """A runner, and when it looked at everything."""

    def __init__(self) -> None:
        self.looks: list[float] = []
        self.noted = 0
        self.runner = Runner("test", self.run, max_interval=1e6)
        self.drift = Drift(self.runner, self.note, most=30.0, quiet=10.0)

    def note(self) -> None:
        self.noted += 1

    async def run(self, resync: bool) -> None:
        if resync:
            self.looks.append(asyncio.get_running_loop().time())

    async def during(self, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(self.runner.run_forever())
        await story()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_drift_is_answered_at_once_and_then_ever_more_rarely() -> None:
    async def story() -> None:
        made = Drifting()

        async def steps() -> None:
            made.runner.request()
            await asyncio.sleep(100)
            assert len(made.looks) == 1
            made.drift.note()
            await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            assert len(made.looks) == 2
            for _ in range(12_000):
                made.drift.note()
                await asyncio.sleep(0.05)
            assert 15 <= len(made.looks) <= 60, "ten minutes of somebody who does not stop"
            await asyncio.sleep(100)
            before = len(made.looks)
            made.drift.note()
            await asyncio.sleep(0.01)
            assert len(made.looks) == before + 1, "who was quiet is answered at once again"
            assert made.noted == 12_002

        await made.during(steps)

    play(story)


def test_drift_before_anything_is_known_asks_for_nothing() -> None:
    """Rules of an earlier process stand until this one knows better."""

    async def story() -> None:
        made = Drifting()

        async def steps() -> None:
            made.drift.note()
            await asyncio.sleep(100)
            assert made.looks == []

        await made.during(steps)

    play(story)


# --- who keeps up ---------------------------------------------------------------------------------------------------


def leaving(**changes: Any) -> Node:
    made = node()
    return msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, **changes))


def test_who_keeps_up() -> None:
    waited, synced_at = [0.0], [0.0]
    keeping = Keeping(60.0, lambda: waited[0], lambda: synced_at[0])
    assert "not in the kernel yet" in keeping.unhealthy()
    synced_at[0] = 1.0
    assert keeping.unhealthy() == ""
    waited[0] = 60.0
    assert keeping.unhealthy() == ""
    waited[0] = 61.0
    assert keeping.unhealthy() == "a change has been waiting for 61 s"


TAINTED = msgspec.convert(
    {"metadata": {"name": "a"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}, Node
)
OTHERWISE = msgspec.convert({"metadata": {"name": "a"}, "spec": {"taints": [{"key": "other"}]}}, Node)


@pytest.mark.parametrize(
    ("obj", "why"),
    [
        (None, "deleted"),
        (leaving(deletion_timestamp="now"), "deleted"),
        (TAINTED, "taint"),
        (OTHERWISE, ""),
        (node(), ""),
    ],
    ids=["gone", "being deleted", "tainted", "another taint", "there"],
)
def test_a_node_that_leaves(obj: Node | None, why: str) -> None:
    keeping = Keeping(60.0, lambda: 0.0, lambda: 1.0)
    keeping.take_node(obj)
    assert why in keeping.node_leaves
    assert bool(keeping.node_leaves) == bool(why)
    keeping.take_node(node())
    assert keeping.node_leaves == ""


# --- causes -----------------------------------------------------------------------------------------------------------


def caused(when: str) -> EndpointSlice:
    made = slice_of("1")
    return msgspec.structs.replace(
        made, metadata=msgspec.structs.replace(made.metadata, annotations={ANNOTATION: when})
    )


def test_how_long_changes_took_from_their_cause() -> None:
    times = TriggerTimes(since=1_767_225_600.0)  # 2026-01-01T00:00:00Z
    for when in ("2026-01-01T00:00:01Z", "2026-01-01T00:00:02.5Z", "2025-12-31T23:59:59Z", "soon", "", "9" * 400):
        times.take(caused(when))
    times.take(slice_of("1"))
    assert times.done(1_767_225_603.0) == [2.0, 0.5]
    assert times.done(1_767_225_603.0) == []
    times.take(caused("2026-01-01T00:00:09Z"))
    assert times.done(1_767_225_603.0) == [0.0], "clocks differ"


# --- the node ---------------------------------------------------------------------------------------------------------

FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.0.0.0/24 2 0 2
        |-- 10.0.0.0
           /24 link UNICAST
        |-- 10.0.0.7
           /32 host LOCAL
        |-- 10.0.0.255
           /32 link BROADCAST
Local:
     +-- 127.0.0.0/8 2 0 2
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
        |-- 10.244.1.1
           /24 link UNICAST
           /32 host LOCAL
"""
IF_INET6 = """fd000000000000000000000000000002 04 40 00 82     eth0
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""


@pytest.mark.parametrize(
    ("inet6", "found"),
    [
        (IF_INET6, "10.0.0.7 10.244.1.1 127.0.0.1 ::1 fd00::2 fe80::fc:ff:fe00:1"),
        (None, "10.0.0.7 10.244.1.1 127.0.0.1"),
    ],
    ids=["both families", "a kernel without IPv6"],
)
def test_addresses_of_the_node(inet6: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fib_trie").write_text(FIB_TRIE)
    if inet6 is not None:
        (tmp_path / "if_inet6").write_text(inet6)
    monkeypatch.setattr(addresses, "_IPV4", tmp_path / "fib_trie")
    monkeypatch.setattr(addresses, "_IPV6", tmp_path / "if_inet6")
    assert {str(each) for each in addresses.own_addresses()} == set(found.split())


LIMITS: dict[str, tuple[ConntrackOptions, dict[str, int]]] = {
    "nothing": (ConntrackOptions(), {}),
    "by core, and no less than": (ConntrackOptions(max_per_core=1000, min=5000), {"nf_conntrack_max": 5000}),
    "by core": (ConntrackOptions(max_per_core=2000, min=5000), {"nf_conntrack_max": 8000}),
    "times": (
        ConntrackOptions(tcp_established_timeout=1, tcp_close_wait_timeout=2, udp_timeout=3, udp_stream_timeout=4),
        {
            "nf_conntrack_tcp_timeout_established": 1,
            "nf_conntrack_tcp_timeout_close_wait": 2,
            "nf_conntrack_udp_timeout": 3,
            "nf_conntrack_udp_timeout_stream": 4,
        },
    ),
    "liberal": (ConntrackOptions(tcp_be_liberal=True), {"nf_conntrack_tcp_be_liberal": 1}),
}


@pytest.mark.parametrize(("options", "found"), LIMITS.values(), ids=LIMITS.keys())
def test_limits_of_connection_tracking(options: ConntrackOptions, found: dict[str, int]) -> None:
    assert dict(wanted(options, cores=4)) == found


def test_a_limit_that_cannot_be_set_costs_nothing_and_a_larger_one_stays(tmp_path: Path) -> None:
    (tmp_path / "nf_conntrack_max").write_text("9000\n")
    (tmp_path / "nf_conntrack_udp_timeout").write_text("30\n")
    options = ConntrackOptions(max_per_core=1000, udp_timeout=10, tcp_established_timeout=1)
    set_conntrack(options, tmp_path, cores=4)
    assert (tmp_path / "nf_conntrack_max").read_text() == "9000\n"
    assert (tmp_path / "nf_conntrack_udp_timeout").read_text() == "10\n"
