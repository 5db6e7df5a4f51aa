"""Where things lie on a node, and what the two texts say that a runtime reads: the executable and the conflist.

A node's folders may be mounted elsewhere while we install (a DaemonSet sees the node's /opt/cni as /host/opt/cni). What
is written is written where we see it; what the files say (shebang, loader, search path) is where the node sees it.

**A script is opened twice**: by the kernel, which reads the first line, and by the interpreter, which is told the path.
An upgrade may come between the two, and the interpreter of one version then runs the script of another. So the script
does with any interpreter: it appends the folder of its own modules, where one that has none finds them as sources,
while one that brings modules keeps to those. Its parameters to `main` must be ones that older versions know.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from podwire.install.errors import InstallError

BIN_DIR = Path("/opt/cni/bin")
CONF_DIR = Path("/etc/cni/net.d")
SOCKET = Path("/run/podwire/ipamd.sock")
QUEUE_DIR = Path("/var/lib/podwire/del-queue")
NETWORK = "podwire"

EXECUTABLE = "podwire"
CONFLIST = "10-podwire.conflist"
MARK = b"# Podwire's CNI executable, written by `podwire install`"
"""What the second line of our executable begins with."""

_SHEBANG_LIMIT = 127  # kernels before 5.1 cut a first line there: BINPRM_BUF_SIZE
_SUN_PATH = 107  # unix(7), without the terminating zero
_CAPABILITIES = {"bandwidth": True, "ips": True, "mac": True, "portMappings": True}
_NETWORK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # CNI specification, § Network configuration

_SCRIPT = """\
#!{interpreter} {flags}
{mark}, which also overwrites it.
import sys

sys.path.append({folder!r})
sys.dont_write_bytecode = True
try:
    from cni_plugin.main import main
except Exception as error:
    told = '{{"cniVersion": "1.0.0", "code": 5, "msg": "the CNI plugin is damaged, install it again", "details": "%s"}}'
    print(told % ascii(str(error)).replace("\\\\", "/").replace('"', "'"))
    sys.exit(1)
main(socket={socket!r}, queue={queue!r}, deadlines={deadlines!r})
"""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The CNI bin directory as this process sees it and as the node sees it; both absolute."""

    bin_dir: Path
    node_bin_dir: Path

    @property
    def executable(self) -> Path:
        """What a runtime starts, where we see it."""
        return self.bin_dir / EXECUTABLE

    @property
    def node_executable(self) -> Path:
        """What a runtime starts, where the node sees it."""
        return self.node_bin_dir / EXECUTABLE

    @property
    def versions(self) -> Path:
        """The folder of versioned folders, where we see it."""
        return self.bin_dir.parent / "podwire"

    @property
    def node_versions(self) -> Path:
        """The folder of versioned folders, where the node sees it."""
        return self.node_bin_dir.parent / "podwire"


def layout(cni_bin_dir: Path, host_cni_bin_dir: Path | None = None) -> Layout:
    """The layout of a node whose CNI bin directory we see as `cni_bin_dir`, and the node as `host_cni_bin_dir`.

    Raises InstallError when only the bin directory itself is the node's, so that what lies beside it would not be.
    """
    bin_dir = Path(os.path.abspath(cni_bin_dir))
    if host_cni_bin_dir is None:
        return Layout(bin_dir=bin_dir, node_bin_dir=bin_dir)
    if not host_cni_bin_dir.is_absolute():
        raise InstallError(f"the node's CNI bin directory {str(host_cni_bin_dir)!r} must be an absolute path")
    node_bin_dir = Path(os.path.normpath(host_cni_bin_dir))
    if bin_dir != node_bin_dir and str(bin_dir) in _mount_points():
        raise InstallError(
            f"{bin_dir} is a mount of its own, and the node would not see what is laid beside it: "
            f"mount the node's {node_bin_dir.parent} instead"
        )
    return Layout(bin_dir=bin_dir, node_bin_dir=node_bin_dir)


def script(
    interpreter: Path, flags: str, folder: Path, socket: Path, queue_dir: Path, deadlines: Mapping[str, float]
) -> bytes:
    """The executable. `folder` is where the node finds `cni_plugin`, for interpreters that have none."""
    return _SCRIPT.format(
        interpreter=interpreter,
        flags=flags,
        mark=MARK.decode(),
        folder=str(folder),
        socket=str(socket),
        queue=str(queue_dir),
        deadlines=dict(deadlines),
    ).encode()


def conflist(network: str) -> bytes:
    """The network configuration list. It offers 1.1.0 beside 1.0.0: containerd 1.6 and 1.7 reject 1.1.0 alone. `last`
    is Podwire's: nothing follows (ipam_daemon/cni.py)."""
    configuration = {
        "name": network,
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "plugins": [{"type": EXECUTABLE, "capabilities": _CAPABILITIES, "last": True}],
    }
    return json.dumps(configuration, indent=2).encode() + b"\n"


def check_shebang(interpreter: Path, flags: str) -> None:
    """Raises InstallError when the kernel would not find `interpreter` and `flags` in a script's first line."""
    text = str(interpreter)
    if not interpreter.is_absolute() or any(character.isspace() for character in text):
        raise InstallError(
            f"the Python {text!r} must be an absolute path without white space, a shebang takes no other"
        )
    if len(os.fsencode(f"#!{text} {flags}")) > _SHEBANG_LIMIT:
        raise InstallError(
            f"the Python {text!r} makes a shebang longer than {_SHEBANG_LIMIT} bytes; link to it from nearer"
        )


def check_settings(socket: Path, queue_dir: Path, network: str) -> None:
    """Raises InstallError when the executable or a runtime could not use what it would be told."""
    for name, path in (("socket", socket), ("queue directory", queue_dir)):
        if not path.is_absolute():
            raise InstallError(
                f"the {name} {str(path)!r} must be an absolute path: runtimes start the executable anywhere"
            )
    if len(os.fsencode(socket)) > _SUN_PATH:
        raise InstallError(
            f"the socket {str(socket)!r} is longer than the {_SUN_PATH} bytes that a unix socket's path may have"
        )
    if not _NETWORK_NAME.fullmatch(network):
        raise InstallError(
            f"the network name {network!r} must begin with a letter or digit and hold only letters, digits, "
            "'_', '.' and '-'"
        )


def _mount_points() -> set[str]:
    """proc_pid_mountinfo(5): the fifth field, in which white space is written in octal."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in lines}
