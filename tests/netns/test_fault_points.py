"""The daemon is killed at every step that has a name (ipam_daemon/faults.py), and what it promised is asked afterwards.

Every point has a story that reaches it: what is done before, and the call during which the daemon dies. Then it starts
again, and for each point the same holds:

    the runtime got an answer that is true, or error 11, or a DEL that is owed and paid
    after the runtime's own DEL of what failed nothing is held: no address, no wire, no row
    no two pods have one address
    the pod that was there all the time has the MTU of the others
    a ping at 100 a second and a TCP stream of another pod of the node notice nothing
    an ADD works again

One lab serves all, with blocks so small that they are claimed and returned within a story.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

import ipam_daemon
from ipam_daemon.faults import POINTS, VARIABLE
from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import (
    WHOLE,
    Answer,
    Container,
    at_once,
    containers,
    know_each_other,
    on_node,
    pod_links,
    status,
)
from tests.netns.traffic import traffic

PATIENCE = 90.0
PROMISES = (
    "the answer is true, or error 11",
    "nothing is held after the runtime's DEL",
    "no address twice",
    "running pods lose no packet",
)


@dataclass
class Scene:
    """A node whose daemon does what the file says, a pod on it that talks to another node, and eleven containers."""

    lab: LabState
    fault: Path
    talker: Container
    peer: Container
    address: str
    boxes: list[Container]

    def arm(self, point: str, action: str = "kill") -> None:
        self.fault.write_text(f"{point} {action}")

    def disarm(self) -> None:
        self.fault.write_text("")

    def wait_dead(self) -> None:
        running = process.recorded(self.lab.files, node.daemon_role("node1"))
        assert running is not None
        assert running.wait_gone(PATIENCE), "the point was not reached"

    def start(self) -> None:
        start_daemon(self.lab, self.fault)
        node.wait_daemon(self.lab, "node1")

    def queue(self) -> list[Path]:
        return list((self.lab.files.node_path("node1", "/var/lib/podwire") / "del-queue").iterdir())

    def held(self) -> int:
        return sum(block.used + block.releasing for block in status(self.lab, "node1").blocks)

    def blocks(self) -> int:
        return len(status(self.lab, "node1").blocks)


def start_daemon(lab: LabState, fault: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(fault))
        node.start_daemon(lab, "node1")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two nodes, blocks of twelve pods, returned as soon as they are empty."""
    state = LabState(name=f"points-{uuid4().hex[:6]}", nodes=plan_nodes(2), pod_cidr="10.250.0.0/24")
    fault = tmp_path_factory.mktemp("fault") / "fault"
    fault.write_text("")
    try:
        lab = cluster.up(state)
        file = lab.files.node_path("node1", "/etc/podwire") / "ipamd.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"blockIdle": 0, "cooldown": 0}))
        node.stop_daemon(lab, "node1")
        start_daemon(lab, fault)
        node.wait_daemon(lab, "node1")
        know_each_other(lab)
        with containers(lab, "node1", "talker", 1) as (talker,), containers(lab, "node2", "peer", 1) as (peer,):
            address = peer.call("ADD").address
            assert talker.call("ADD").error == 0
            with containers(lab, "node1", "box", 11) as boxes:
                yield Scene(lab, fault, talker, peer, address, boxes)
    finally:
        cluster.down(state.name)


# --- the stories: each ends with the daemon dead, and returns what the runtime was told ---------------------------

Story = Callable[[Scene, str], dict[str, Answer]]


def killed_during_add(scene: Scene, point: str) -> dict[str, Answer]:
    scene.arm(point)
    return {"ADD": scene.boxes[0].call("ADD", WHOLE)}


def killed_during_a_failing_add(scene: Scene, point: str) -> dict[str, Answer]:
    """The namespace has an interface of that name already."""
    box = scene.boxes[0]
    box.run("ip", "link", "add", "eth0", "type", "bridge")
    scene.arm(point)
    answer = box.call("ADD", WHOLE)
    box.run("ip", "link", "delete", "eth0")
    return {"ADD": answer}


