"""The queue's promise: success is told when the deletion is on disk, and until then nothing looks like one."""

from __future__ import annotations

import errno
import os
import posix
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cni_plugin import queue
from cni_plugin.environment import Environment
from cni_plugin.errors import QueueError

DELETION = Environment(b"DEL", b"c0ffee", b"", b"eth0")


class Disk:
    """The real system calls, in the order in which they were made, one of them failing if need be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing
        watched = {name: self.watch(name) for name in ("mkdir", "write", "fsync", "rename")}
        monkeypatch.setattr(queue, "posix", SimpleNamespace(**{**vars(posix), **watched}))

    def watch(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            what = f"{name} {'folder' if name == 'fsync' and _is_folder(arguments[0]) else 'file'}"
            self.calls.append(what)
            if what == self.failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return getattr(posix, name)(*arguments)

        return call


def _is_folder(descriptor: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    queue.enqueue(str(tmp_path), DELETION, b"{}", 7)
    assert disk.calls == ["mkdir file", "write file", "fsync file", "rename file", "fsync folder"]


def test_folders_that_are_made_are_synced_too(tmp_path: Path) -> None:
    path = queue.enqueue(f"{tmp_path}/lib/podwire/queue", DELETION, b"{}", 7)
    assert Path(path).parent == tmp_path / "lib" / "podwire" / "queue"
    assert [found.suffix for found in Path(path).parent.iterdir()] == [".del"]


@pytest.mark.parametrize("failing", ["write file", "fsync file", "rename file"])
def test_a_disk_that_fails_on_the_way_leaves_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, failing)
    with pytest.raises(QueueError, match="No space left"):
        queue.enqueue(str(tmp_path), DELETION, b"{}", 7)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may survive all the same: a deletion that is replayed needlessly does no harm, a lost one does."""
    Disk(monkeypatch, "fsync folder")
    with pytest.raises(QueueError, match="No space left"):
        queue.enqueue(str(tmp_path), DELETION, b"{}", 7)


def test_without_a_boot_id_there_is_no_telling_when_it_was_issued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BOOT_ID", str(tmp_path / "none"))
    with pytest.raises(QueueError, match="No such file"):
        queue.enqueue(str(tmp_path / "queue"), DELETION, b"{}", 7)
    assert list(tmp_path.iterdir()) == []
