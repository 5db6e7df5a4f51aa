"""Full disks, read-only disks, damaged and removed files, reboots and nodes that lose their namespaces.

The node's folders are file systems of their own, small ones in memory, so that they can be filled and made read-only.
A ping and a stream of a pod run through every fault but those that end the pods themselves.
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from ipam_daemon import journal
from ipam_daemon.model import Block, encode
from ipam_daemon.registry import ROOT
from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from podwire.v1.agent_pb2 import BlockStatus
from tests.netns.containers import Answer, Container, at_once, containers, on_node, pod_links, status
from tests.netns.traffic import Traffic, traffic

PATIENCE = 30.0
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
        changes = {"runDir": str(run), "stateDir": str(state), "reconcileInterval": 1}
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
        socket = lab.files.ipamd_socket("node1")
        socket.unlink(missing_ok=True)
        socket.symlink_to(run / "ipamd.sock")
        queue = lab.files.node_path("node1", "/var/lib/podwire") / "del-queue"
        queue.rmdir()
        queue.symlink_to(state / "del-queue")
        made = Disks(lab, run, state)
        made.restart()
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


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("no room under /run", promises=(TRUE, FREE, ONCE, LOSSLESS, "ADD works once there is room"))
def test_without_room_for_the_journal_calls_say_so_and_go_on_when_there_is(
    disks: Disks, cast: Cast, record_property: Record
) -> None:
    first, second, third, fourth = cast.boxes
    assert first.call("ADD").error == 0
    full = fill(disks.run)
    answers: list[Answer] = []
    while len(answers) < 60 and not any(answer.error for answer in answers):  # until the log of the journal must grow
        answers += [second.call("ADD"), second.call("DEL")]
    assert {answer.error for answer in answers} | {0} == {0, 11}
    assert any("the journal" in answer.body.get("msg", "") for answer in answers)
    tried = third.call("ADD")
    assert ("eth0" in third.links()) == (tried.error == 0), "what failed left no wire that works"
    fourth.call("DEL")
    full.unlink()
    address = add_again(third, record_property, time.monotonic())
    assert address != add_again(fourth, lambda *_: None, 0)
    assert first.call("DEL").error == 0


@pytest.mark.fault(
    "no room under /run, and the node must follow the others",
    promises=("it follows them, and mends what it has", LOSSLESS),
)
def test_without_room_for_the_journal_the_node_is_kept_at_its_plan(
    disks: Disks, cast: Cast, record_property: Record
) -> None:
    """The other nodes do not stop to change because this one has no room to write that it has seen them."""
    box = cast.boxes[0]
    full = fill(disks.run)
    answers: list[Answer] = []
    while len(answers) < 60 and not any(answer.error for answer in answers):
        answers += [box.call("ADD"), box.call("DEL")]
    assert any(answer.error for answer in answers)
    for _ in range(2):  # the round that mends the first must not be the last
        on_node(disks.lab, "node1", "ip", "route", "add", "10.244.250.0/24", "dev", "pw-vxlan", "proto", "80")
        process.wait_for(lambda: "10.244.250.0" not in routes(disks), PATIENCE, "a route that leads nowhere to go")
    assert disks.runs()
    full.unlink()
    add_again(box, record_property, time.monotonic())


def routes(disks: Disks) -> str:
    return on_node(disks.lab, "node1", "ip", "route").stdout


@pytest.mark.fault("no room under /run while the daemon starts", promises=("it says why", FREE, ONCE, LOSSLESS))
def test_without_room_a_daemon_does_not_start_and_does_later(disks: Disks, cast: Cast, record_property: Record) -> None:
    disks.kill()
    full = fill(disks.run)
    node.start_daemon(disks.lab, "node1")
    process.wait_for(lambda: not disks.runs() or disks.run.joinpath("ipamd.sock").is_socket(), PATIENCE, "an end")
    assert cast.boxes[0].call("ADD").error in (0, 11)
    disks.kill()
    full.unlink()
    began = time.monotonic()
    disks.restart()
    add_again(cast.boxes[1], record_property, began)


@pytest.mark.fault("no room under /var/lib", promises=(TRUE, FREE, LOSSLESS, "ADD and DEL go on"))
def test_without_room_for_the_state_pods_come_and_go(disks: Disks, cast: Cast, record_property: Record) -> None:
    full = fill(disks.state)
    began = time.monotonic()
    add_again(cast.boxes[0], record_property, began)
    assert cast.boxes[0].call("DEL").error == 0
    process.wait_for(lambda: "cannot be kept for the next boot" in disks.log(), PATIENCE, "the warning")
    disks.kill()
    queued = cast.boxes[1].call("DEL")
    assert queued.error in (0, 11), "what cannot be written down is not called done"
    assert bool(list((disks.state / "del-queue").glob("*.del"))) == (queued.error == 0)
    disks.restart()
    assert cast.boxes[2].call("ADD").error == 0
    full.unlink()


@pytest.mark.fault("/var/lib read-only", promises=(TRUE, FREE, LOSSLESS, "ADD and DEL go on, a queued DEL is done"))
def test_with_a_read_only_state_pods_come_and_go(disks: Disks, cast: Cast, record_property: Record) -> None:
    box, gone, other = cast.boxes[:3]
    assert gone.call("ADD").error == 0
    disks.kill()
    assert gone.call("DEL").error == 0
    mount("-o", "remount,ro", str(disks.state))
    try:
        assert box.call("DEL").error == 11, "it cannot be queued"
        began = time.monotonic()
        disks.restart()
        process.wait_for(lambda: "eth0" not in gone.links(), PATIENCE, "the queued DEL to be done")
        add_again(box, record_property, began)
        assert gone.call("ADD").error == 0
        assert other.call("ADD").error == 0
        assert "its file stays" in disks.log()
        assert "eth0" in gone.links(), "a DEL that is replayed again spares a later ADD"
    finally:
        mount("-o", "remount,rw", str(disks.state))
    process.wait_for(lambda: not list((disks.state / "del-queue").iterdir()), PATIENCE, "the queue to be put away")


# --- the journal's file ---------------------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 4000)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def a_page_overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096))


def removed(path: Path) -> None:
    path.unlink()


def all_removed(path: Path) -> None:
    for each in path.parent.glob("journal.db*"):
        each.unlink()


def log_removed(path: Path) -> None:
    path.with_name(path.name + "-wal").unlink()


def log_overwritten(path: Path) -> None:
    log = path.with_name(path.name + "-wal")
    log.write_bytes(os.urandom(log.stat().st_size))


DAMAGES = (
    garbage,
    truncated,
    emptied,
    a_page_overwritten,
    removed,
    all_removed,
    log_removed,
    log_overwritten,
)
QUICK = {(garbage, False), (all_removed, False), (log_removed, False), (all_removed, True)}
BOTH = [
    pytest.param(
        damage,
        running,
        id=f"{damage.__name__}-{'running' if running else 'down'}",
        marks=[
            pytest.mark.fault(
                f"journal: {damage.__name__.replace('_', ' ')}, daemon {'running' if running else 'down'}",
                promises=(ONCE, FREE, LOSSLESS),
            ),
            *([] if (damage, running) in QUICK else [pytest.mark.slow]),
        ],
    )
    for damage in DAMAGES
    for running in (False, True)
]


@pytest.mark.parametrize(("damage", "running"), BOTH)
def test_a_journal_that_is_damaged_or_gone_is_rebuilt(
    disks: Disks, cast: Cast, damage: Callable[[Path], None], running: bool, record_property: Record
) -> None:
    first, second, third, fourth = cast.boxes
    addresses = {first.call("ADD").address, second.call("ADD").address}
    assert third.call("ADD").error == 0
    assert third.call("DEL").error == 0
    if not running:
        disks.kill()
    damage(disks.journal)
    began = time.monotonic()
    if running:
        answer = fourth.call("ADD")
        assert answer.error in (0, 11), answer.body
        if answer.error == 0:
            addresses.add(answer.address)
        disks.kill()
    disks.restart()
    addresses |= {address(third, record_property, began)}
    assert len(addresses) == (4 if running and answer.error == 0 else 3)
    for each in cast.boxes:
        assert each.call("DEL").error == 0
    process.wait_for(lambda: disks.held() == 1, PATIENCE, "all but the talker's address to be free")
    process.wait_for(lambda: len(pod_links(disks.lab, "node1")) == 1, PATIENCE, "the wires to be gone")


def address(box: Container, record: Record, since: float) -> str:
    answer = box.call("ADD")
    assert answer.error == 0, answer.body
    record("add_again_s", round(time.monotonic() - since, 2))
    return answer.address


@pytest.mark.fault(
    "journal removed under a running daemon", promises=("the file is written again", ONCE, FREE, LOSSLESS)
)
def test_a_journal_removed_under_a_running_daemon_is_written_again(
    disks: Disks, cast: Cast, record_property: Record
) -> None:
    first, second = cast.boxes[:2]
    added = first.call("ADD").address
    disks.journal.unlink()
    assert add_again(second, record_property, time.monotonic()) != added
    process.wait_for(disks.journal.exists, PATIENCE, "the journal to be written again")
    disks.kill()
    disks.restart()
    assert disks.held() == 3


@pytest.mark.fault(
    "journal overwritten under a running daemon", promises=("the file is written again", ONCE, FREE, LOSSLESS)
)
@pytest.mark.parametrize("damage", [garbage, emptied, a_page_overwritten])
def test_a_journal_overwritten_under_a_running_daemon_is_written_again(
    disks: Disks, cast: Cast, damage: Callable[[Path], None], record_property: Record
) -> None:
    node.stop_daemon(disks.lab, "node1")  # so that all is in the file, and nothing in its log
    disks.restart()
    added = cast.boxes[0].call("ADD").address
    set_aside = set(disks.run.glob("journal.db.corrupt-*"))
    damage(disks.journal)
    process.wait_for(partial(sound, disks.journal), PATIENCE, "the journal to be written again")
    disks.kill()
    began = time.monotonic()
    disks.restart()
    assert set(disks.run.glob("journal.db.corrupt-*")) == set_aside, "it was sound"
    assert disks.held() == 2
    assert address(cast.boxes[1], record_property, began) != added


def sound(path: Path) -> bool:
    return journal._is_sound(path)


# --- the machine ----------------------------------------------------------------------------------------------------


def lose_namespaces(disks: Disks, pods: list[Container]) -> None:
    """What a node's restart takes with it: pods, bridge, tunnel, rules."""
    for pod in pods:
        pod.run("ip", "link", "delete", "eth0")
    on_node(disks.lab, "node1", "ip", "link", "delete", "pw0")
    on_node(disks.lab, "node1", "ip", "link", "delete", "pw-vxlan")
    on_node(disks.lab, "node1", "nft", "flush", "ruleset")


