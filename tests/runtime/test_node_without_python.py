"""A node whose runtime finds no Python at all: the CNI executable brings the one that it needs.

containerd's environment is a hostile one besides, since a plugin inherits it.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import podwire
from podwire import install as installation
from podwire.lab import node, process
from podwire.lab.state import LabState
from podwire.lab.talk import ask
from tests.runtime.containerd import LOOPBACK, PATIENCE, Containerd
from tests.runtime.no_python import hide_python, pythons
from tests.runtime.pods import Pods, crowd, pings

CALLERS = 4
TRAPS = ("errno", "os", "select", "socket", "struct", "sitecustomize")
"""Modules that lie about wherever a Python that is not on its guard would look for them."""


@pytest.fixture(scope="module")
def place(lab: LabState) -> list[str]:
    """The words before a command that runs on the first node, where there is no Python."""
    return hide_python(lab, "node1")


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules that end whoever imports them."""
    folder = tmp_path_factory.mktemp("traps")
    for name in TRAPS:
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the environment was imported')\n")
    return folder


def hostile(traps: Path) -> list[str]:
    """The words before a command that runs in an environment which misleads a Python."""
    return ["env", "-C", str(traps), f"PYTHONPATH={traps}", "PYTHONHOME=/nowhere", "PYTHONSTARTUP=os.py"]


@pytest.fixture(scope="module")
def runtimes(
    lab: LabState, place: list[str], traps: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Containerd]:
    """containerd where there is no Python, in a hostile environment and among traps."""
    runtime = Containerd(lab, "node1", [*place, *hostile(traps)])
    runtime.start()
    runtime.load_image(tmp_path_factory.mktemp("image") / "image.tar")
    return {"node1": runtime}


@pytest.fixture(scope="module")
def lay_down(lab: LabState) -> Callable[..., Path]:
    """`podwire install` on the first node, with the arguments given."""

    def install(**arguments: Any) -> Path:
        return installation.install(
            cni_bin_dir=lab.files.node_path("node1", "/opt/cni/bin"),
            cni_conf_dir=lab.files.node_path("node1", "/etc/cni/net.d"),
            socket=lab.files.ipamd_socket("node1"),
            queue_dir=lab.files.node_path("node1", "/var/lib/podwire") / "del-queue",
            **arguments,
        )

    return install


@pytest.fixture
def installed(lay_down: Callable[..., Path], runtimes: dict[str, Containerd]) -> Path:
    """The executable with the runtime that it brings, and a containerd that has seen its configuration."""
    if shutil.which("patchelf") is None:
        pytest.skip("runtime: needs patchelf")
    executable = lay_down(runtime="relocatable")
    ready = runtimes["node1"].cri.conditions
    process.wait_for(lambda: all(ready().values()), PATIENCE, "containerd to take the network for ready")
    return executable


def versions(lab: LabState) -> list[Path]:
    """The folders of the versions that are there, by name."""
    folder = lab.files.node_path("node1", "/opt/cni") / "podwire"
    return sorted(path for path in folder.iterdir() if path.is_dir())


def status(enter: Sequence[str]) -> int:
    """The exit code of the executable when asked whether an ADD could succeed, which it asks the daemon."""
    words = [*enter, "env", "CNI_COMMAND=STATUS", "CNI_PATH=/opt/cni/bin", "/opt/cni/bin/podwire"]
    configuration = b'{"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}'
    return subprocess.run(words, capture_output=True, input=configuration, check=False).returncode


def test_an_executable_that_needs_the_nodes_python_does_not_start_there(
    lab: LabState, place: list[str], lay_down: Callable[..., Path]
) -> None:
    lay_down()
    assert pythons(place) == []
    assert status(node.enter_command(lab, "node1")) == 0
    assert status(place) != 0


@pytest.mark.usefixtures("installed")
def test_one_that_brings_its_own_starts_in_every_environment(lab: LabState, place: list[str], traps: Path) -> None:
    # A preload that is there would run, whatever starts; containerd itself does not even bear one that is missing.
    missing = ["LD_PRELOAD=/nowhere/missing.so", f"LD_LIBRARY_PATH={traps}", "LC_ALL=ja_JP.EUC-JP"]
    assert pythons([*node.enter_command(lab, "node1"), *hostile(traps)]) == [], "no other Python bears it"
    for each in (place, [*place, *hostile(traps)], [*place, *hostile(traps), "env", *missing]):
        assert status(each) == 0, each


@pytest.mark.usefixtures("installed")
def test_sandboxes_have_a_network_there(pods: Pods, peer: str) -> None:
    first, second = pods.run(), pods.run()
    sandbox, other = pods.inspect(first), pods.inspect(second)
    assert pings(sandbox.process_netns, other.address)
    assert ask(sandbox.process_netns, peer, 8080).client == sandbox.address
    pods.stop(first)
    assert not pods.attached(first)
    assert pods.attached(second)


@pytest.mark.usefixtures("installed")
def test_without_the_daemon_a_deletion_is_queued_there_too(lab: LabState, pods: Pods) -> None:
    pod = pods.run()
    node.kill_daemon(lab, "node1")
    pods.stop(pod)
    node.start_daemon(lab, "node1")
    node.wait_daemon(lab, "node1")
    assert not pods.attached(pod)


@pytest.mark.usefixtures("installed")
def test_an_upgrade_fails_no_call(
    lab: LabState, pods: Pods, lay_down: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    over, done = threading.Event(), []

    def keep_calling() -> None:
        while not over.is_set():
            pod = pods.run()
            pods.stop(pod)
            pods.remove(pod)
            done.append(pod)

    def has_served(before: int) -> bool:
        return len(done) >= before + 2 * CALLERS or any(each.done() for each in calling)

    with ThreadPoolExecutor(CALLERS) as kubelet:
        calling = [kubelet.submit(keep_calling) for _ in range(CALLERS)]
        try:
            for version in ("9.0.1", "9.0.2", "9.0.3"):
                monkeypatch.setattr(podwire, "__version__", version)
                executable, before = lay_down(runtime="relocatable"), len(done)
                process.wait_for(partial(has_served, before), PATIENCE, "calls of the new version")
        finally:
            over.set()
        for each in calling:
            each.result()  # raises what a call raised
    assert "/podwire/9.0.3-" in executable.read_text().splitlines()[0]
    lay_down(runtime="relocatable", grace=0)
    assert [folder.name.split("-")[0] for folder in versions(lab)] == ["9.0.3"], "what is superseded goes"


@pytest.mark.usefixtures("installed")
def test_uninstalling_leaves_nothing(lab: LabState, pods: Pods, runtimes: dict[str, Containerd]) -> None:
    pod = pods.run()
    pods.stop(pod)
    pods.remove(pod)
    node_path = lab.files.node_path
    bin_dir, conf_dir = node_path("node1", "/opt/cni/bin"), node_path("node1", "/etc/cni/net.d")
    queue = node_path("node1", "/var/lib/podwire") / "del-queue"
    installation.uninstall(bin_dir, conf_dir, queue)
    assert [path.name for path in bin_dir.iterdir()] == [LOOPBACK.name], "the plugins of others stay"
    assert [path.name for path in bin_dir.parent.iterdir()] == [bin_dir.name]
    assert not any(conf_dir.iterdir())
    assert not queue.exists()
    ready = runtimes["node1"].cri.conditions
    process.wait_for(lambda: not ready()["NetworkReady"], PATIENCE, "containerd to miss the network")


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_fifty_pods_at_once_there(pods: Pods) -> None:
    crowd(pods, 50)
