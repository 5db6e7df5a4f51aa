"""Versions side by side: which stay, which go, and what a call notices of it (nothing)."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

import podwire
from tests.unit.install_fixtures import RESULT, RUNTIMES, SECONDS, VERSION_ANSWER, Node, RuntimeName, short_folder

CALLERS = 4  # without a pause, so that more would not call more often, and leave who installs no processor
CALLS = 20  # at least, with each version


@pytest.fixture(params=RUNTIMES)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with short_folder() as folder:
        yield Node(folder, request.param)


# --- which stay and which go ----------------------------------------------------------------------------------------


def test_the_version_before_stays_for_calls_that_have_just_begun(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1", "2", "3"):
        monkeypatch.setattr(podwire, "__version__", version)
        node.install()
    assert node.versions() == ["1", "2", "3"]


def test_what_nothing_has_named_for_long_goes_with_the_next_installation(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        monkeypatch.setattr(podwire, "__version__", version)
        node.install()
    (stamp,) = (node.folder / "opt/cni/podwire").glob("*/SUPERSEDED")
    os.utime(stamp, (0, 0))
    node.install()
    assert node.versions() == ["2"]


def test_a_version_that_comes_back_is_not_old(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1", "2", "1"):
        monkeypatch.setattr(podwire, "__version__", version)
        node.install()
    stamps = (node.folder / "opt/cni/podwire").glob("*/SUPERSEDED")
    assert [stamp.parent.name.rpartition("-")[0] for stamp in stamps] == ["2"]
    node.install(grace=0)
    assert node.versions() == ["1"]
    assert node.call("VERSION").stdout == VERSION_ANSWER


def test_attempts_that_were_cut_short_go_and_what_is_not_ours_stays(node: Node) -> None:
    versions = node.folder / "opt/cni/podwire"
    for name in (".1-0123456789ab.0123456789ab.tmp/lib", "1-0123456789ab/lib", "notes", "1-0123456789/lib"):
        (versions / name).mkdir(parents=True)
    (versions / "2-0123456789ab").write_text("a file")
    node.install(grace=0)
    kept = sorted(path.name for path in versions.iterdir() if not path.name.startswith(podwire.__version__))
    assert kept == ["1-0123456789", "2-0123456789ab", "notes"]


# --- while calls run ------------------------------------------------------------------------------------------------

OUTCOMES = {"is answered": SECONDS, "is given up": 1.0}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_call_under_way_keeps_its_version_until_it(outcome: str, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(podwire, "__version__", "1")
    node.install(seconds=OUTCOMES[outcome])
    with node.daemon() as daemon:
        daemon.hung = True
        with node.calling_daemon("ADD", daemon) as call:
            monkeypatch.setattr(podwire, "__version__", "2")
            node.install(grace=0)
            if outcome == "is answered":
                assert node.versions() == ["1", "2"]
                daemon.released.set()
            stdout, stderr = call.communicate(timeout=SECONDS)
    assert stderr == b""
    if outcome == "is answered":
        assert (call.returncode, stdout) == (0, RESULT)
    else:  # the modules of the error path are loaded now
        assert json.loads(stdout)["code"] == 11
    node.install(grace=0)
    assert node.versions() == ["2"]


UPGRADES: list[RuntimeName] = ["relocatable", "system", "relocatable", "relocatable", "system", "system"]


@pytest.mark.parametrize("node", RUNTIMES[:1], indirect=True)
def test_no_call_fails_while_the_executable_is_replaced(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers, each at VERSION and ADD without a pause, while version after version is installed.

    From every runtime to every other, so that shebang and content change each time.
    """
    node.install()
    over = threading.Event()
    served: list[int] = []

    def keep_calling() -> None:
        while not over.is_set():
            for command, answer in (("VERSION", VERSION_ANSWER), ("ADD", RESULT)):
                done = node.call(command)
                assert (done.returncode, done.stdout, done.stderr) == (0, answer, b""), (command, done)
                served.append(done.returncode)

    with node.daemon(), ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(keep_calling) for _ in range(CALLERS)]
        try:
            for number, runtime in enumerate(UPGRADES):
                monkeypatch.setattr(podwire, "__version__", f"{number}")
                node.install(runtime=runtime)
                before = len(served)
                while len(served) < before + CALLS and not any(caller.done() for caller in callers):
                    over.wait(0.01)
        finally:
            over.set()
        for caller in callers:
            caller.result()
    assert node.versions()[-1] == "5"
    node.install(runtime=UPGRADES[-1], grace=0)
    assert node.versions() == ["5"]


def test_an_interpreter_that_meets_the_script_of_another_version(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads the shebang of the old script, and the interpreter that it starts opens the new one."""
    shebang = node.install().read_text().splitlines()[0].removeprefix("#!").split()
    monkeypatch.setattr(podwire, "__version__", "2")
    for runtime in get_args(RuntimeName):
        script = node.install(runtime=runtime)
        done = subprocess.run([*shebang, script], env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, VERSION_ANSWER, b""), runtime


def test_the_executable_is_never_open_for_writing_under_its_name(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = node.install()
    before = executable.read_bytes()
    with executable.open("rb") as running:
        inode = os.fstat(running.fileno()).st_ino
        monkeypatch.setattr(podwire, "__version__", "2")
        node.install()
        assert running.read() == before
    assert executable.stat().st_ino != inode
    assert [path.name for path in Path(executable.parent).iterdir()] == ["podwire"]
