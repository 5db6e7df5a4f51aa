"""DELs that the executable has queued: owed until they are done, and set aside only when they can never be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipam_daemon.delqueue import DelQueue
from ipam_daemon.errors import CniError, PlumbingFailed, TryAgainLater
from ipam_daemon.identity import boottime_ns
from podwire.v1 import cni_pb2
from tests.netns.node_fixtures import Engine, engine, play, pods

CONFIG = {"cniVersion": "1.1.0", "name": "podnet", "type": "podwire"}
PASSING: dict[str, CniError | OSError] = {
    "the kernel refuses to take the wire down": PlumbingFailed("taking it down: EBUSY"),
    "the node is not ready": TryAgainLater("not yet"),
    "no more files can be opened": OSError(24, "Too many open files"),
}


def queue_of(it: Engine, folder: Path, stdin: bytes, ifname: str = "eth0") -> DelQueue:
    """A queue with the DEL of container `a`."""
    request = cni_pb2.CallRequest(
        command="DEL", container_id="a", ifname=ifname, stdin=stdin, issued_at=boottime_ns(), boot_id="boot-1"
    )
    folder.mkdir()
    (folder / "1.del").write_bytes(request.SerializeToString())
    return DelQueue(folder, it.attachments, it.metrics, "boot-1")


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING.keys())
def test_a_del_that_fails_is_owed_until_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            with pods(1) as (a,):
                await it.add("a", a.path)
                queue = queue_of(it, tmp_path / "queue", json.dumps(CONFIG).encode())

                def refused(_: str) -> None:
                    raise error

                with monkeypatch.context() as patched:
                    patched.setattr(it.wires, "kill", refused)
                    for _ in range(2):
                        assert await queue.replay() == 0
                        assert (queue.waiting, queue.unreadable) == (("1.del",), ())
                assert len(it.journal.attachments()) == 1
                assert await queue.replay() == 1
                assert (queue.waiting, queue.unreadable) == ((), ())
                assert it.journal.attachments() == ()
                await it.reap()

    play(story)


NEVER = {"no configuration": (b"{", "eth0"), "an interface that is a path": (json.dumps(CONFIG).encode(), "a/b")}


@pytest.mark.parametrize(("stdin", "ifname"), NEVER.values(), ids=NEVER.keys())
def test_what_can_never_be_done_is_set_aside(tmp_path: Path, stdin: bytes, ifname: str) -> None:
    async def story() -> None:
        async with engine(tmp_path) as it:
            queue = queue_of(it, tmp_path / "queue", stdin, ifname)
            assert await queue.replay() == 0
            assert (queue.waiting, queue.unreadable) == ((), ("1.bad",))

    play(story)
