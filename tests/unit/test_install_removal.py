"""`podwire uninstall`: what is gone, what stays, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podwire.cli.main import main
from podwire.install import UninstallError
from tests.unit.install_fixtures import RUNTIMES, SECONDS, Node, short_folder, wait_until

CONFLIST = "etc/cni/net.d/10-podwire.conflist"


@pytest.fixture(params=RUNTIMES)
def any_node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with short_folder() as folder:
        yield Node(folder, request.param)


@pytest.fixture
def node() -> Iterator[Node]:
    with short_folder() as folder:
        yield Node(folder)


def queue_deletion(node: Node) -> Path:
    """A DEL that nobody answers."""
    assert node.call("DEL").returncode == 0
    (queued,) = node.queue.iterdir()
    return queued


# --- what is gone ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_and_nothing_else_is_touched(any_node: Node) -> None:
    others = ["opt/cni/bin/loopback", "opt/cni/LICENSE", "etc/cni/net.d/87-other.conflist", "var/lib/podwire/node-id"]
    for name in others:
        (any_node.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (any_node.folder / name).write_text(name)
    before = any_node.files()
    any_node.install(network="green")
    any_node.queue.mkdir()
    removal = any_node.uninstall(network="green")
    assert any_node.files() == before
    assert all((any_node.folder / name).read_text() == name for name in others)
    assert removal.kept == ()
    assert [str(path.relative_to(any_node.folder)).partition("-")[0] for path in removal.removed] == [
        "etc/cni/net.d/10",
        "opt/cni/bin/podwire",
        "opt/cni/podwire/0.1.0",
        "opt/cni/podwire",
        "var/lib/podwire/del",
    ]


def test_removing_what_is_not_there(any_node: Node) -> None:
    assert any_node.uninstall().removed == ()
    any_node.install()
    any_node.uninstall()
    after = any_node.files()
    removal = any_node.uninstall()
    assert (removal.removed, removal.kept) == ((), ())
    assert any_node.files() == after


def test_it_goes_on_where_another_attempt_stopped(any_node: Node) -> None:
    executable = any_node.install()
    executable.unlink()
    (any_node.folder / "opt/cni/podwire/.1-0123456789ab.0123456789ab.tmp").mkdir()
    any_node.uninstall()
    assert any_node.files() == ["etc/cni/net.d", "opt/cni/bin", "run/podwire", "var/lib/podwire/del-queue"][:3]


# --- what stays -----------------------------------------------------------------------------------------------------

FOREIGN = {
    "of another name": ({"name": "blue", "plugins": [{"type": "podwire"}]}, "the network 'blue', not 'podwire'"),
    "of another type": ({"name": "podwire", "plugins": [{"type": "bridge"}]}, "no plugin of type podwire"),
    "of no plugin": ({"name": "podwire", "plugins": []}, "no plugin of type podwire"),
    "that is none": (["podwire"], "no network configuration list"),
    "of odd plugins": ({"name": "podwire", "plugins": ["podwire"]}, "no network configuration list"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_configuration_of_our_file_name(case: str, node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    content, reason = FOREIGN[case]
    node.install()
    (node.folder / CONFLIST).write_text(json.dumps(content))
    flags = ["--cni-bin-dir", str(node.bin_dir), "--cni-conf-dir", str(node.conf_dir), "--queue-dir", str(node.queue)]
    assert main(["uninstall", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("left ")] == [
        line for line in said if str(node.folder / CONFLIST) in line and reason in line
    ]
    assert node.files() == [CONFLIST, "opt/cni/bin", "run/podwire"]


def test_an_executable_and_a_folder_of_our_name(node: Node) -> None:
    node.install()
    (node.bin_dir / "podwire").write_text("#!/bin/sh\n# Another plugin\n")
    (node.folder / "opt/cni/podwire/notes").write_text("")
    removal = node.uninstall()
    assert [(path.name, reason) for path, reason in removal.kept] == [
        ("podwire", "it was not written by podwire install"),
        ("podwire", "it holds what is not ours: notes"),
    ]
    assert node.files() == ["etc/cni/net.d", "opt/cni/bin/podwire", "opt/cni/podwire/notes", "run/podwire"]


# --- deletions that wait, calls that run ----------------------------------------------------------------------------


def test_deletions_that_are_owed_are_not_thrown_away_unasked(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.install()
    queue_deletion(node)
    before = node.files()
    flags = ["--cni-bin-dir", str(node.bin_dir), "--cni-conf-dir", str(node.conf_dir), "--queue-dir", str(node.queue)]
    assert main(["uninstall", *flags]) == 1
    said = capsys.readouterr().err
    assert f"1 deletions wait in {node.queue}" in said
    assert "--force" in said
    assert node.files() == before
    assert main(["uninstall", *flags, "--force"]) == 0
    assert node.files() == ["etc/cni/net.d", "opt/cni/bin", "run/podwire", "var/lib/podwire"]


def test_a_call_under_way_ends_first_and_its_deletion_is_not_lost(any_node: Node) -> None:
    any_node.install()
    with any_node.daemon() as daemon:
        daemon.hung = daemon.fails = True
        with any_node.calling("DEL") as call, ThreadPoolExecutor(1) as pool:
            assert daemon.called.wait(SECONDS)
            removal = pool.submit(any_node.uninstall)
            wait_until(lambda: not (any_node.bin_dir / "podwire").exists(), "the removal's beginning")
            daemon.released.set()
            with pytest.raises(UninstallError, match="1 deletions have come into"):
                removal.result(SECONDS)
            assert (call.wait(SECONDS), call.communicate()) == (0, (b"", b""))
    assert [Path(name).parent.name for name in any_node.files()] == ["cni", "cni", "run", "del-queue"]


def test_a_call_that_does_not_end_keeps_its_version(any_node: Node) -> None:
    any_node.install()
    with any_node.daemon() as daemon:
        daemon.hung = True
        with any_node.calling("ADD") as call:
            assert daemon.called.wait(SECONDS)
            with pytest.raises(UninstallError, match=rf"in use by the processes \[{call.pid}\]"):
                any_node.uninstall(patience=0)
            assert not (any_node.bin_dir / "podwire").exists()
            assert len(any_node.versions()) == 1
            daemon.released.set()
            assert call.wait(SECONDS) == 0
    any_node.uninstall()
    assert any_node.files() == ["etc/cni/net.d", "opt/cni/bin", "run/podwire"]
