"""Debian's containerd on a node of the lab, with both of its faces: `ctr` and the Container Runtime Interface.

It runs in the node's namespaces and keeps its things, network namespaces included, in the node's own /run/containerd
and /var/lib/containerd, so nothing of it shows on the machine. What `lab down` has to find carries the lab's mark:
containerd and its shims by inheritance, the containers because the image says so. Control groups are the machine's, and
are under one named like the lab.

It starts in about 0.2 s and runs a sandbox in 0.1 to 0.2 s.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import grpc

from podwire.lab import node, process
from podwire.lab.process import Process
from podwire.lab.state import MARK, LabState
from tests.runtime.cri import Cri
from tests.runtime.image import REFERENCE, write_image

PATIENCE = 120.0
LOOPBACK = Path("/usr/lib/cni/loopback")
"""What containerd attaches to every sandbox before the network; of Debian's containernetworking-plugins."""
CGROUPS = Path("/sys/fs/cgroup")
_SOCKET = "/run/containerd/containerd.sock"
_RUN_MARK = "PODWIRE_TEST_RUN"
# oom_score_adj below one's own takes CAP_SYS_RESOURCE, which a container that the tests run in may lack.
_CONFIG = f"""
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]

[plugins."io.containerd.grpc.v1.cri"]
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  sandbox_image = "{REFERENCE}"
"""


class Containerd:
    """containerd on a node. `enter` is the words before a command that runs where it does, if that is not the node."""

    def __init__(self, lab: LabState, name: str, enter: Sequence[str] = ()) -> None:
        self.lab = lab
        self.name = name
        self._enter = tuple(enter or node.enter_command(lab, name))
        self._process: Process | None = None
        self._cri: Cri | None = None

    @property
    def cri(self) -> Cri:
        """A client of the containerd that runs now."""
        assert self._cri is not None, f"containerd of {self.name} does not run"
        return self._cri

    @property
    def running(self) -> bool:
        """Whether it has been started and not ended."""
        return self._cri is not None

    def start(self) -> None:
        """Starts it, and waits until it takes itself and its network for ready."""
        config = self.lab.files.node_folder(self.name) / "containerd.toml"
        config.write_text(_CONFIG)
        command = [*self._enter, "containerd", "--config", str(config)]
        self._process = process.start(self.lab.files, f"containerd-{self.name}", command)
        process.wait_for(self._connects, PATIENCE, f"containerd of {self.name}")

    def _connects(self) -> bool:
        cri = Cri(self.lab.files.node_path(self.name, _SOCKET))
        with contextlib.suppress(grpc.RpcError):
            if all(cri.conditions().values()):
                self._cri = cri
                return True
        cri.close()
        return False

    def load_image(self, archive: Path) -> None:
        """Makes the image known to both faces. Its containers carry the marks of the lab and of this test run."""
        write_image(archive, {_RUN_MARK: os.environ.get(_RUN_MARK, ""), MARK: self.lab.name})
        for namespace in (self.lab.name, "k8s.io"):
            done = self.command("ctr", "--address", _SOCKET, "--namespace", namespace, "image", "import", str(archive))
            assert done.returncode == 0, done.stderr
        process.wait_for(lambda: self.cri.has_image(REFERENCE), PATIENCE, "the pause image")

    def stop(self) -> None:
        """Ends it as an upgrade does. Its containers run on."""
        self._end(15)

    def kill(self) -> None:
        """Ends it as a crash does. Its containers run on."""
        self._end(9)

    def _end(self, with_signal: int) -> None:
        assert self._process is not None
        self.cri.close()
        self._cri = None
        self._process.kill(with_signal)
        assert self._process.wait_gone(PATIENCE)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command where containerd does."""
        return subprocess.run([*self._enter, *words], capture_output=True, text=True, timeout=PATIENCE, check=False)

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs containerd's own client, which is also what execs the CNI plugin then."""
        return self.command("ctr", "--address", _SOCKET, "--namespace", self.lab.name, *arguments)

    def run(self, container: str, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Runs a container by `ctr run --cni`."""
        return self.ctr("run", "--cni", *options, REFERENCE, container, "/bin/sh", "-c", script)


def remove_cgroups(lab: str) -> None:
    """Removes the control groups of a lab's containers; runc leaves the one that they are in, a killed shim all.

    One is busy for as long as the kernel has not done with its last process.
    """

    def are_gone() -> bool:
        groups = [os.path.join(folder, lab) for folder, inner, _ in os.walk(CGROUPS) if lab in inner]
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        return not groups

    process.wait_for(are_gone, PATIENCE, "the control groups to go")
