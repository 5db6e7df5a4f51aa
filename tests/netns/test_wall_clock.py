"""The wall clock of a whole daemon jumps, by a year ahead and back: with its etcd session, gRPC server and journal.

The machine's clock is everybody's, and no namespace has one of its own (time_namespaces(7) has the monotonic clocks
only). So libfaketime answers for CLOCK_REALTIME in the daemon's process, C libraries included, and what it answers is
in a file; the monotonic clocks are left as they are, as they are when an operator sets the date.

By itself libfaketime turns waits on the monotonic clock into waits on another one, for glibcs that it takes to need
that (FAKETIME_FORCE_MONOTONIC_FIX). Such a wait ends at once, and Python's wait for its interpreter lock is one: the
thread that waits asks again and again, and the one that has the lock cannot give it back. The daemon then takes seconds
for what takes milliseconds, the more the busier the machine is. So that is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from podwire.cli.agent import agent
from podwire.lab import cluster, node, process, state
from podwire.lab.state import LabState
from podwire.v1 import agent_pb2
from tests.netns.containers import add_again, at_once, containers, know_each_other, on_node, status
from tests.netns.lab_fixtures import fresh_name
from tests.netns.traffic import traffic

PATIENCE = 90.0
YEAR = 365 * 86400
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def library() -> Path:
    found = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if found is None:
        pytest.skip("libfaketime is not installed (Debian: apt install libfaketime)")
    return found


@pytest.fixture
def lab() -> Iterator[LabState]:
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2)))
    yield made
    cluster.down(made.name)


class WallClock:
    """The clock of node1's daemon, which is started anew with it."""

    def __init__(self, lab: LabState, library: Path, file: Path) -> None:
        self._lab, self._library, self._file = lab, library, file
        self.set(0)
        path = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"reconcileInterval": 1, "cooldown": 3600}))
        node.stop_daemon(lab, "node1")
        environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
        words = ["env", *(f"{name}={value}" for name, value in environment.items()), *node.PYTHON, "-m"]
        command = [*node.enter_command(lab, "node1"), *words, "ipam_daemon.main", "--config", str(path)]
        process.start(lab.files, node.daemon_role("node1"), command)
        node.wait_daemon(lab, "node1")

    def set(self, seconds: int) -> None:
        """From now on the clock is so many seconds ahead of the machine's."""
        self._file.write_text(f"{seconds:+d}\n")

    def told(self, container_id: str) -> float:
        """How far ahead of the machine's clock the daemon's was when the container was added, in seconds."""
        with agent(self._lab.files.ipamd_socket("node1")) as stub:
            found = stub.ListAttachments(agent_pb2.ListAttachmentsRequest(), timeout=10).attachments
        (created,) = [each.created for each in found if each.container_id == container_id]
        return float(created) - time.time()


@pytest.mark.fault(
    "the wall clock of a node jumps a year ahead, then two years back",
    promises=(
        "ADD and DEL go on",
        "the name stays the node's",
        "an address that cools goes on cooling",
        "running pods lose no packet",
    ),
)
def test_a_daemon_whose_wall_clock_jumps_goes_on(
    lab: LabState, library: Path, tmp_path: Path, record_property: Record
) -> None:
    clock = WallClock(lab, library, tmp_path / "clock")
    with containers(lab, "node1", "c", 5) as (talker, *boxes), containers(lab, "node2", "f", 2) as (peer, other):
        address = peer.call("ADD").address
        know_each_other(lab)
        assert talker.call("ADD").error == 0
        live = lease(lab)
        with traffic(talker, peer, address) as through:
            cooling = {boxes[0].call("ADD").address}
            assert boxes[0].call("DEL").code == 0
            for seconds, box in ((YEAR, boxes[1]), (-YEAR, boxes[2])):
                clock.set(seconds)
                added = add_again(box, record_property, time.monotonic())
                assert added.address not in cooling
                assert abs(clock.told(box.name) - seconds) < 3600, "the clock was set"
                assert box.call("DEL").code == 0
                cooling.add(added.address)
                process.wait_for(lambda: status(lab, "node1").etcd.connected, PATIENCE, "etcd")
                node.stop_daemon(lab, "node2")  # it writes its record anew, and node1 hears of it
                node.start_daemon(lab, "node2")
                node.wait_daemon(lab, "node2")
                assert [block.cooling for block in status(lab, "node1").blocks] == [len(cooling)]
            assert status(lab, "node1").peers == 1
            assert lease(lab) == live, "the name was never lost"
            assert other.call("ADD").error == 0
            assert through.harm() == []
        at_once([partial(each.call, "DEL") for each in (talker, peer, other)])


def lease(lab: LabState) -> str:
    """Under which lease node1's live key is."""
    command = ["env", "ETCDCTL_API=3", "etcdctl", "--endpoints", lab.etcd_endpoints[0], "get", "-w", "fields"]
    said = on_node(lab, "node2", *command, "/podwire/v1/live/node1").stdout
    (line,) = [line for line in said.splitlines() if line.startswith('"Lease"')]
    return line
