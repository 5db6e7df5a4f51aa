"""Full disks and read-only disks. A ping and a stream of a pod run through every fault."""

from __future__ import annotations

import time

import pytest

from podwire.lab import node, process
from tests.netns.containers import Answer, on_node
from tests.netns.disks import FREE, LOSSLESS, ONCE, PATIENCE, TRUE, Cast, Disks, Record, add_again, fill, mount


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
