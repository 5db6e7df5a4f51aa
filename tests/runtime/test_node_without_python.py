"""A node whose runtime finds no Python at all: the CNI executable brings the one that it needs.

containerd's environment is a hostile one besides, since a plugin inherits it.
"""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podwire import install as installation
from podwire.lab import node
from podwire.lab.state import LabState
from podwire.lab.talk import ask
from tests.runtime.containerd import Containerd
from tests.runtime.no_python import hide_python, pythons
from tests.runtime.pods import Pods, crowd, pings

OFFERED = "runtime" in inspect.signature(installation.install).parameters
relocatable = pytest.mark.skipif(not OFFERED, reason="needs an install() that offers a relocatable runtime")
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


@pytest.fixture(scope="module")
def runtimes(
    lab: LabState, place: list[str], traps: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Containerd]:
    """containerd where there is no Python, in a hostile environment and among traps."""
    preload = "LD_PRELOAD=/nowhere/missing.so"
    hostile = ["env", "-C", str(traps), f"PYTHONPATH={traps}", "PYTHONHOME=/nowhere", "PYTHONSTARTUP=os.py", preload]
    runtime = Containerd(lab, "node1", [*place, *hostile])
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


@pytest.fixture(scope="module")
def installed(lay_down: Callable[..., Path]) -> Path:
    """The executable with the runtime that it brings."""
    return lay_down(runtime="relocatable")


def version(enter: list[str]) -> int:
    """The exit code of the executable when asked for the versions that it speaks."""
    words = [*enter, "env", "CNI_COMMAND=VERSION", "/opt/cni/bin/podwire"]
    return subprocess.run(words, capture_output=True, input=b"{}", check=False).returncode


def test_an_executable_that_needs_the_nodes_python_does_not_start_there(lab: LabState, place: list[str]) -> None:
    assert pythons(place) == []
    assert version(node.enter_command(lab, "node1")) == 0
    assert version(place) != 0


@relocatable
@pytest.mark.usefixtures("installed")
def test_sandboxes_have_a_network_there(pods: Pods, peer: str) -> None:
    first, second = pods.run(), pods.run()
    sandbox, other = pods.inspect(first), pods.inspect(second)
    assert pings(sandbox.process_netns, other.address)
    assert ask(sandbox.process_netns, peer, 8080).client == sandbox.address
    pods.stop(first)
    assert not pods.attached(first)
    assert pods.attached(second)


@relocatable
@pytest.mark.usefixtures("installed")
def test_without_the_daemon_a_deletion_is_queued_there_too(lab: LabState, pods: Pods) -> None:
    pod = pods.run()
    node.kill_daemon(lab, "node1")
    pods.stop(pod)
    node.start_daemon(lab, "node1")
    node.wait_daemon(lab, "node1")
    assert not pods.attached(pod)


@relocatable
@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_fifty_pods_at_once_there(pods: Pods) -> None:
    crowd(pods, 50)
