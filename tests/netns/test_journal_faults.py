"""The journal's file damaged, removed, overwritten. A ping and a stream of a pod run through every fault."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ipam_daemon import journal
from podwire.lab import node, process
from tests.netns.containers import pod_links
from tests.netns.disks import FREE, LOSSLESS, ONCE, PATIENCE, Cast, Disks, Record, add_again, address


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
    process.wait_for(lambda: disks.held() == 3, PATIENCE, "the wire of the DEL to be gone, and no other")


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
