"""Two nodes, of which the first has its folders on small file systems in memory, so that they can be filled and made
read-only; and a pod whose ping and stream run through every fault. The fixtures are conftest.py's."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import Container, at_once, containers, know_each_other, pod_links, status
from tests.netns.traffic import Traffic, traffic

PATIENCE = 90.0
LOSSLESS = "running pods lose no packet"
TRUE = "every answer is true, or error 11"
FREE = "nothing is held after the runtime's DEL"
ONCE = "no address twice"
Record = Callable[[str, object], None]


@dataclass
class Disks:
    """Two nodes; the folders of node1's daemon are on `run` and `state`."""

    lab: LabState
    run: Path
    state: Path

    @property
    def journal(self) -> Path:
        return self.run / "journal.db"

    def restart(self) -> None:
        node.start_daemon(self.lab, "node1")
        node.wait_daemon(self.lab, "node1")

    def kill(self) -> None:
        node.kill_daemon(self.lab, "node1")

    def held(self) -> int:
        return sum(block.used + block.releasing for block in status(self.lab, "node1").blocks)

    def runs(self) -> bool:
        running = process.recorded(self.lab.files, node.daemon_role("node1"))
        return running is not None and running.alive

    def log(self) -> str:
        return self.lab.files.log(node.daemon_role("node1")).read_text()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    base = tmp_path_factory.mktemp("disks")
    run, state = base / "run", base / "state"
    lab_state = LabState(name=f"disks-{uuid.uuid4().hex[:6]}", nodes=plan_nodes(2))
    try:
        for path in (run, state):
            path.mkdir()
            mount("-t", "tmpfs", "-o", "size=8m", "podwire-test", str(path))
        lab = cluster.up(lab_state)
        node.stop_daemon(lab, "node1")
        file = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
        changes = {"runDir": str(run), "stateDir": str(state), "reconcileInterval": 1, "cooldown": 300}
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
        socket = lab.files.ipamd_socket("node1")
        socket.unlink(missing_ok=True)
        socket.symlink_to(run / "ipamd.sock")
        queue = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
        queue.rmdir()
        queue.symlink_to(state / "del-queue")
        made = Disks(lab, run, state)
        made.restart()
        know_each_other(lab)
        yield made
    finally:
        cluster.down(lab_state.name)
        for path in (run, state):
            if path.is_mount():
                subprocess.run(["umount", str(path)], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def fill(path: Path) -> Path:
    """Takes what is free on the disk, to the last byte that a file can have."""
    file = path / "fill"
    with file.open("wb", buffering=0) as full:
        size = 1 << 16
        while size:
            try:
                full.write(b"\0" * size)
            except OSError:
                size //= 2
    return file


@dataclass
class Cast:
    """A pod whose traffic must not be harmed, and others that come and go."""

    talker: Container
    boxes: list[Container]
    traffic: Traffic


@pytest.fixture
def cast(disks: Disks) -> Iterator[Cast]:
    lab = disks.lab
    with (
        containers(lab, "node1", "t", 1) as (talker,),
        containers(lab, "node2", "p", 1) as (peer,),
        containers(lab, "node1", "b", 4) as boxes,
    ):
        try:
            address = peer.call("ADD").address
            assert talker.call("ADD").error == 0
            with traffic(talker, peer, address) as running:
                yield Cast(talker, boxes, running)
                harm = running.harm()
        finally:
            if not disks.runs():
                disks.restart()
            deleted = at_once([partial(each.call, "DEL") for each in (talker, peer, *boxes)])
        assert harm == []
        assert {answer.code for answer in deleted} == {0}
        wait_empty(disks)


def wait_empty(disks: Disks) -> None:
    process.wait_for(lambda: disks.held() == 0, PATIENCE, "all addresses to be free")
    process.wait_for(lambda: not pod_links(disks.lab, "node1"), PATIENCE, "the wires to be gone")


def add_again(box: Container, record: Record, since: float) -> str:
    """The address of an ADD, as soon as one works."""
    process.wait_for(lambda: box.call("ADD").error in (0, 101), PATIENCE, "an ADD to work")
    record("add_again_s", round(time.monotonic() - since, 2))
    box.call("DEL")
    answer = box.call("ADD")
    assert answer.error == 0, answer.body
    return answer.address


def address(box: Container, record: Record, since: float) -> str:
    answer = box.call("ADD")
    assert answer.error == 0, answer.body
    record("add_again_s", round(time.monotonic() - since, 2))
    return answer.address