def killed_during_del(scene: Scene, point: str) -> dict[str, Answer]:
    assert scene.boxes[0].call("ADD", WHOLE).error == 0
    scene.arm(point)
    return {"DEL": scene.boxes[0].call("DEL")}


def killed_replaying(scene: Scene, point: str) -> dict[str, Answer]:
    assert scene.boxes[0].call("ADD").error == 0
    node.kill_daemon(scene.lab, "node1")
    answer = scene.boxes[0].call("DEL")
    assert len(scene.queue()) == 1
    scene.arm(point)
    start_daemon(scene.lab, scene.fault)
    return {"DEL": answer}


def killed_starting(scene: Scene, point: str) -> dict[str, Answer]:
    node.kill_daemon(scene.lab, "node1")
    scene.arm(point)
    start_daemon(scene.lab, scene.fault)
    return {}


def killed_undoing(scene: Scene, point: str) -> dict[str, Answer]:
    """The daemon dies while it undoes what a daemon that died has left."""
    answers = killed_during_add(scene, "add.wired")
    scene.wait_dead()
    scene.arm(point)
    start_daemon(scene.lab, scene.fault)
    return answers


def killed_claiming(scene: Scene, point: str) -> dict[str, Answer]:
    process.wait_for(lambda: scene.blocks() == 1, PATIENCE, "what is left of other stories to be returned")
    scene.arm(point)
    answers = at_once([partial(each.call, "ADD") for each in scene.boxes])
    return {each.name: answer for each, answer in zip(scene.boxes, answers, strict=True)}


def killed_returning(scene: Scene, point: str) -> dict[str, Answer]:
    assert not any(answer.error for answer in at_once([partial(each.call, "ADD") for each in scene.boxes]))
    process.wait_for(lambda: scene.blocks() > 1, PATIENCE, "another block")
    scene.arm(point)
    at_once([partial(each.call, "DEL") for each in scene.boxes])
    return {}


def killed_resizing(scene: Scene, point: str) -> dict[str, Answer]:
    """The underlay has its former MTU again before the next daemon looks."""
    scene.arm(point)
    on_node(scene.lab, "node1", "ip", "link", "set", "eth0", "mtu", "1600")
    try:
        scene.wait_dead()
    finally:
        on_node(scene.lab, "node1", "ip", "link", "set", "eth0", "mtu", "1500")
    return {}


STORIES: dict[Story, tuple[str, ...]] = {
    killed_starting: (
        "start.restored",
        "join.entered",
        "join.published",
        "converge.bridge",
        "converge.firewall",
        "converge.peers",
        "journal.setting-blocks",
    ),
    killed_undoing: ("start.undoing",),
    killed_during_add: (
        "add.allocated",
        "journal.intending",
        "add.intended",
        "add.bound",
        "add.pair-made",
        "add.limited",
        "add.pod-configured",
        "add.port-configured",
        "add.wired",
        "add.settled",
        "add.host-ports-open",
        "add.committed",
        "held.written",
    ),
    killed_during_a_failing_add: ("undo.begun", "undo.forgotten"),
    killed_during_del: (
        "del.marked",
        "del.killed",
        "del.host-ports-closed",
        "journal.releasing",
        "del.released",
        "reap.deleted",
        "journal.cooling",
        "reap.cooled",
    ),
    killed_replaying: ("queue.replayed", "queue.removed"),
    killed_claiming: ("block.claimed", "block.journaled", "block.published", "block.plumbed"),
    killed_returning: ("block.retired", "block.journaled", "block.published", "block.plumbed", "block.released"),
    killed_resizing: ("mtu.resized",),
}
QUICK = {
    "start.restored",
    "start.undoing",
    "add.intended",
    "add.pair-made",
    "add.wired",
    "add.host-ports-open",
    "add.committed",
    "undo.begun",
    "del.killed",
    "del.released",
    "reap.deleted",
    "queue.replayed",
    "block.claimed",
    "mtu.resized",
}
CASES = [
    pytest.param(
        story,
        point,
        id=f"{story.__name__.removeprefix('killed_')}-{point}",
        marks=[
            pytest.mark.fault(f"daemon killed at {point} ({POINTS[point]})", promises=PROMISES),
            *([] if point in QUICK else [pytest.mark.slow]),
        ],
    )
    for story, points in STORIES.items()
    for point in points
]


