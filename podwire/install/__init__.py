"""Lays the CNI executable down on a node, and takes it away.

    <bin dir>/podwire                          a script of a few lines: interpreter, paths, deadlines
    <bin dir>/../podwire/<version>-<hash>/     what it runs on, which never changes once written
    <conf dir>/10-podwire.conflist             last, because a runtime takes the node for ready when it appears

Two ways to run. `relocatable` brings a Python of its own, for nodes that have none or that change it under our feet
(`podwire.install.runtime`); `system` brings our modules alone and names the node's Python. Either way the .pyc are
there and never checked: without them a call takes 50 ms, with them the imports cost one. Python's flags -I and -S
keep PYTHONPATH, PYTHONHOME, site-packages and modules beside the script out.

Runtimes may start the executable at any moment of this. So each step leaves something whole: the folder is complete
before the script that names it, the script replaces its predecessor by rename, and the old folder stays for the calls
that are at work (`podwire.install.versions`). What is there already is left alone, to the byte and the time stamp.

    layout       where things lie, what script and conflist say       system     a version that uses the node's Python
    interpreter  the Python that is used or copied                    runtime    a version that brings its own
    plan         what such a runtime consists of                      versions   folders by content, collecting them
    elf          what a program asks of its loader                    removal    `podwire uninstall`
    files        whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import cni_plugin
from cni_plugin.main import DEADLINES
from podwire.install import layout as layouts
from podwire.install import versions
from podwire.install.errors import InstallError, UninstallError
from podwire.install.files import locked, replace
from podwire.install.interpreter import Interpreter, find_interpreter
from podwire.install.layout import BIN_DIR, CONF_DIR, CONFLIST, EXECUTABLE, NETWORK, QUEUE_DIR, SOCKET, conflist
from podwire.install.removal import Removal, uninstall
from podwire.install.runtime import relocatable_version
from podwire.install.system import system_version

__all__ = [
    "BIN_DIR",
    "CONFLIST",
    "CONF_DIR",
    "EXECUTABLE",
    "NETWORK",
    "QUEUE_DIR",
    "SOCKET",
    "InstallError",
    "Interpreter",
    "Removal",
    "UninstallError",
    "conflist",
    "find_interpreter",
    "install",
    "replace",
    "uninstall",
]

Runtime = Literal["relocatable", "system"]

_PLUGIN = Path(cni_plugin.__file__).parent
_GRACE = 60.0
"""Seconds beyond the longest deadline: what lies between opening the executable and its first line."""


def install(
    cni_bin_dir: Path,
    cni_conf_dir: Path | None,
    socket: Path = SOCKET,
    queue_dir: Path = QUEUE_DIR,
    network: str = NETWORK,
    python: Path | None = None,
    deadlines: Mapping[str, float] = DEADLINES,
    *,
    runtime: Runtime = "system",
    host_cni_bin_dir: Path | None = None,
    grace: float | None = None,
) -> Path:
    """Lays down executable and, with a `cni_conf_dir`, configuration; returns the executable's path.

    `socket` is the daemon's, `queue_dir` is where a DEL waits for it; both absolute, as the node sees them. `python` is
    the interpreter to name or to copy, by default the base of the one that runs this; `deadlines` are seconds by CNI
    command. `host_cni_bin_dir` is `cni_bin_dir` as the node sees it, when that differs. Old versions go `grace` seconds
    after they are superseded, by default when the longest call has ended. Raises InstallError.
    """
    layouts.check_settings(socket, queue_dir, network)
    layout = layouts.layout(cni_bin_dir, host_cni_bin_dir)
    if grace is None:
        grace = max(deadlines.values(), default=0.0) + _GRACE
    make = relocatable_version if runtime == "relocatable" else system_version
    try:
        version = make(layout, _PLUGIN, python)
        folder = layout.node_versions / version.name
        script = layouts.script(version.interpreter, version.flags, folder, socket, queue_dir, deadlines)
        layout.bin_dir.mkdir(parents=True, exist_ok=True)
        with locked(layout.versions):
            versions.lay(layout, version)
            replace(layout.executable, script, 0o755)
            if cni_conf_dir is not None:
                cni_conf_dir.mkdir(parents=True, exist_ok=True)
                replace(cni_conf_dir / CONFLIST, conflist(network), 0o644)
            versions.collect(layout, version.name, grace)
    except (OSError, UnicodeError) as error:
        raise InstallError(f"cannot install into {layout.bin_dir}: {error}") from error
    return layout.executable
