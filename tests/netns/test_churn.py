"""Pods that come and go, twenty at a time: nothing grows, nothing is left.

What grows with every call, however little, ends a daemon that runs for months. File descriptors are counted exactly;
memory may settle first, so it is the growth of the second half that counts. How long calls take is the benchmark's
(bench/scenarios/churn.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, containers, pod_links, status

PATIENCE = 90.0
AT_ONCE = 20
THREADS = (os.cpu_count() or 1) + 4
"""How many threads asyncio keeps for what blocks; it begins them one by one."""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    state = LabState(name=f"churn-{uuid4().hex[:6]}", nodes=plan_nodes(1))
    try:
        yield cluster.up(state)
    finally:
        cluster.down(state.name)


class Daemon:
    """The node's daemon as the kernel sees it."""

    def __init__(self, lab: LabState) -> None:
        running = process.recorded(lab.files, node.daemon_role("node1"))
        assert running is not None
        self.pid = running.pid

    def descriptors(self) -> dict[str, int]:
        """How many of each kind are open."""
        counts: dict[str, int] = {}
        for each in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                kind = re.sub(r"\d+", "N", os.readlink(f"/proc/{self.pid}/fd/{each}"))
            except FileNotFoundError:
                continue
            counts[kind] = counts.get(kind, 0) + 1
        return counts

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def memory(self) -> int:
        """Private memory in bytes."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(1024 * int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB$", text, re.MULTILINE))


def churn(boxes: list[Container], rounds: int) -> None:
    """Every container is added and deleted so often, all of them at once."""

    def come_and_go(box: Container) -> list[int]:
        return [box.call(command).code for _ in range(rounds) for command in ("ADD", "DEL")]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert {code for codes in pool.map(come_and_go, boxes) for code in codes} == {0}


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(200, marks=pytest.mark.fault("200 ADD and DEL by 20 at once", promises=("nothing leaks",))),
        pytest.param(
            2000,
            marks=[pytest.mark.slow, pytest.mark.fault("2,000 ADD and DEL by 20 at once", promises=("nothing leaks",))],
        ),
    ],
)
def test_nothing_grows_with_the_number_of_calls(
    lab: LabState, calls: int, record_property: Callable[[str, object], None]
) -> None:
    daemon = Daemon(lab)
    rounds = calls // 2 // AT_ONCE
    with containers(lab, "node1", "c", AT_ONCE) as boxes:
        churn(boxes, max(1, rounds // 2))
        settled(lab)
        descriptors, threads, memory = daemon.descriptors(), daemon.threads(), daemon.memory()
        churn(boxes, max(1, rounds - rounds // 2))
        settled(lab)
        # The question itself may have been open still when the first half was looked at: fewer are as good.
        process.wait_for(lambda: are_within(daemon.descriptors(), descriptors), PATIENCE, f"no more than {descriptors}")
        assert daemon.threads() <= threads + THREADS
        grown = daemon.memory() - memory
        record_property("grown_bytes", grown)
        assert grown < 2_000_000, f"{grown} bytes more after {calls // 2} calls"
        assert [box.name for box in boxes if "eth0" in box.links()] == []


def are_within(now: dict[str, int], before: dict[str, int]) -> bool:
    """Whether there are no more of any kind than before."""
    return all(count <= before.get(kind, 0) for kind, count in now.items())


def settled(lab: LabState) -> None:
    """Everything that was put off is done."""

    def is_settled() -> bool:
        return not any(b.used or b.releasing for b in status(lab, "node1").blocks) and not pod_links(lab, "node1")

    process.wait_for(is_settled, PATIENCE, "all wires to be gone")