@pytest.mark.parametrize(("story", "point"), CASES)
def test_a_daemon_killed_there_keeps_its_promises(
    scene: Scene, story: Story, point: str, record_property: Callable[[str, object], None]
) -> None:
    with traffic(scene.talker, scene.peer, scene.address) as running:
        try:
            answers = story(scene, point)
            scene.wait_dead()
        finally:
            scene.disarm()
            began = time.monotonic()
            if not daemon_runs(scene):
                scene.start()
        check_answers(scene, answers)
        runtime_deletes(scene)
        again = scene.boxes[0].call("ADD", WHOLE)
        record_property("add_again_s", round(time.monotonic() - began, 2))
        assert again.error == 0, again.body
        fill(scene)
        runtime_deletes(scene)
        assert running.harm() == []


def daemon_runs(scene: Scene) -> bool:
    running = process.recorded(scene.lab.files, node.daemon_role("node1"))
    return running is not None and running.alive


def check_answers(scene: Scene, answers: dict[str, Answer]) -> None:
    """An ADD that succeeded made a wire; one that did not says that it may be tried again; a DEL is success or 11."""
    by_name = {each.name: each for each in scene.boxes}
    for name, answer in answers.items():
        assert answer.error in (0, 11), answer.body
        if answer.error == 0 and name != "DEL":
            box = by_name.get(name, scene.boxes[0])
            assert "eth0" in box.links()
            assert box.run("ping", "-c1", "-W10", scene.address).returncode == 0


def runtime_deletes(scene: Scene) -> None:
    """What a runtime does with what failed. Then nothing is held, and the talker has the one wire that there is."""
    assert [
        answer.body for answer in at_once([partial(each.call, "DEL") for each in scene.boxes]) if answer.error
    ] == []
    process.wait_for(lambda: scene.held() == 1, PATIENCE, "all addresses but the talker's to be free")
    process.wait_for(lambda: len(pod_links(scene.lab, "node1")) == 1, PATIENCE, "the wires to be gone")
    process.wait_for(lambda: not scene.queue(), PATIENCE, "the queue to be empty")
    process.wait_for(
        lambda: "elements" not in ports_of_the_node(scene), PATIENCE, "no port of the node to lead to a pod"
    )
    process.wait_for(lambda: bound(scene) == 1, PATIENCE, "what no pod may send as any more to be gone")
    assert "chain" not in on_node(scene.lab, "node1", "nft", "list", "ruleset", "netdev").stdout
    process.wait_for(
        lambda: mtu_of(scene.talker) == status(scene.lab, "node1").mtu, PATIENCE, "the MTU to be everybody's"
    )
    assert [box.name for box in scene.boxes if "eth0" in box.links()] == []


def bound(scene: Scene) -> int:
    """How many addresses pods may send as."""
    return on_node(scene.lab, "node1", "nft", "list", "set", "bridge", "podwire", "bound4").stdout.count('"') // 2


def mtu_of(box: Container) -> int:
    return int(json.loads(box.run("ip", "-j", "link", "show", "eth0").stdout)[0]["mtu"])


def ports_of_the_node(scene: Scene) -> str:
    return on_node(scene.lab, "node1", "nft", "list", "table", "inet", "podwire_hostports").stdout


def fill(scene: Scene) -> None:
    """As many pods at once as a block has room for before another is claimed: each has an address of its own."""
    added = at_once([partial(each.call, "ADD") for each in scene.boxes[1:9]])
    assert [answer.body for answer in added if answer.error] == []
    addresses = [answer.address for answer in added]
    assert len({*addresses, scene.address}) == len(addresses) + 1


def test_every_point_of_the_code_has_a_name_and_a_story() -> None:
    called = set()
    for file in Path(ipam_daemon.__file__).parent.glob("*.py"):
        for each in ast.walk(ast.parse(file.read_text())):
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id == "point":
                assert isinstance(each.args[0], ast.Constant), f"{file.name}:{each.lineno}: not a literal"
                called.add(each.args[0].value)
    assert called == set(POINTS)
    assert {point for points in STORIES.values() for point in points} == set(POINTS)
