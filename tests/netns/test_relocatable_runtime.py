"""The executable on a node that has nothing: a root that holds the CNI folders and /dev/null, read-only.

the test                          the node (chroot in a mount namespace)
<folder>/opt/cni      ────────▶   /opt/cni         what podwire install laid down, for the node's paths
<folder>/run/podwire  ◀─ daemon   /run/podwire
<folder>/var/lib/podwire ─────▶   /var/lib/podwire the one folder that can be written
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.unit.install_fixtures import CONFIGURATION, RESULT, VARIABLES, VERSION_ANSWER, Node, short_folder

pytestmark = pytest.mark.skipif(not shutil.which("patchelf"), reason="needs patchelf (Debian: apt install patchelf)")

# The node's root, read-only but for the queue; then nothing of the machine is in sight.
ENTER = """set -e
mount --bind "$0" "$0"
cd "$0"
mount --bind /dev/null dev/null
mount --bind /proc/sys/kernel/random/boot_id proc/sys/kernel/random/boot_id
mount --bind var/lib/podwire var/lib/podwire
mount -o remount,bind,ro "$0"
exec chroot "$0" "$@"
"""


class BareNode(Node):
    """A node that is entered by chroot."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "relocatable", seen_as=Path("/"))
        for name in ("dev/null", "proc/sys/kernel/random/boot_id"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()
        (folder / "var/lib/podwire").mkdir(parents=True)

    def run(
        self, *words: str, variables: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a program of the node's."""
        enter = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", ENTER, str(self.folder)]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **(variables or {})}
        return subprocess.run([*enter, *words], env=environment, input=stdin, capture_output=True, check=False)

    def call(
        self, command: str, stdin: bytes = CONFIGURATION, variables: Mapping[str, str] = VARIABLES
    ) -> subprocess.CompletedProcess[bytes]:
        """One call, as a runtime of the node makes it."""
        return self.run("/opt/cni/bin/podwire", variables={**variables, "CNI_COMMAND": command}, stdin=stdin)


@pytest.fixture(scope="module")
def node() -> Iterator[BareNode]:
    with short_folder() as folder:
        node = BareNode(folder)
        node.install()
        yield node


def test_nothing_else_runs_there(node: BareNode) -> None:
    assert node.run("/usr/bin/python3", "-c", "pass").returncode == 127
    assert node.run("/bin/sh", "-c", "true").returncode == 127


def test_one_that_needs_the_nodes_python_does_not_run(node: BareNode) -> None:
    node.install(runtime="system")
    assert node.call("VERSION").returncode == 127
    node.install()
    assert node.call("VERSION").returncode == 0


def test_what_needs_no_daemon(node: BareNode) -> None:
    done = node.call("VERSION")
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION_ANSWER, b"")


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
def test_the_daemon_is_asked(command: str, node: BareNode) -> None:
    with node.daemon():
        done = node.call(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, RESULT, b"")


@pytest.mark.parametrize(("command", "stdin", "code"), [("ADD", b"\0{", 11), ("STATUS", b"", 50), ("NONE", b"\xff", 4)])
def test_errors_are_told(command: str, stdin: bytes, code: int, node: BareNode) -> None:
    done = node.call(command, stdin)
    assert (done.returncode, done.stderr) == (1, b"")
    assert json.loads(done.stdout)["code"] == code


def test_a_deletion_is_queued_without_the_daemon(node: BareNode) -> None:
    assert node.call("DEL").stdout == b""
    (queued,) = node.queue.iterdir()
    assert b"c0ffee" in queued.read_bytes()
    queued.unlink()


def test_a_bin_directory_that_is_mounted_alone_is_refused() -> None:
    """What lies beside it would be the container's, and the node would have an executable without a runtime."""
    with short_folder() as folder:
        (folder / "bin").mkdir()
        flags = f"--cni-bin-dir {folder}/bin --cni-conf-dir {folder}/net.d --host-cni-bin-dir /opt/cni/bin"
        script = f"mount --bind {folder}/bin {folder}/bin && exec {sys.executable} -m podwire.cli.main install {flags}"
        enter = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script]
        done = subprocess.run(enter, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "mount the node's /opt/cni instead" in done.stderr
        assert sorted(path.name for path in folder.rglob("*")) == ["bin"]


def test_nothing_is_left_after_uninstalling() -> None:
    with short_folder() as folder:
        node = BareNode(folder)
        before = node.files()
        node.install()
        assert node.call("VERSION").returncode == 0
        node.uninstall()
        assert [name for name in node.files() if name not in before] == ["etc/cni/net.d", "opt/cni/bin"]