@pytest.mark.fault(
    "node restarted: all namespaces gone, same boot", promises=("addresses of vanished pods are freed", ONCE, FREE)
)
def test_a_node_that_lost_its_namespaces_frees_what_nobody_has(disks: Disks, record_property: Record) -> None:
    with containers(disks.lab, "node1", "n", 4) as boxes:
        before = {box.call("ADD").address for box in boxes}
        disks.kill()
        lose_namespaces(disks, boxes)
        began = time.monotonic()
        disks.restart()
        assert boxes[0].call("DEL").error == 0
        assert address(boxes[0], record_property, began) not in before
        process.wait_for(lambda: disks.held() == 1, PATIENCE, "the reconciler to free the others")
        assert {box.call("DEL").error for box in boxes} == {0}
        wait_empty(disks)


@pytest.mark.fault(
    "reboot", promises=("addresses of the time before cool", "rotation goes on", "DELs of the time before are done")
)
def test_after_a_reboot_addresses_of_the_time_before_are_not_reused_at_once(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    fake = tmp_path / "boot_id"
    fake.write_text(f"{uuid.uuid4()}\n")
    kernels = "/proc/sys/kernel/random/boot_id"
    with containers(disks.lab, "node1", "r", 4) as boxes:
        before = [box.call("ADD").address for box in boxes]
        held = disks.state / "held.json"
        process.wait_for(lambda: f'"{before[-1]}"' in held.read_text(), PATIENCE, "the addresses to be written down")
        disks.kill()
        assert boxes[0].call("DEL").error == 0
        for each in disks.run.glob("journal.db*"):  # /run is memory
            each.unlink()
        lose_namespaces(disks, boxes)
        assert on_node(disks.lab, "node1", "mount", "--bind", str(fake), kernels).returncode == 0
        try:
            began = time.monotonic()
            disks.restart()
            assert not list((disks.state / "del-queue").iterdir())
            assert sum(block.cooling for block in status(disks.lab, "node1").blocks) >= 4
            after = [address(box, record_property, began) for box in boxes]
            assert set(after).isdisjoint(before)
            at_once([partial(box.call, "DEL") for box in boxes])
            wait_empty(disks)
        finally:
            disks.kill()
            on_node(disks.lab, "node1", "umount", kernels)
            disks.restart()


@contextmanager
def rebooted(disks: Disks, pods: list[Container], boot_id: Path, meanwhile: Callable[[], None]) -> Iterator[None]:
    """A power cut and another boot, with etcd away from before the daemon starts until after the block.

    `meanwhile` happens to etcd while the node is off.
    """
    boot_id.write_text(f"{uuid.uuid4()}\n")
    kernels = "/proc/sys/kernel/random/boot_id"
    disks.kill()
    for each in disks.run.glob("journal.db*"):  # /run is memory
        each.unlink()
    lose_namespaces(disks, pods)
    meanwhile()
    etcd = process.recorded(disks.lab.files, cluster.ETCD)
    assert etcd is not None
    etcd.kill()
    assert etcd.wait_gone(PATIENCE)
    assert on_node(disks.lab, "node1", "mount", "--bind", str(boot_id), kernels).returncode == 0
    try:
        yield
    finally:
        cluster.start_etcd(disks.lab)
        disks.kill()
        on_node(disks.lab, "node1", "umount", kernels)
        disks.restart()


def written_down(disks: Disks) -> bool:
    """Whether the file for after a reboot has the node's blocks."""
    return all(f'"{block.cidr}"' in (disks.state / "held.json").read_text() for block in blocks(disks))


def blocks(disks: Disks) -> list[BlockStatus]:
    return list(status(disks.lab, "node1").blocks)


@pytest.mark.fault(
    "reboot while etcd is away",
    promises=("ADD and DEL go on in the node's blocks", ONCE, FREE, "the other nodes are reached once etcd is back"),
)
def test_after_a_power_cut_pods_start_before_etcd_is_back(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    lab = disks.lab
    with containers(lab, "node1", "w", 4) as boxes, containers(lab, "node2", "x", 1) as (peer,):
        far = peer.call("ADD").address
        before = [box.call("ADD").address for box in boxes]
        held = disks.state / "held.json"
        process.wait_for(lambda: f'"{before[-1]}"' in held.read_text(), PATIENCE, "the addresses to be written down")
        assert written_down(disks)
        had = [each.cidr for each in blocks(disks)]
        with rebooted(disks, boxes, tmp_path / "boot_id", lambda: None):
            began = time.monotonic()
            node.start_daemon(lab, "node1")
            after = [add_again(boxes[0], record_property, began), *(box.call("ADD").address for box in boxes[1:])]
            assert set(after).isdisjoint(before)
            assert [each.cidr for each in blocks(disks)] == had
            assert boxes[0].run("ping", "-c1", "-W2", after[1]).returncode == 0
            assert boxes[3].call("DEL").code == 0
            cluster.start_etcd(lab)
            process.wait_for(lambda: status(lab, "node1").peers == 1, PATIENCE, "the other node")
            assert boxes[0].run("ping", "-c1", "-W2", far).returncode == 0
            assert [each.cidr for each in blocks(disks)] == had
            at_once([partial(box.call, "DEL") for box in (*boxes, peer)])
            wait_empty(disks)


@pytest.mark.fault(
    "reboot while etcd is away, the node was forgotten meanwhile",
    promises=("who has the block keeps it", "pods in it are cut off once etcd is back", "ADD works when they are gone"),
)
def test_a_block_that_went_to_another_during_a_power_cut_is_given_up(
    disks: Disks, tmp_path: Path, record_property: Record
) -> None:
    lab = disks.lab
    process.wait_for(lambda: written_down(disks), PATIENCE, "the blocks to be written down")
    (lost,) = [each.cidr for each in blocks(disks)]
    etcdctl = partial(on_node, lab, "node2", "env", "ETCDCTL_API=3", "etcdctl", "--endpoints", lab.etcd_endpoints[0])
    taken = Block(cidr=ipaddress.ip_network(lost), pool="default", node="other", node_id="id-other", generation=1)

    def give_away() -> None:
        """What `node forget` and another node's claim leave behind."""
        for key in ("nodes/node1", "live/node1", f"blocks/{lost}"):
            assert etcdctl("del", ROOT + key).returncode == 0
        etcdctl("put", f"{ROOT}forgotten/node1", '{"at": 1}')
        assert etcdctl("put", f"{ROOT}blocks/{lost}", encode(taken).decode()).returncode == 0

    with containers(lab, "node1", "y", 2) as (first, second), rebooted(disks, [], tmp_path / "boot_id", give_away):
        node.start_daemon(lab, "node1")
        address = add_again(first, lambda *_: None, time.monotonic())
        assert ipaddress.ip_address(address) in ipaddress.ip_network(lost), "nobody could know"
        back = time.monotonic()
        cluster.start_etcd(lab)
        process.wait_for(lambda: second.call("STATUS").error == 51, PATIENCE, "the node to find out")
        assert second.call("ADD").error == 11
        assert first.run("ping", "-c1", "-W1", str(ipaddress.ip_network(lost)[1])).returncode != 0, "it is cut off"
        assert first.call("DEL").code == 0
        fresh = add_again(second, record_property, back)
        assert ipaddress.ip_address(fresh) not in ipaddress.ip_network(lost)
        assert f'"{lost}"' not in (disks.state / "held.json").read_text()
        assert b"id-other" in etcdctl("get", "--print-value-only", f"{ROOT}blocks/{lost}").stdout.encode()
        assert second.call("DEL").code == 0
        wait_empty(disks)
    etcdctl("del", f"{ROOT}blocks/{lost}")


@pytest.mark.fault(
    "machine slept, its lease ran out", promises=("the name is taken again", "DEL and ADD go on", LOSSLESS)
)
def test_a_machine_that_slept_takes_its_name_again(disks: Disks, cast: Cast, record_property: Record) -> None:
    running = process.recorded(disks.lab.files, node.daemon_role("node1"))
    assert running is not None
    running.kill(19)  # SIGSTOP
    etcdctl = partial(on_node, disks.lab, "node1", "etcdctl", "--endpoints", disks.lab.etcd_endpoints[0])
    try:
        leases = etcdctl("lease", "list").stdout.split()[3:]
        (ours,) = (each for each in leases if "live/node1" in etcdctl("lease", "timetolive", each, "--keys").stdout)
        assert etcdctl("lease", "revoke", ours).returncode == 0
        assert "node1" not in etcdctl("get", "--prefix", "/podwire/v1/live/").stdout
    finally:
        began = time.monotonic()
        running.kill(18)  # SIGCONT
    address(cast.boxes[0], record_property, began)
    process.wait_for(
        lambda: "node1" in etcdctl("get", "--prefix", "/podwire/v1/live/").stdout,
        PATIENCE,
        "the name to be taken again",
    )
    assert disks.runs()
