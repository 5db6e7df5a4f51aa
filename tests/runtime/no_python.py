"""A node that has no Python, as most distributions' nodes have none.

    the node's mount namespace ──(/run/containerd shared)──▶ the runtime's mount namespace: /usr without Python
        the daemon, which brings its own Python                  containerd, and the CNI executable that it starts

A daemon comes in an image with a Python of its own; a runtime starts the CNI executable among the node's own files. So
Python is hidden from the runtime alone, in a mount namespace of its own below the node's: over /usr lies an overlay in
which every interpreter is deleted; over standard libraries, over the home folder and over what PATH has elsewhere lies
an empty folder. What the runtime mounts under /run/containerd (its network namespaces) shows up on the node, as it does
in a daemon's image. It takes about 0.1 s.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from podwire.errors import PodwireError
from podwire.lab import node, process
from podwire.lab.state import LabState

_PATIENCE = 90.0
_SYSTEM = Path("/usr")
# The overlay's upper folder is on a tmpfs of its own: it may not be on another overlay, as a container's root is.
_HOLDER = """\
set -e
mkdir -p {scratch} {scratch}.empty
mount -t tmpfs tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work
mount -t overlay overlay -o lowerdir=/usr,upperdir={scratch}/upper,workdir={scratch}/work /usr
rm -f /usr/bin/python* /usr/bin/pypy* /usr/local/bin/python* /usr/lib/*/libpython* /usr/local/lib/libpython*
for folder in /usr/lib/python* /usr/local/lib/python* {foreign}; do
  test ! -d $folder || mount --bind {scratch}.empty $folder
done
umount -l {scratch}
touch {ready}
exec sleep infinity
"""


def hide_python(lab: LabState, name: str) -> list[str]:
    """Makes a place on the node in which there is no Python; the words before a command that runs there.

    It lasts until `lab down`. Only a runtime started later, and there, is without Python. Raises PodwireError.
    """
    files = lab.files
    folder = files.node_folder(name) / "no-python"
    folder.mkdir()
    role, ready = f"no-python-{name}", folder / "ready"
    _run([*node.enter_command(lab, name), "mount", "--make-shared", "/run/containerd"])
    script = _HOLDER.format(scratch=folder / "usr", foreign=shlex.join(_foreign_folders()), ready=ready)
    enter = [*node.enter_command(lab, name), "unshare", "--mount", "--propagation", "unchanged"]
    holder = process.start(files, role, [*enter, "sh", "-c", script])

    def is_ready() -> bool:
        if not holder.alive:
            raise PodwireError(f"Python could not be hidden on {name}:{process.last_lines(files.log(role))}")
        return ready.exists()

    process.wait_for(is_ready, _PATIENCE, f"{name} to be without Python")
    return ["nsenter", f"--net={lab.netns(name)}", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]


def _foreign_folders() -> list[str]:
    """Where there may be a Python outside of /usr, outer folders first."""
    on_path = [
        Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if any(Path(entry).glob("python*"))
    ]
    folders = {path.resolve() for path in (Path(sys.prefix), Path(sys.base_prefix), Path.home(), *on_path)}
    return sorted(str(folder) for folder in folders if not folder.is_relative_to(_SYSTEM) and folder != Path("/"))


def pythons(enter: list[str]) -> list[str]:
    """The Pythons that can be started in a place, of those that are on a PATH or that this test runs on."""
    found = []
    words = ("python", "python3", f"python3.{sys.version_info.minor}", sys.executable, "/usr/bin/python3")
    for word in words:
        done = subprocess.run([*enter, word, "-c", "print(6 * 7)"], capture_output=True, text=True, check=False)
        if done.stdout.strip() == "42":
            found.append(word)
    return found


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PodwireError(f"{' '.join(words)}: {done.stderr.strip()}")
